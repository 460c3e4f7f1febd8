"""A cell made ready for measuring: a copy of it, the stream that it runs on, and learners really run on that stream."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._utils import pytrees
from rtrl.cells.analytic import HasAnalyticStep
from rtrl.cells.example_input import WIDTHS, guessed_input
from rtrl.cells.protocol import Sparsity, call_cell, check_input, first_state, own_copy, takes_replay
from rtrl.errors import ConfigError, RTRLError, ShapeError, UnknownOperationError
from rtrl.learners import BPTT, BlockRTRL
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter, Rule

T = TypeVar("T")

MEASURED_MACS, MEASURED_ROUTING_MACS, MEASURED_NUMBERS = 2**31, 2**28, 2**26
"""Parameters are measured as long as moving all their influences once takes at most this number of multiply-adds (of a
cell that routes, of which more blocks are run, the second), and they have at most the last number of entries; what the
other parameters add is computed from their sizes."""


@dataclass(frozen=True)
class Run:
    """A learner really run, a loss at each step and one ``sync`` at the end.

    Attributes:
        macs: multiply-adds so far, after each step and after the ``sync``.
        held: ``retained_bytes()`` at the same moments, each step's loss included; empty where it was not asked for.
        peaks: the most bytes alive at once since the moment before.
    """

    macs: list[int]
    held: list[dict[str, int]]
    peaks: list[int]


class _Meter(MacCounter):
    """Counts multiply-adds and bytes alive, in half the time that two modes take."""

    def __init__(self, rules: Mapping[str, Rule] | None) -> None:
        super().__init__(rules)
        self.alive = LiveBytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.alive.takes(args)
        self.alive.takes(tuple(kwargs.values()) if kwargs else ())
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.alive.makes(out)
        return out


class Profile:
    """A copy of a cell with a stream of inputs and choices, and what learners cost on it.

    Args:
        cell: as for ``rtrl.BlockRTRL``; it is copied.
        xs: the x of one step or of several, trees of tensors; their samples are repeated or cut to B. None: drawn, if
            the cell says how wide its x is.
        batch_size: B.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.
        rules: how to count operations that ``rtrl.profiling.macs.MacCounter`` does not know.
        measured_macs: in place of ``MEASURED_MACS``.

    Attributes:
        name: of the cell's class.
        rows: of the state.
        width: numbers of a row; H = rows · width.
        sizes: trainable parameter → its number of entries.
        frozen: parameters of ``sizes`` that are too large to be measured.
        declares: whether a step declares a sparsity, of rows or of slices.
        steady: whether all steps have the same shapes and widths of sparsity.
        given: how many steps of a stream the user gave.

    Raises:
        ConfigError: there is no x, no first state, no trainable parameter, or the cell cannot be copied.
        ShapeError: as ``BlockRTRL.step``; so CellError, SparsityError, NonFiniteError.
        UnknownOperationError: see ``rules``.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        cell: nn.Module,
        xs: Sequence[Any] | None,
        batch_size: int,
        *,
        state: Tensor | None = None,
        rules: Mapping[str, Rule] | None = None,
        measured_macs: int = MEASURED_MACS,
    ) -> None:
        parameters = ParameterGuard(cell).parameters
        first = first_state(cell, batch_size) if state is None else state.detach().clone()
        self.state = checks.checked_state(first, batch_size, next(iter(parameters.values())), None)
        self.name, self.batch_size, self._rules = type(cell).__name__, batch_size, rules
        self.rows, self.width = self.state.shape[1], self.state[0, 0].numel()
        self.state_size, self.itemsize = self.rows * self.width, self.state.element_size()
        self.dtype = str(self.state.dtype).removeprefix("torch.")
        self.slices = {name: p.shape[0] if p.ndim else 1 for name, p in parameters.items()}
        self.sizes = {name: p.numel() for name, p in parameters.items()}
        self.parameter_size = sum(self.sizes.values())
        everything = [dict(cell.named_parameters()), dict(cell.named_buffers())]
        self.parameter_bytes, self.copy_bytes = pytrees.n_bytes(parameters), pytrees.n_bytes(everything)
        self._runs: dict[Any, Any] = {}
        self._draws = False
        with self._generators_kept():
            try:
                self._cell = copy.deepcopy(cell)
            except RuntimeError as error:
                raise ConfigError(f"the cell cannot be copied, and measuring needs a copy: {error}") from error
            self._cell.zero_grad(set_to_none=True)
            self._xs = [_resized(x, self.state) for x in xs] if xs is not None else [_drawn(self._cell, self.state)]
            self.given = 0 if xs is None else len(xs)
            self._choices = self._walk()
        kinds = {pytrees.signature((x, tuple(choice))) for x, choice in zip(self._xs, self._choices, strict=False)}
        self.steady = len(kinds) == 1
        self.sliced = [name for name in self.sizes if name in self._choices[0].active]
        self.declares = bool(self.sliced) or any(index is not None for index in self._choices[0][:2])
        reads, writes = (self.rows if t is None else t.shape[1] for t in self._choices[0][:2])
        self.sweep_macs = batch_size * self.state_size * writes * min(self.rows, reads + writes) * self.width**2
        self._draws = self.declares and len(self._xs) == 1 and takes_replay(cell)
        self._generator = torch.Generator().manual_seed(0)
        if self._draws and not self._can_replay():
            self._draws, self._xs = False, [self._xs[0], *(self._other_x() for _ in range(63))]
            self._choices = self._walk()
        self.frozen = self._too_large(MEASURED_ROUTING_MACS if self.declares else measured_macs)
        self._part = copy.deepcopy(self._cell)
        for name in self.frozen:
            self._part.get_parameter(name).requires_grad_(False)

    # ------------------------------------------------------------------ the stream

    def x(self, step: int) -> Any:
        """The x of a step: what was given, over and over."""
        return self._xs[step % len(self._xs)]

    def choice(self, step: int) -> Sparsity:
        """What a step touches: as the cell chose on the stream, over and over; of a single x that a cell routes,
        after the first step, choices drawn evenly at random, every slice being chosen in the first round of them."""
        if not self._draws:
            return self._choices[step % len(self._choices)]
        while len(self._choices) <= step:
            self._choices.append(self._draw(len(self._choices)))
        return self._choices[step]

    def _walk(self) -> list[Sparsity]:
        """What each step of the stream touches; the first step alone if nothing is declared."""
        h, choices = self.state, list[Sparsity]()
        with torch.no_grad():
            self._measure(BPTT, 1, False, False, 0, {})  # for the checks of a step
            for x in self._xs:
                _, h, sparsity = call_cell(self._cell, x, h.clone(), None)
                choices.append(own_copy(sparsity))
                if sparsity.reads is None and sparsity.writes is None and not sparsity.active:
                    break
        return choices

    def _draw(self, step: int) -> Sparsity:
        """Sets as large as the first step's: those that were one tensor stay one, and what was written stays among what
        was read."""
        first, drawn = self._choices[0], dict[int, Tensor]()

        def draw(index: Tensor | None, count: int) -> Tensor | None:
            if index is None:
                return None
            if id(index) not in drawn:
                k = index.shape[1]
                scores = torch.rand(self.batch_size, count, generator=self._generator)
                order = scores.argsort(dim=1)
                if step * k < count:  # the first round: no slice is left out
                    order = (torch.arange(count) + step * k).remainder(count).expand(self.batch_size, -1)
                drawn[id(index)] = order[:, :k].to(index.device)
            return drawn[id(index)]

        reads = draw(first.reads, self.rows)
        if reads is not None and first.writes is not None and first.writes.shape[1] <= reads.shape[1]:
            drawn.setdefault(id(first.writes), reads[:, : first.writes.shape[1]])
        writes = draw(first.writes, self.rows)
        active = {name: draw(index, self.slices.get(name, 1)) for name, index in first.active.items()}
        return Sparsity(reads, writes, active)  # type: ignore[arg-type]

    def _can_replay(self) -> bool:
        """Whether the cell makes choices that are drawn: one whose rows are of several kinds does not."""
        try:
            with torch.no_grad():
                for step in range(1, 9):
                    call_cell(self._cell, self._xs[0], self.state.clone(), self.choice(step))
        except (RTRLError, RuntimeError, ValueError, IndexError, TypeError):
            return False
        return True

    def _other_x(self) -> Any:
        def other(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf[torch.randperm(leaf.shape[0], generator=self._generator).to(leaf.device)]
            return torch.randn(leaf.shape, generator=self._generator, dtype=leaf.dtype).to(leaf.device)

        return pytrees.map_tensors(other, self._xs[0])

    # ------------------------------------------------------------------ measuring

    def run(
        self,
        learner: type,
        steps: int,
        *,
        part: bool = False,
        replay: bool = False,
        sync_after: int = 0,
        **options: Any,
    ) -> Run:
        """Run a learner and measure it, once for each set of arguments.

        Args:
            learner: its class.
            steps: how many, a loss at each of them and a ``sync`` at the end.
            part: without the parameters that are too large to be measured.
            replay: with the choices of ``choice`` in place of the cell's, where they were drawn.
            sync_after: a step after which there is a ``sync``, too; 0 for none.
            **options: of the learner.
        """
        part = part and bool(self.frozen)
        key = learner, steps, part, replay, sync_after, *sorted(options.items())
        return self.once(key, lambda: self._measure(learner, steps, part, replay, sync_after, options))

    @torch.inference_mode(False)
    def _measure(
        self, kind: type, steps: int, part: bool, replay: bool, sync_after: int, options: Mapping[str, Any]
    ) -> Run:
        cell = self._part if part else self._cell
        found, meter = Run([], [], []), _Meter(self._rules)
        with self._generators_kept(), torch.enable_grad(), meter:
            alive = meter.alive

            def note() -> None:
                found.macs.append(meter.macs)
                found.peaks.append(alive.peak)
                found.held.append(learner.retained_bytes())
                alive.peak = alive.now

            try:
                learner = kind(cell, self.batch_size, state=self.state.clone(), **options)
                for step in range(steps):
                    forced = {"replay": self.choice(step)} if replay and self._draws and step else {}
                    losses = [leaf.square().sum() for leaf in _floats(learner.step(self.x(step), **forced))]
                    if losses:
                        learner.backward(torch.stack(losses).sum())
                    if step + 1 == sync_after:
                        learner.sync()
                    note()
                learner.sync()
                note()
            except UnknownOperationError as error:
                raise UnknownOperationError(f"{error}; a plan takes such counts as rules={{name: rule}}") from error
            finally:
                cell.zero_grad(set_to_none=True)
        return found

    def once(self, key: Any, measure: Callable[[], T]) -> T:
        """What ``measure()`` gives, measured once for each key."""
        if key not in self._runs:
            self._runs[key] = measure()
        found: T = self._runs[key]
        return found

    def graph_bytes(self, steps: int, everywhere: bool) -> int:
        """Bytes that autograd keeps of ``steps`` steps in a row, with a loss at each of them or at the last alone."""

        def measure() -> int:
            kept, h, y = list[Any](), self.state, None
            with self._generators_kept(), torch.inference_mode(False), torch.enable_grad(), LiveBytes() as alive:
                for step in range(steps):
                    y, h, _ = call_cell(self._cell, self.x(step), h, None)
                    kept.append(y if everywhere else None)
                now: int = alive.now
            return now

        return self.once(("graph", steps, everywhere), measure)

    def _backward(self, left_out: str = "") -> tuple[int, list[str]]:
        """Multiply-adds of a step backward from its next state, and the parameters that it reaches."""
        leaves = {name: p for name, p in self._cell.named_parameters() if p.requires_grad and name != left_out}
        with self._generators_kept(), torch.inference_mode(False), torch.enable_grad():
            _, h, _ = call_cell(self._cell, self.x(0), self.state.clone(), None)
            if not h.requires_grad:
                return 0, []
            with MacCounter(self._rules) as counter:
                found = torch.autograd.grad(h, list(leaves.values()), torch.ones_like(h), allow_unused=True)
        return counter.macs, [name for name, gradient in zip(leaves, found, strict=True) if gradient is not None]

    def immediate_macs(self) -> int:
        """Multiply-adds that a row of suffix products takes with the immediate influence of a step in the parameters
        that are too large: as much as a step backward from its next state does in them; and, of a cell whose
        derivatives are not known analytically, as much as a row of Jacobians at the outputs of their linear maps."""

        def measure() -> int:
            every, total, writes = self._backward()[0], 0, self._choices[0].writes
            written = 0 if isinstance(self._cell, HasAnalyticStep) else self.width
            written *= self.rows if writes is None else writes.shape[1]
            for name in self.frozen:
                macs = every - self._backward(left_out=name)[0]
                total += macs + macs * written // self._cell.get_parameter(name).shape[-1]
            return total

        return self.once("immediate", measure)

    def tree_bytes(self, block: int, window: int) -> int:
        """Bytes of the tree that ``BlockRTRL`` reserves at its first step."""

        def measure() -> int:
            with self._generators_kept(), torch.inference_mode(False):
                learner = BlockRTRL(self._part, self.batch_size, block=block, window=window, state=self.state)
                learner.step(self.x(0))
                return int(learner.retained_bytes()["tree"])

        return self.once(("tree", block, window), measure)

    def kept_buffer(self, block: int) -> int:
        """Bytes of the buffer that ``BlockRTRL`` keeps for the suffix products of dense blocks."""
        size, influence = self.suffix_bytes(block), self.batch_size * self.state_size * self.parameter_size
        return size if ReusableBuffer(influence * self.itemsize).keeps(size, self.state.device) else 0

    def suffix_bytes(self, block: int) -> int:
        """Bytes of the suffix products and adjoints of a dense block."""
        return block * self.batch_size * self.state_size * (self.state_size + 1) * self.itemsize

    def _too_large(self, most: int) -> frozenset[str]:
        """The parameters of the largest modules, without which moving the influence of the others takes
        ``most`` multiply-adds at most; the smallest ones with an influence, and with slices, are always measured. The
        parameters of a module stay together, as a bias is part of its weight's map, unless their slices are active at
        other times, or there is one module alone, or the cell's derivatives are known analytically."""
        influence = self.batch_size * self.state_size
        room = min(most // (influence * self.state_size), MEASURED_NUMBERS // influence)
        modules = {name: name.rpartition(".")[0] for name in self.sizes}
        if isinstance(self._cell, HasAnalyticStep) or len(set(modules.values())) == 1:
            modules = {name: name for name in self.sizes}
        together: dict[tuple[str, int], list[str]] = {}
        for name, module in modules.items():
            together.setdefault((module, id(self._choices[0].active.get(name))), []).append(name)
        kinds = [set(self._backward()[1]), set(self.sliced)]  # of each, the smallest is measured
        frozen = set[str]()
        for names in sorted(together.values(), key=lambda names: sum(self.sizes[name] for name in names)):
            room -= sum(self.sizes[name] for name in names)
            needed = [kind for kind in kinds if kind.intersection(names)]
            kinds = [kind for kind in kinds if kind not in needed]
            if room < 0 and not needed:
                frozen.update(names)
        return frozenset(frozen)

    def _generators_kept(self) -> Any:
        """Leave PyTorch's random numbers as they were."""
        return torch.random.fork_rng(devices=[self.state.device] if self.state.device.type == "cuda" else [])


def _floats(y: Any) -> list[Tensor]:
    return [leaf for leaf in pytrees.tensors(y) if leaf.is_floating_point()]


def _resized(x: Any, h: Tensor) -> Any:
    """x for the batch of h: its samples repeated, or cut."""
    tensors = pytrees.tensors(x)
    if not tensors:
        raise ShapeError("x holds no tensor")
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensors}
    if len(lengths) != 1 or 0 in lengths:
        raise ShapeError(
            f"each tensor of x must have the same batch as dimension 0, got {[tuple(leaf.shape) for leaf in tensors]}"
        )
    size = lengths.pop()

    def samples(leaf: Tensor) -> Tensor:
        return leaf.detach()[torch.arange(h.shape[0], device=leaf.device) % size].clone()

    x = pytrees.map_tensors(samples, x)
    for leaf in pytrees.tensors(x):
        check_input("x", leaf, h.shape[0], h)
        checks.check_finite("x", leaf, 0)
    return x


def _drawn(cell: nn.Module, h: Tensor) -> Any:
    draw = guessed_input(cell, h)
    if draw is None:
        raise ConfigError(
            f"what {type(cell).__name__} takes cannot be guessed: {', '.join(WIDTHS)} of the cell and of the modules "
            "in it were tried; give an example input of one step, x="
        )
    return draw()
