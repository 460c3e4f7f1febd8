"""The transitions of the last blocks: how to bring dormant influences up to date, and their pending adjoints."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl._influence.catch_up_plan import CatchUpPlan, CatchUpPlanner, Hop
from rtrl._influence.saved_checks import check_block, check_plans, count
from rtrl._influence.segment_tree import CircularSegmentTree, Node
from rtrl._influence.transition import Pattern, Transition, compose, compose_patterns, identity
from rtrl._utils.formatting import show_bytes
from rtrl.errors import ConfigError

_NODE_BYTES = 1000  # that Python takes for the objects of a node


def _check_memory(capacity: int, rows: int, cols: int, state: Tensor) -> None:
    """Refuse a capacity for which even the leaves, and the objects that hold the nodes, take more than there is."""
    numbers = rows * cols * state[0, 0].numel() ** 2 * len(state) if state.device.type == "cpu" else 0
    needed = capacity * (numbers * state.element_size() + 2 * _NODE_BYTES)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > present:
        raise ConfigError(
            f"window={capacity} takes at least {show_bytes(needed)}, this machine has {show_bytes(present)}; choose a "
            "smaller window, which bounds memory and never exactness"
        )


class _NodeMemory:
    """Fixed memory for the nodes of a tree, so that the bytes held do not depend on which rows happen to be written.

    Args:
        capacity: of the tree.
        rows, cols: the most that one block has.
        state: (B, n, ...), for shape, dtype and device.
    """

    def __init__(self, capacity: int, rows: int, cols: int, state: Tensor) -> None:
        self._like = state
        self._memory: dict[int, list[Tensor]] = {}
        (size, n), width = state.shape[:2], state[0, 0].numel()
        stack = [Node(0, 0, capacity, 0)]
        while stack:
            node = stack.pop()
            u, c = (min(n, (node.hi - node.lo) * most) for most in (rows, cols))
            sizes = (u * width * c * width, c * width, u, c)
            self._memory[node.number] = [self._allocate(size * numbers, i >= 2) for i, numbers in enumerate(sizes)]
            stack += [] if node.is_leaf else node.halves

    def _allocate(self, size: int, index: bool) -> Tensor:
        return torch.zeros(size, dtype=torch.int64 if index else self._like.dtype, device=self._like.device)

    def store(self, number: int, value: Transition) -> Transition:
        """Copy a node's value to the node's memory."""
        parts = (value.jacobian, value.adjoint, value.rows, value.cols)
        jacobian, adjoint, rows, cols = (self._copied(number, i, part) for i, part in enumerate(parts))
        return Transition(rows, cols, jacobian, adjoint, value.n, value.width)  # type: ignore[arg-type]

    def store_pattern(self, number: int, pattern: Pattern) -> Pattern:
        """Copy the index sets of a node to the memory that those of its value will have."""
        return replace(pattern, rows=self._copied(number, 2, pattern.rows), cols=self._copied(number, 3, pattern.cols))

    def _copied(self, number: int, i: int, part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        if part.numel() > self._memory[number][i].numel():  # a step declared more rows than the first one did
            self._memory[number][i] = self._allocate(part.numel(), i >= 2)
        return self._memory[number][i][: part.numel()].view(part.shape).copy_(part)

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

    Raises:
        ConfigError: the machine does not have the memory for so large a capacity.

    Cost: bytes, reserved at once: over all ``2·capacity − 1`` nodes, ``B·u·c·width²`` numbers, u and c the rows and
        columns that a node can have.
    """

    def __init__(self, capacity: int, rows: int, cols: int, state: Tensor, start: int = 0) -> None:
        size, n = state.shape[:2]
        _check_memory(capacity, rows, cols, state)
        self.capacity, self._bounds = capacity, (rows, cols)
        self._memory = _NodeMemory(capacity, rows, cols, state)
        self._none = identity(size, n, state[0, 0].numel(), state)
        self.tree = CircularSegmentTree(capacity, compose, self._none, start=start, store=self._memory.store)
        self.planner = CatchUpPlanner(
            self.tree, lambda block: block.pattern, compose_patterns, self._memory.store_pattern
        )

    @property
    def now(self) -> int:
        """How many blocks have been appended since the beginning."""
        return self.tree.stop

    @property
    def oldest(self) -> int:
        """The earliest block from which an influence can be brought up to date."""
        return self.tree.oldest

    @property
    def next_overwritten(self) -> int | None:
        """The block that the next ``append`` overwrites; influences that lack it must be brought up to date first."""
        return self.tree.oldest if len(self.tree) == self.capacity else None

    def append(self, block: Transition) -> None:
        """Add the newest block."""
        self.tree.append(block)

    def skip(self) -> None:
        """Count a block that need not be held, because all influences are up to date with it."""
        self.tree.skip()

    def plan(self, columns: Mapping[int, int]) -> CatchUpPlan:
        """Plan how to bring influences up to date: ``columns`` of them, over all samples, by their last block.

        A plan is made before any product, by counted multiply-adds (see ``CatchUpPlanner``); its ``cost`` is what
        applying ``products(plan)`` to the columns of each hop takes, compositions included.
        """
        return self.planner.plan(columns, self.now)

    def products(self, plan: CatchUpPlan) -> list[tuple[Hop, Transition]]:
        """Compute the transition of each hop of a plan."""
        return list(zip(plan.hops, self.planner.products(plan), strict=True))

    def pending_adjoints(self, last_blocks: Collection[int], accumulated: int) -> dict[int, Tensor]:
        """Return, by last block, the adjoint w (B, H) of an influence S of that block: ``w S`` is its gradient for the
        blocks from ``accumulated`` to now.

        Equation: ``w = v_{accumulated→now} Φ_{last_block→accumulated}``. One backward pass serves all last blocks,
        where that is cheaper.
        """
        size = len(self._none.jacobian)
        adjoints = {self.now: self._none.adjoint.new_zeros(size, self._none.n * self._none.width)}
        recent = {max(block, accumulated) for block in last_blocks}
        self._pull_back(adjoints, recent, self.now, with_adjoint=True)
        earlier = {block for block in last_blocks if block < accumulated}
        self._pull_back(adjoints, earlier, accumulated, with_adjoint=False)
        return {block: adjoints[block] for block in last_blocks}

    def _pull_back(
        self, adjoints: dict[int, Tensor], blocks: Collection[int], stop: int, *, with_adjoint: bool
    ) -> None:
        """Add the adjoints of these blocks to those known by block, from that of block ``stop`` backward."""
        plan = self.planner.plan(dict.fromkeys(blocks, len(self._none.jacobian)), stop, shared=True)
        for hop, product in reversed(self.products(plan)):
            adjoints[hop.start] = product.pull_back(adjoints[hop.stop], with_adjoint=with_adjoint)

    def pull_back_to(self, last_blocks: Collection[int], cotangents: Tensor) -> dict[int, Tensor]:
        """Return, by last block, ``W Φ_{last_block→now}`` for L cotangents W (B, L, H) of the present state.

        Nothing is composed or remembered: later plans are what they would have been.

        Cost: a row-vector product for each of the fewest nodes that are held already.
        """
        pulled, stop = {}, self.now
        for block in sorted(last_blocks, reverse=True):
            nodes = self.tree.nodes(block, stop)
            while nodes:
                node = nodes.pop()
                if self.tree.is_held(node):
                    cotangents = self.tree.value(node).pull_back_rows(cotangents)
                else:
                    nodes += node.halves
            pulled[block], stop = cotangents, block
        return pulled

    @property
    def n_bytes(self) -> int:
        """Bytes held: the reserved memory of all nodes."""
        return self._memory.n_bytes

    def state_dict(self) -> dict[str, Any]:
        """Return the blocks held, oldest first, and what plans depend on."""
        blocks = [self.tree.query(block, block + 1) for block in range(self.oldest, self.now)]
        parts = [(block.rows, block.cols, block.jacobian, block.adjoint) for block in blocks]
        return {
            "capacity": self.capacity,
            "bounds": list(self._bounds),
            "start": self.oldest,
            "blocks": [[None if t is None else t.clone() for t in block] for block in parts],
            "plans": self.planner.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any], state: Tensor, *, brief: bool = False) -> "History":
        """Return the history that ``state_dict`` described, for a state of the same shape.

        Args:
            saved: what it returned.
            state: (B, n, ...), any state.
            brief: hold the saved blocks and no more, without what was planned: to bring influences up to date once.

        Raises:
            ConfigError: it is damaged, or was taken for another state.
        """
        (size, n), width = state.shape[:2], state[0, 0].numel()
        rows_bound, cols_bound = (count("a bound of the saved history", bound, most=n) for bound in saved["bounds"])
        capacity = count("'capacity' of the saved history", saved["capacity"], least=1)
        held, start = len(saved["blocks"]), count("'start' of the saved history", saved["start"])
        if held > capacity:
            raise ConfigError(f"the saved history has {held} blocks, but holds {capacity}")
        history = cls(max(held, 1) if brief else capacity, rows_bound, cols_bound, state, start)
        for rows, cols, jacobian, adjoint in saved["blocks"]:
            rows, cols = (None if t is None else t.to(state.device) for t in (rows, cols))
            check_block(rows, cols, state)
            u, c = (n if index is None else index.shape[1] for index in (rows, cols))
            fits = tuple(jacobian.shape) == (size, u * width, c * width) and tuple(adjoint.shape) == (size, c * width)
            if not fits or jacobian.dtype != state.dtype or adjoint.dtype != state.dtype:
                raise ConfigError("a saved block does not fit the state")
            history.append(Transition(rows, cols, jacobian.to(state), adjoint.to(state), n, width))
        if not brief:
            check_plans(saved["plans"], history.tree)
            history.planner.load_state_dict(saved["plans"])
        return history
