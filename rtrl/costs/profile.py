"""What one step of a cell costs, measured on the cell itself: multiply-adds, bytes, and what the step touches.

A few steps are run on copies of the parameters, with a graph and without. The cell, its gradients and the random number
generators are left as they were.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, contract
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._engine.recorded import RecordedStep as Kept
from rtrl._utils import pytrees
from rtrl.cells.example_input import WIDTHS, guessed_input
from rtrl.cells.protocol import (
    Cell,
    Sparsity,
    call_cell,
    check_input,
    check_sparsity,
    first_state,
    own_copy,
    takes_replay,
)
from rtrl.costs.linear import Linear, measure
from rtrl.errors import ConfigError, RTRLError, ShapeError, UnknownOperationError
from rtrl.learners.bptt import unrolled_gradient
from rtrl.learners.replayed_step import ParameterSnapshot, ReplayedStep
from rtrl.profiling.macs import MacCounter, Rule


@dataclass(frozen=True)
class Series:
    """A quantity of runs of 1, 2, 3, … steps: measured for three of them, and each further step adds what the third
    did."""

    measured: tuple[int, int, int]

    def __call__(self, steps: int) -> int:
        """The quantity of a run of ``steps`` ≥ 0 steps."""
        if steps < 1:
            return 0
        two, three = self.measured[1:]
        return self.measured[steps - 1] if steps <= 3 else three + (steps - 3) * (three - two)

    @property
    def one_more(self) -> int:
        """What each step adds to a long run."""
        return self.measured[2] - self.measured[1]


@dataclass(frozen=True)
class Lone:
    """Multiply-adds of one sample run alone: a forward pass; the backward pass from y; that from one entry of the next
    state."""

    forward: int
    from_output: int
    from_entry: int


@dataclass(frozen=True)
class Profile:
    """A cell at one batch size, measured.

    Attributes:
        cell: what it is called. batch_size: B. rows, width: of the state; H = rows · width. device: its type.
        itemsize, dtype: of the state.
        shapes: trainable parameter → shape. parameter_bytes: of all of these; copy_bytes: of the buffers and the
            frozen parameters, too.
        x_bytes, state_bytes, output_bytes: of one step: x, h, the floating-point tensors of y.
        choice_bytes: of the index tensors of a step's ``Sparsity``, each parameter's counted; shared_bytes: the same,
            but tensors that parameters share counted once.
        replays: whether the cell takes ``replay``.
        choices: the ``Sparsity`` of each step of the stream that was run.
        forward_macs: of each of these steps; again_macs: of a step that is run again with its choices laid down.
        losses_everywhere, loss_at_the_end: multiply-adds of the backward pass through steps with a loss at each of
            them, and at the last alone; the forward pass is not counted.
        graph_bytes: what the graph of so many steps holds besides parameters and what a step keeps anyway.
        lone: what one sample costs alone. linear: what linearising a step costs.
        steady: whether all steps had the same shapes and widths of sparsity, so that one stands for all.
    """

    cell: str
    batch_size: int
    device: str
    rows: int
    width: int
    itemsize: int
    dtype: str
    shapes: Mapping[str, torch.Size]
    parameter_bytes: int
    copy_bytes: int
    x_bytes: int
    state_bytes: int
    output_bytes: int
    choice_bytes: int
    shared_bytes: int
    replays: bool
    choices: Sequence[Sparsity]
    forward_macs: Sequence[int]
    again_macs: int
    losses_everywhere: Series
    loss_at_the_end: Series
    graph_bytes: Series
    lone: Lone
    linear: Linear
    steady: bool

    @property
    def state_size(self) -> int:
        """H."""
        return self.rows * self.width

    @cached_property
    def parameter_size(self) -> int:
        """P."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def declares(self) -> bool:
        """Whether a step declares a sparsity, of rows or of slices."""
        first = self.choices[0]
        sliced = any(name in first.active for name in self.shapes)
        return sliced or first.reads is not None or first.writes is not None

    def forward(self, steps: int) -> int:
        """Multiply-adds of the forward passes of ``steps`` steps, the stream that was run being repeated."""
        rounds, rest = divmod(steps, len(self.forward_macs))
        return rounds * sum(self.forward_macs) + sum(self.forward_macs[:rest])


@torch.inference_mode(False)
def profile(
    cell: nn.Module,
    xs: Sequence[Any] | None,
    batch_size: int,
    *,
    state: Tensor | None = None,
    rules: Mapping[str, Rule] | None = None,
) -> Profile:
    """Run a few steps of a cell and measure them.

    Args:
        cell: as for ``rtrl.BlockRTRL``. batch_size: B.
        xs: the x of one step or of several, trees of tensors; their samples are repeated or cut to B. None: drawn, if
            the cell says how wide its x is.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.
        rules: how to count operations that ``rtrl.profiling.macs.MacCounter`` does not know.

    Raises:
        ConfigError: there is no x, no first state or no trainable parameter. ShapeError, CellError, SparsityError,
            NonFiniteError: as ``BlockRTRL.step``. UnknownOperationError: see ``rules``.

    Cost: each x forward once; a few forward and backward passes through at most three steps.
    """
    try:
        return _profile(cell, xs, batch_size, state, rules)
    except UnknownOperationError as error:
        raise UnknownOperationError(f"{error}; a plan takes such counts as rules={{name: rule}}") from error


def _profile(
    cell: nn.Module,
    xs: Sequence[Any] | None,
    batch_size: int,
    state: Tensor | None,
    rules: Mapping[str, Rule] | None,
) -> Profile:
    parameters = ParameterGuard(cell).parameters
    beside = next(iter(parameters.values()))
    first = first_state(cell, batch_size) if state is None or isinstance(cell, Cell) else None
    if first is not None:
        first = checks.checked_state(first, batch_size, beside)
    h = checks.checked_state(first if state is None else state, batch_size, beside, first)
    with _generators_kept(h.device):
        xs = [_resized(x, h) for x in xs] if xs is not None else [_drawn(cell, h)]
        with torch.no_grad():
            _guarded(lambda: contract.check_purity(cell, xs[0], h, None), xs[0], h)
        values = ParameterSnapshot(cell)
        taken, macs = _steps(cell, values, xs, h, rules)
        kinds = {pytrees.signature((step.x, tuple(step.sparsity))) for step in taken}
        probe = _repeated(cell, values, taken[0], rules)
        kinds |= {pytrees.signature((step.x, tuple(step.sparsity))) for step in probe}
        one, lone = probe[0], _lone(probe[0], rules)
        return Profile(
            cell=type(cell).__name__,
            batch_size=batch_size,
            device=h.device.type,
            rows=h.shape[1],
            width=h[0, 0].numel(),
            itemsize=h.element_size(),
            dtype=str(h.dtype).removeprefix("torch."),
            shapes={name: p.shape for name, p in parameters.items()},
            parameter_bytes=pytrees.n_bytes(parameters),
            copy_bytes=pytrees.n_bytes([dict(cell.named_parameters()), dict(cell.named_buffers())]),
            x_bytes=pytrees.n_bytes(one.x),
            state_bytes=pytrees.n_bytes(h),
            output_bytes=pytrees.n_bytes(one.outputs),
            choice_bytes=pytrees.n_bytes(tuple(one.sparsity)),
            shared_bytes=pytrees.n_bytes(list({id(t): t for t in pytrees.tensors(tuple(one.sparsity))}.values())),
            replays=takes_replay(cell),
            choices=[step.sparsity for step in taken],
            forward_macs=macs,
            again_macs=_again_macs(one, rules),
            losses_everywhere=_backward_macs(probe, rules, everywhere=True),
            loss_at_the_end=_backward_macs(probe, rules, everywhere=False),
            graph_bytes=_graph_bytes(probe),
            lone=lone,
            linear=measure(cell, parameters, [_as_kept(s) for s in probe[:2]], probe[2].h, 2 * lone.forward, rules),
            steady=len(kinds) == 1,
        )


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

    def rows(leaf: Tensor) -> Tensor:
        return leaf.detach()[torch.arange(h.shape[0], device=leaf.device) % size].clone()

    x = pytrees.map_tensors(rows, x)
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


def _guarded(call: Callable[[], Any], x: Any, h: Tensor) -> Any:
    """Run the cell; what it does not take is said in the package's own words."""
    try:
        return call()
    except RTRLError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shapes = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in pytrees.tensors(x))
        raise ShapeError(
            f"the cell does not take this x ({shapes}) with a state {tuple(h.shape)} {h.dtype}: {error}"
        ) from error


def _steps(
    cell: nn.Module, values: ParameterSnapshot, xs: Sequence[Any], h: Tensor, rules: Mapping[str, Rule] | None
) -> tuple[list[ReplayedStep], list[int]]:
    """The steps of a stream, taken without a graph, and the multiply-adds of each."""
    names, replays = dict(cell.named_parameters()), takes_replay(cell)
    cut = torch.ones(h.shape[0], dtype=torch.bool, device=h.device)
    taken, macs = [], []
    for number, x in enumerate(xs):
        with torch.no_grad(), MacCounter(rules) as counter:
            y, h_next, sparsity = _guarded(partial(call_cell, values, x, h.clone(), None), x, h)
        checks.check_output(y, h, h_next, number)
        check_sparsity(sparsity, h, names)
        outputs = [leaf.detach() for leaf in pytrees.tensors(y) if leaf.is_floating_point()]
        taken.append(ReplayedStep(x, h, own_copy(sparsity), outputs, number, h_next, values, cut, replays))
        macs.append(counter.macs)
        h, cut = h_next, torch.zeros_like(cut)
    return taken, macs


def _repeated(
    cell: nn.Module, values: ParameterSnapshot, first: ReplayedStep, rules: Mapping[str, Rule] | None
) -> list[ReplayedStep]:
    """Three steps with the first one's x, with a loss at each."""
    steps, _ = _steps(cell, values, [first.x] * 3, first.h, rules)
    for step in steps:
        step.adjoints = [torch.ones_like(y) for y in step.outputs]
    return steps


def _as_kept(step: ReplayedStep) -> Kept:
    """The step as ``BlockRTRL`` keeps it, with the gradients of its losses."""
    outputs = [y.clone().requires_grad_() for y in step.outputs]
    for leaf, adjoint in zip(outputs, step.adjoints, strict=True):
        leaf.grad = adjoint
    return Kept(step.x, step.h, step.sparsity, outputs, step.number)


def _again_macs(step: ReplayedStep, rules: Mapping[str, Rule] | None) -> int:
    with MacCounter(rules) as counter:
        step.rerun(step.h)
    return counter.macs


def _backward_macs(steps: list[ReplayedStep], rules: Mapping[str, Rule] | None, everywhere: bool) -> Series:
    forward = _again_macs(steps[0], rules)
    found = []
    for number in range(len(steps)):
        run = [replace(step) for step in steps[: number + 1]]
        for earlier in run[:-1]:
            if not everywhere:
                earlier.adjoints = [None] * len(earlier.adjoints)
        with MacCounter(rules) as counter:
            unrolled_gradient(list(run))
        found.append(counter.macs - len(run) * forward)
    one, two, three = found
    return Series((one, two, three))


def _graph_bytes(steps: list[ReplayedStep]) -> Series:
    """What autograd keeps, and the outputs that a loss begins at, storage by storage."""
    ours = [[step.x, step.h, step.outputs, step.adjoints, step.replays and tuple(step.sparsity)] for step in steps]
    known = {t.untyped_storage().data_ptr() for t in pytrees.tensors([ours, steps[0].snapshot.tensors])}
    kept: list[Tensor] = []  # alive until all is counted, so that no address comes twice
    found = []
    h = steps[0].h

    def keep(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        for step in steps:
            pairs, h = step.rerun(h)
            kept += [y.detach() for y, _ in pairs]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
            found.append(sum(size for place, size in storages.items() if place not in known))
    one, two, three = found
    return Series((one, two, three))


def _lone(step: ReplayedStep, rules: Mapping[str, Rule] | None) -> Lone:
    theta = list(step.snapshot.trainable.values())
    h = step.h[:1].clone().requires_grad_()
    with MacCounter(rules) as forward:
        pairs, h_next = step.rerun(h, 0)
    from_output = from_entry = 0
    if pairs:
        ys, adjoints = zip(*pairs, strict=True)
        with MacCounter(rules) as counter:
            torch.autograd.grad(ys, [h, *theta], adjoints, retain_graph=True, materialize_grads=True)
        from_output = counter.macs
    if h_next.requires_grad:
        with torch.enable_grad():
            entry = h_next.flatten().unbind()[0]
        with MacCounter(rules) as counter:
            torch.autograd.grad(entry, [h, *theta], materialize_grads=True)
        from_entry = counter.macs
    return Lone(forward.macs, from_output, from_entry)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Leave PyTorch's random numbers as they were, whatever the cell does."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
