"""The last blocks as transitions: what sleeping slices will be moved by, and what they are owed."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl._influence.catch_up_plan import Leg, Plan
from rtrl._influence.segment_tree import CircularSegmentTree
from rtrl._influence.transition import Pattern, Transition, compose, identity, merge
from rtrl.errors import ConfigError


class _Store:
    """Fixed memory for the nodes of a tree, so that what is held does not depend on which rows happen to be written.

    Args:
        capacity: of the tree. rows, cols: what one leaf has at most. n, width, batch_size: of the state. like: dtype
            and device.
    """

    def __init__(self, capacity: int, rows: int, cols: int, n: int, width: int, batch_size: int, like: Tensor) -> None:
        self._memory: dict[int, list[Tensor]] = {}
        self._like = like
        stack = [(0, 0, capacity)]
        while stack:
            node, low, high = stack.pop()
            u, c = (min(n, (high - low) * most) for most in (rows, cols))
            sizes = (u * width * c * width, c * width, u, c)
            self._memory[node] = [self._allocate(batch_size * size, index=i >= 2) for i, size in enumerate(sizes)]
            if high - low > 1:
                middle = (low + high) // 2
                stack += [(node + 1, low, middle), (node + 2 * (middle - low), middle, high)]

    def _allocate(self, size: int, index: bool) -> Tensor:
        return torch.zeros(size, dtype=torch.int64 if index else self._like.dtype, device=self._like.device)

    def __call__(self, node: int, span: int, value: Transition) -> Transition:
        parts = (value.jacobian, value.adjoint, value.rows, value.cols)
        jacobian, adjoint, rows, cols = (self._kept(node, i, part) for i, part in enumerate(parts))
        return Transition(rows, cols, jacobian, adjoint, value.n, value.width)  # type: ignore[arg-type]

    def keep_pattern(self, node: int, span: int, pattern: Pattern) -> Pattern:
        """The index sets in the memory that those of the node's value will have."""
        rows, cols = (self._kept(node, i, part) for i, part in ((2, pattern.rows), (3, pattern.cols)))
        return replace(pattern, rows=rows, cols=cols)

    def _kept(self, node: int, i: int, part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        if part.numel() > self._memory[node][i].numel():  # a step declared more rows than the first one did
            self._memory[node][i] = self._allocate(part.numel(), index=i >= 2)
        return self._memory[node][i][: part.numel()].view(part.shape).copy_(part)

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for memory in self._memory.values() for t in memory)


class History:
    """The transitions of the last blocks, numbered from 0, in a circular segment tree with memory of fixed size.

    Args:
        capacity: how many blocks are held.
        rows, cols: how many rows of the state one block writes, and writes or reads, at most.
        state: (B, n, ...), for shape, dtype and device.
        start: number of the first block.

    Cost: bytes, reserved at once: over all ``2·capacity − 1`` nodes, ``B·u·c·width²`` numbers, u and c the rows and
    columns that a node can have.
    """

    def __init__(self, capacity: int, rows: int, cols: int, state: Tensor, start: int = 0) -> None:
        size, n = state.shape[:2]
        width = state[0, 0].numel()
        self.capacity, self._bounds = capacity, (rows, cols)
        self._store = _Store(capacity, rows, cols, n, width, size, state)
        self._tree = CircularSegmentTree(
            capacity,
            compose,
            identity(size, n, width, state),
            start=start,
            keep=self._store,
            outline=lambda block: block.pattern,
            merge=merge,
            keep_outline=self._store.keep_pattern,
        )
        self._size = size

    @property
    def now(self) -> int:
        """How many blocks have been appended since the beginning."""
        return self._tree.stop

    @property
    def oldest(self) -> int:
        """The earliest time that an influence can be led on from."""
        return self._tree.oldest

    @property
    def expiring(self) -> int | None:
        """The time whose block the next ``append`` overwrites; influences with that clock must be caught up first."""
        return self._tree.oldest if len(self._tree) == self.capacity else None

    def append(self, block: Transition) -> None:
        """Add the newest block."""
        self._tree.append(block)

    def cover(self, start: int, stop: int) -> list[Transition]:
        """Transitions, earliest first, that together lead one column of every sample from time ``start`` to ``stop``,
        the cheapest ones."""
        if start == stop:
            return []
        return self._tree.products(self._plan({start: self._size}, stop))

    def plan(self, columns: Mapping[int, int]) -> Plan:
        """How to lead influences to now: ``columns`` of them, over all samples, by their clock.

        A plan is made before any product, by counted multiply-adds (``catch_up_plan.Planner`` has the rule); its
        ``cost`` is what applying ``products(plan)`` to the columns of each leg takes, compositions included.
        """
        return self._plan(columns, self.now)

    def products(self, plan: Plan) -> list[tuple[Leg, Transition]]:
        """The legs of a plan, each with its transition."""
        return list(zip(plan.legs, self._tree.products(plan), strict=True))

    def owed(self, clocks: Collection[int], paid: int) -> dict[int, Tensor]:
        """By clock, the row functional w (B, H) with ``w S_clock`` = what an influence with this clock is owed for the
        blocks from ``paid`` to now.

        Equation: ``w = v_{paid→now} Φ_{clock→paid}``. One sweep backward serves all clocks, where that is cheaper.
        """
        late = {max(clock, paid) for clock in clocks}
        found = {self.now: self._zero()}
        self._sweep(found, late, self.now, earn=True)
        self._sweep(found, {clock for clock in clocks if clock < paid}, paid, earn=False)
        return {clock: found[clock] for clock in clocks}

    def _sweep(self, found: dict[int, Tensor], times: Collection[int], stop: int, *, earn: bool) -> None:
        """Pull the functional of time ``stop`` back to these times; ``found`` has the functionals by time."""
        plan = self._plan(dict.fromkeys(times, self._size), stop, shared=True)
        for leg, product in reversed(self.products(plan)):
            found[leg.start] = product.pull(found[leg.stop], earn=earn)

    def _plan(self, columns: Mapping[int, int], stop: int, shared: bool = False) -> Plan:
        return self._tree.plan(
            columns, stop, lambda pattern: pattern.apply_macs, lambda pattern: pattern.compose_macs, shared=shared
        )

    def _zero(self) -> Tensor:
        none: Transition = self._tree.query(self.now, self.now)
        return none.adjoint.new_zeros(none.jacobian.shape[0], none.n * none.width)

    @property
    def n_bytes(self) -> int:
        """Bytes held: the reserved memory of all nodes."""
        return self._store.n_bytes

    def state_dict(self) -> dict[str, Any]:
        """The blocks held, oldest first, and what plans depend on; inner nodes are computed again when needed."""
        leaves = [(b.rows, b.cols, b.jacobian, b.adjoint) for _, b in self._tree.leaves()]
        clones = [[None if t is None else t.clone() for t in leaf] for leaf in leaves]
        return {
            "capacity": self.capacity,
            "bounds": list(self._bounds),
            "start": self._tree.oldest,
            "blocks": clones,
            "plans": self._tree.memory(),
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any], state: Tensor) -> "History":
        """The history that ``state_dict`` described, for a state of the same shape.

        Raises:
            ConfigError: it is damaged, or was taken for another state.
        """
        rows_bound, cols_bound = saved["bounds"]
        history = cls(saved["capacity"], rows_bound, cols_bound, state, start=saved["start"])
        n, width = state.shape[1], state[0, 0].numel()
        size = state.shape[0]
        for rows, cols, jacobian, adjoint in saved["blocks"]:
            u, c = (n if index is None else index.shape[1] for index in (rows, cols))
            fits = tuple(jacobian.shape) == (size, u * width, c * width) and tuple(adjoint.shape) == (size, c * width)
            if not fits or jacobian.dtype != state.dtype or adjoint.dtype != state.dtype:
                raise ConfigError("a saved block does not fit the state")
            rows, cols = (None if t is None else t.to(state.device) for t in (rows, cols))
            history.append(Transition(rows, cols, jacobian.to(state), adjoint.to(state), n, width))
        history._tree.recall(saved["plans"])
        return history
