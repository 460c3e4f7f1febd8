"""A cell made ready for measuring: a copy of it, its stream of inputs and choices, and learners run on that stream."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._influence.structure import Structure
from rtrl._utils import pytrees
from rtrl.cells.example_input import WIDTHS, guessed_input
from rtrl.cells.protocol import Cell, Sparsity, call_cell, check_input, first_state, own_copy, takes_replay
from rtrl.cells.row_groups import declares_independent_slots
from rtrl.errors import ConfigError, RTRLError, ShapeError, UnknownOperationError
from rtrl.learners import BPTT
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.profiling.dry_run import DryRun
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter, Rule

MOST_NUMBERS = 2**26
"""A cell that cannot be run without numbers is run with them, if its influence has at most this many."""

DRAWN_STEPS = 64
"""How many inputs are drawn for a cell that routes, takes no ``replay``, and came with a single x."""


@dataclass(frozen=True)
class Run:
    """What a learner takes that is run with a loss at each step and one ``sync`` at the end.

    Attributes:
        macs: multiply-adds so far, after each step and after the ``sync``.
        held: ``retained_bytes()`` at the same moments, each step's loss included.
        peaks: by operation, the most bytes alive at once after a call of it. As parts of a computation differ in
            their operations, these grow more evenly with a run than the highest of them.
    """

    macs: list[int]
    held: list[dict[str, int]]
    peaks: dict[str, int]

    @property
    def most_held(self) -> dict[str, int]:
        """The moment at which most bytes are held."""
        return max(self.held, key=lambda parts: sum(parts.values()))


class Profile:
    """A copy of a cell with a stream of inputs and choices, on which learners are run and measured.

    Learners run on tensors without numbers (``rtrl.profiling.dry_run``), so that no size is too large.

    Args:
        cell: as for ``rtrl.BlockRTRL``; it is copied.
        xs: the x of one step or of several, trees of tensors; their samples are repeated or cut to B. None: drawn, if
            the cell says how wide its x is.
        batch_size: B.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.
        rules: how to count operations that ``rtrl.profiling.macs.MacCounter`` does not know.

    Attributes:
        name: of the cell's class.
        state_size: H.
        sizes: trainable parameter → its number of entries.
        sliced: parameters that are kept slice by slice → their number of slices.
        declares: whether a step declares a sparsity, of rows or of slices.
        by_slot: whether ``BlockRTRL`` keeps the influence of a slice on one slot of the state, not on all of it.
        structure: what ``BlockRTRL`` finds in the cell; None if it finds none.
        steady: whether all steps have the same shapes and widths of sparsity.
        given: how many steps of a stream the user gave.

    Raises:
        ConfigError: there is no x, no first state, no trainable parameter, a complex state or parameter, or the cell
            cannot be copied.
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
    ) -> None:
        parameters = ParameterGuard(cell).parameters
        beside = next(iter(parameters.values()))
        first = first_state(cell, batch_size) if state is None or isinstance(cell, Cell) else None
        if any(value is not None and value.is_complex() for value in (first, *parameters.values())):
            raise ConfigError(
                "costs are counted for real numbers only, and this cell has a complex state or parameter; measure its "
                "learners by hand, with rtrl.profiling.alternate"
            )
        if first is not None:
            first = checks.checked_state(first, batch_size, beside)
        self.state = checks.checked_state(first if state is None else state, batch_size, beside, first)
        self.name, self.batch_size, self._rules = type(cell).__name__, batch_size, rules
        self.state_size, self.itemsize = self.state[0].numel(), self.state.element_size()
        self.dtype = str(self.state.dtype).removeprefix("torch.")
        self.sizes = {name: p.numel() for name, p in parameters.items()}
        self.parameter_size = sum(self.sizes.values())
        self._runs: dict[Any, Run] = {}
        self._dry: DryRun | None = DryRun(rules)
        with self._unnoticed():
            try:
                self._cell = copy.deepcopy(cell).requires_grad_(True)
                for name, parameter in self._cell.named_parameters():
                    parameter.requires_grad_(name in parameters)
            except RuntimeError as error:
                raise ConfigError(f"the cell cannot be copied, and measuring needs a copy: {error}") from error
            self._cell.zero_grad(set_to_none=True)
            self._xs = [_resized(x, self.state) for x in xs] if xs is not None else [_drawn(self._cell, self.state)]
            self.given = 0 if xs is None else len(xs)
            BPTT(self._cell, batch_size, state=self.state).step(self._xs[0])  # for the checks of a step
            self._free_macs = 0
            self._choices = self._walk()
            learner = BlockRTRL(self._cell, batch_size, state=self.state, audit="off")
            learner.step(self._xs[0])
            self.structure = learner.find_structure()
        self.steady = (
            len({pytrees.signature((x, tuple(c))) for x, c in zip(self._xs, self._choices, strict=False)}) == 1
        )
        chosen = self._choices[0]
        self.sliced = {name: p.shape[0] if p.ndim else 1 for name, p in parameters.items() if name in chosen.active}
        self.declares = bool(self.sliced) or chosen.reads is not None or chosen.writes is not None
        self.by_slot = self.declares and declares_independent_slots(self._cell, self.state)
        self._replays = self.declares and takes_replay(cell)
        self._generator = torch.Generator().manual_seed(0)
        self._draws = self._replays and len(self._xs) == 1
        with self._unnoticed():
            if self._draws and not self._can_replay():
                self._draws = False
            if self.declares and len(self._xs) == 1 and not self._draws:
                self._xs += [self._other_x() for _ in range(DRAWN_STEPS - 1)]
                self._choices = self._walk()
            if self._replays:
                self._free_macs = self._forward_macs(None) - self._forward_macs(chosen)

    # ------------------------------------------------------------------ the stream

    def x(self, step: int) -> Any:
        """Return the x of a step: what was given, over and over."""
        return self._xs[step % len(self._xs)]

    def choice(self, step: int) -> Sparsity:
        """Return what a step touches: what the cell chose on the stream, over and over; after a single x, drawn evenly
        at random, with every slice in the first round of draws."""
        while self._draws and len(self._choices) <= step:
            self._choices.append(self._draw(len(self._choices)))
        return self._choices[step % len(self._choices)]

    def touched(self, name: str | None, stop: int, start: int = 0) -> int:
        """Return how many pairs of a sample and a slice of a parameter are active in some steps of the stream; without
        a name, how many pairs of a sample and a row of the state are written."""
        choices = [self.choice(step) for step in range(start, stop)]
        index = [choice.writes if name is None else choice.active[name] for choice in choices]
        if any(rows is None for rows in index):
            return self.batch_size * self.state.shape[1]
        by_sample = [torch.cat([rows[b] for rows in index if rows is not None]) for b in range(self.batch_size)]
        return sum(len(rows.unique()) for rows in by_sample)

    def _walk(self) -> list[Sparsity]:
        """What each step of the stream touches; the first step alone if nothing is declared."""
        h, choices = self.state, list[Sparsity]()
        with torch.no_grad():
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
                order = torch.rand(self.batch_size, count, generator=self._generator).argsort(dim=1)
                if step * k < count:  # the first round leaves no slice out
                    order = (torch.arange(count) + step * k).remainder(count).expand(self.batch_size, -1)
                drawn[id(index)] = order[:, :k].to(index.device)
            return drawn[id(index)]

        n_slots = self.state.shape[1]
        reads = draw(first.reads, n_slots)
        if reads is not None and first.writes is not None and first.writes.shape[1] <= reads.shape[1]:
            drawn.setdefault(id(first.writes), reads[:, : first.writes.shape[1]])
        writes = draw(first.writes, n_slots)
        active = {name: draw(index, self.sliced.get(name, 1)) for name, index in first.active.items()}
        return Sparsity(reads, writes, active)  # type: ignore[arg-type]

    def _can_replay(self) -> bool:
        """Whether the cell makes choices that are drawn: one whose rows are of several kinds does not."""
        try:
            with torch.no_grad():
                for step in range(1, 9):
                    call_cell(self._cell, self._xs[0], self.state.clone(), self.choice(step))
        except (RTRLError, RuntimeError, ValueError, IndexError, TypeError):
            del self._choices[1:]
            return False
        return True

    def _other_x(self) -> Any:
        def other(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf[torch.randperm(leaf.shape[0], generator=self._generator).to(leaf.device)]
            return torch.randn(leaf.shape, generator=self._generator, dtype=leaf.dtype).to(leaf.device)

        return pytrees.map_tensors(other, self._xs[0])

    def _forward_macs(self, replay: Sparsity | None) -> int:
        with torch.no_grad(), MacCounter(self._rules) as counter:
            call_cell(self._cell, self._xs[0], self.state.clone(), replay)
        return counter.macs

    # ------------------------------------------------------------------ measuring

    def run(self, learner: type, steps: int, **options: Any) -> Run:
        """Run a learner and measure it, once for each set of arguments.

        Args:
            learner: its class.
            steps: how many, with a loss at each of them and a ``sync`` at the end.
            **options: of the learner.

        Raises:
            ConfigError: the cell cannot be run without numbers, and is too large to be run with them.
            UnknownOperationError: the cell runs an operation without a count.
        """
        if issubclass(learner, BlockRTRL):
            options["structure"] = self.structure_option
        key = learner, steps, *sorted(options.items())
        if key not in self._runs:
            self._runs[key] = self._measured(
                lambda cell, state: learner(cell, self.batch_size, state=state, **options), steps
            )
        return self._runs[key]

    @property
    def structure_option(self) -> Structure | Literal["find", "off"]:
        """The argument ``structure`` of learners that are run: what was found, or that slots are carried one by one."""
        return "find" if self.by_slot else self.structure or "off"

    def _measured(self, make: Callable[[nn.Module, Tensor], Any], steps: int) -> Run:
        try:
            if self._dry is not None:
                try:
                    return self._drive(self._dry, LiveBytes(), make, steps)
                except UnknownOperationError:
                    raise
                except Exception as error:
                    if self.batch_size * self.state_size * self.parameter_size > MOST_NUMBERS:
                        raise ConfigError(
                            f"{self.name} cannot be run on tensors without numbers ({type(error).__name__}: {error}), "
                            "and with numbers it is too large to be measured; plan for a smaller one of its kind"
                        ) from error
                    self._dry = None
            return self._drive(MacCounter(self._rules), LiveBytes(), make, steps)
        except UnknownOperationError as error:
            raise UnknownOperationError(f"{error}; a plan takes such counts as rules={{name: rule}}") from error

    @torch.inference_mode(False)
    def _drive(self, counter: MacCounter, live: LiveBytes, make: Callable[[nn.Module, Tensor], Any], steps: int) -> Run:
        macs, held = list[int](), list[dict[str, int]]()
        cell, state = copy.deepcopy(self._cell), self.state.clone()
        if isinstance(counter, DryRun):
            counter.begin(live)
            counter.remove_numbers(cell)
            state = counter.without_numbers(state)
        begun = counter.macs

        def note() -> None:
            macs.append(counter.macs - begun + self._free_macs * min(len(macs) + 2, steps + 1))
            held.append(learner.retained_bytes())

        with self._unnoticed(), torch.enable_grad(), _both(counter, live):
            learner = make(cell, state)
            del state
            for step in range(steps):
                forced = {"replay": own_copy(self.choice(step))} if self._replays else {}
                outputs = pytrees.tensors(learner.step(self.x(step), **forced))
                losses = [leaf.square().sum() for leaf in outputs if leaf.is_floating_point()]
                if losses:
                    learner.backward(torch.stack(losses).sum())
                del forced, outputs, losses
                note()
            learner.sync()
            note()
        found = {"any": live.peak} | (counter.peaks if isinstance(counter, DryRun) else {})
        return Run(macs, held, found)

    def _unnoticed(self) -> Any:
        """Leave PyTorch's random numbers as they were."""
        return torch.random.fork_rng(devices=[self.state.device] if self.state.device.type == "cuda" else [])


@contextmanager
def _both(counter: MacCounter, live: LiveBytes) -> Iterator[None]:
    if isinstance(counter, DryRun):
        with counter:
            yield
    else:
        with live, counter:
            yield


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
