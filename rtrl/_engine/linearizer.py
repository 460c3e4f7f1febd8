"""A run of recorded steps → their row-sparse dynamics Jacobians, adjoints and taps, all in one batch.

Going forward needs no graph. Afterwards the cell is run once more on all the steps of a block as one batch of
``steps · B`` samples, with its choices replayed, and every derivative is taken in one batched backward pass.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from rtrl._engine import checks
from rtrl._engine.analytic import check_analytic_step, jacobian, taps_of
from rtrl._engine.contract import StepKind, taps_mixing_samples
from rtrl._engine.linearization import Linearization, LinearTap, Step, joined
from rtrl._engine.output_jacobian import DenseOutputJacobian
from rtrl._engine.taps import TapRecorder
from rtrl._engine.untapped import jacobian_rows, weighted_jacobians
from rtrl._utils import index_sets, pytrees
from rtrl.cells.analytic import HasAnalyticStep
from rtrl.cells.protocol import OTHER_CHOICES, Sparsity, call_cell, same_choices, takes_replay
from rtrl.errors import CellError, NonFiniteError, SparsityError

# A block is linearised piece by piece: of so many steps at least, and so many numbers in the rows of their Jacobians.
_LEAST_SPAN = 16
_SPAN_NUMBERS = 2**23


class Linearizer:
    """Linearises recorded steps of one cell; remembers only what it has verified about the cell.

    Args:
        cell: the cell.
        parameters: name → trainable parameter.
    """

    def __init__(self, cell: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._cell, self._parameters = cell, dict(parameters)
        self._replays = takes_replay(cell)
        self._general: set[str] = set()  # parameters some tap of which was found to mix samples
        self._verified: set[tuple[Any, ...]] = set()
        self._knows = isinstance(cell, HasAnalyticStep)
        if not self._knows and callable(getattr(cell, "linearize", None)):
            warnings.warn(
                f"{type(cell).__name__}.linearize is not used: the method is called analytic_step now",
                DeprecationWarning,
                stacklevel=4,
            )
        self._held_against: set[tuple[Any, ...]] = set()

    def __call__(self, steps: Sequence[Step], last: Tensor) -> list[Linearization]:
        """Linearise the steps of a block; steps that differ in shape or in the width of their sparsity form groups of
        their own.

        Args:
            steps: the steps in order. last: (B, n, ...), the state after the last of them.

        Raises:
            CellError: run as one batch, the cell computes something else than it did step by step, or it mixes samples.
            SparsityError: the cell reads rows or uses slices that it did not declare.
            NonFiniteError: NaN or infinity in a Jacobian or in a loss's gradient.

        Cost: one forward pass and ``w·width`` batched backward passes over ``steps · B`` samples a group.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for time, step in enumerate(steps):
            groups.setdefault(_kind(step), []).append(time)
        after = [step.h for step in steps[1:]] + [last]
        found: list[Linearization] = []
        try:
            for key, times in groups.items():
                # An analytic step has no graph to be kept small.
                closed = self._knows and _dense(steps[times[0]].sparsity)
                span = len(times) if closed else self._span(steps[times[0]])
                pieces = [
                    self._group(key, own, [steps[t] for t in own], [after[t] for t in own])
                    for own in (times[start : start + span] for start in range(0, len(times), span))
                ]
                found.extend(joined(pieces))
        except CheckpointError as error:
            raise CellError(
                "the cell checkpoints activations (torch.utils.checkpoint) around a parameter, and what it computes"
                " again there cannot be told apart; remove the checkpoint: no graph outlives a block anyway"
            ) from error
        return found

    @staticmethod
    def _span(step: Step) -> int:
        """How many steps are linearised at a time, so that their graph stays small beside what is kept of them."""
        writes = step.h.shape[1] if step.sparsity.writes is None else step.sparsity.writes.shape[1]
        rows = writes * step.h[0, 0].numel()
        return max(_LEAST_SPAN, _SPAN_NUMBERS // max(1, rows * step.h.numel()))

    def _group(self, key: tuple[Any, ...], times: list[int], steps: list[Step], after: list[Tensor]) -> Linearization:
        m, size = len(steps), steps[0].h.shape[0]
        batch = m * size
        x = pytrees.interleave([step.x for step in steps])
        h = pytrees.interleave([step.h for step in steps])
        dense = _dense(steps[0].sparsity)
        sparsity = Sparsity() if dense else pytrees.interleave([step.sparsity for step in steps])
        replay = sparsity if self._replays else None
        n, width = h.shape[1], h[0, 0].numel()

        if (*key, m) not in self._verified:
            kind = StepKind(x, h.detach(), replay, sparsity, steps[0].number)
            self._general |= taps_mixing_samples(self._cell, self._parameters, kind, self._general)
            self._verified.add((*key, m))
        h = h.requires_grad_()
        if self._knows and dense:
            if (*key, m) not in self._held_against:
                check_analytic_step(self._cell, self._parameters, x, h, steps[0].number)
                self._held_against.add((*key, m))
            closed = self._closed(times, steps, after, x, h)
            if closed is not None:
                return closed
        y, h_next, recorder = self._run(x, h, replay, sparsity, batch, steps)
        outputs = [leaf for leaf in pytrees.tensors(y) if leaf.is_floating_point()]
        self._same(h_next, outputs, after, steps)
        written = index_sets.gather(h_next.reshape(batch, n, width), sparsity.writes).flatten(1)
        # What autograd's graph still leads to has a use that is no tap.
        inside, outside = (checks.reached_leaves(*heads) for heads in ((written,), outputs))
        general, direct_too = (
            [name for name, p in self._parameters.items() if id(p) in leaves] for leaves in (inside, inside | outside)
        )

        ends = {id(tap.output): tap.output for tap in recorder.taps}  # a weight and its bias share theirs
        inputs = [h, *ends.values()]
        grads = jacobian_rows(written, inputs)
        jacobian = grads[0].reshape(written.shape[1], batch, n, width)
        cols = None
        if sparsity.reads is not None and sparsity.writes is not None:
            cols = index_sets.mask_to_indices(index_sets.union(sparsity.reads, sparsity.writes, n))
        self._only_declared(jacobian, sparsity, steps)
        if cols is not None:
            jacobian = jacobian.gather(2, cols[None, :, :, None].expand(jacobian.shape[0], -1, -1, width))

        earned, direct, adjoint = self._earn(steps, outputs, inputs, direct_too)
        if adjoint is not None:
            adjoint = adjoint.reshape(batch, n, width)
            if cols is not None:
                if int(adjoint.count_nonzero()) > int(index_sets.gather(adjoint, cols).count_nonzero()):
                    raise SparsityError(
                        f"{self._steps(steps)}: y depends on rows of the state outside the declared reads and writes"
                    )
                adjoint = index_sets.gather(adjoint, cols)
            adjoint = adjoint.reshape(size, m, -1)

        derived: dict[int, tuple[DenseOutputJacobian, Tensor | None]] = {}
        for tap in recorder.taps:
            place = list(ends).index(id(tap.output))
            if id(tap.output) not in derived:
                response = DenseOutputJacobian(grads[1 + place].reshape(written.shape[1], batch, *tap.shape))
                own = earned[place]
                derived[id(tap.output)] = response, None if own is None else own.reshape(batch, *tap.shape)
        taps = [LinearTap(tap, *derived[id(tap.output)]) for tap in recorder.taps]
        self._finite(steps, jacobian.movedim(0, 1), adjoint, taps)
        self._only_written(h, h_next, sparsity.writes, inputs, steps)  # once NaN cannot be taken for a dependence

        def by_step(index: Tensor | None) -> Tensor | None:
            return None if index is None else index.reshape(size, m, index.shape[1])

        jacobian = jacobian.permute(1, 0, 2, 3).reshape(size, m, jacobian.shape[0], jacobian.shape[2] * width)
        return Linearization(
            times=times,
            writes=by_step(sparsity.writes),
            cols=by_step(cols),
            jacobian=lambda start, stop: jacobian[:, start:stop],
            adjoint=adjoint,
            adjoint_next=None,
            taps=taps,
            active={
                name: index.reshape(size, m, index.shape[1])
                for name, index in sparsity.active.items()
                if name in self._parameters
            },
            general=general,
            lossless=all(leaf.grad is None for step in steps for leaf in step.outputs),
            direct=direct,
            jacobians=lambda weights: weighted_jacobians(
                self._cell, general, weights, x, h.detach(), replay, sparsity.writes
            ),
        )

    def _closed(
        self, times: list[int], steps: list[Step], after: list[Tensor], x: Any, h: Tensor
    ) -> Linearization | None:
        """The same from the cell's own derivatives, if it has them for these steps."""
        m, size = len(steps), steps[0].h.shape[0]
        recorder = TapRecorder(self._parameters, m * size, self._general, copy=True)
        with torch.enable_grad(), recorder:
            form = self._cell.analytic_step(x, h)  # type: ignore[operator]
        names = {id(p): name for name, p in self._parameters.items()}
        if form is None or any(not isinstance(tap.weight, nn.Parameter) for tap in form.taps):
            return None  # a weight that is computed from others cannot be told apart here
        outputs = [leaf for leaf in pytrees.tensors(form.y) if leaf.is_floating_point()]
        self._same(form.h_next, outputs, after, steps)
        reached = checks.reached_leaves(*outputs)
        ends = {id(tap.output): tap.output for tap in recorder.taps}
        inputs = [h, form.h_next, *ends.values()]
        general = [name for name, p in self._parameters.items() if id(p) in reached]
        earned, direct, adjoint = self._earn(steps, outputs, inputs, general)
        taps = taps_of(form, names)
        for tap in recorder.taps:
            own = earned[1 + list(ends).index(id(tap.output))]
            taps.append(LinearTap(tap, None, None if own is None else own.reshape(m * size, *tap.shape)))
        parts = [t.detach() for t in (form.direct, *(tap.response for tap in form.taps)) if t is not None]
        for what, values in (
            ("the dynamics Jacobian", parts),
            ("the adjoint", [t for t in (adjoint, earned[0]) if t is not None]),
            ("the gradient of a parameter of y", [tap.earned for tap in taps if tap.earned is not None]),
        ):
            for value in values:
                self._refuse_infinite(what, value, steps)

        def jacobian_of(start: int, stop: int) -> Tensor:
            if size == 1 or stop - start == m:
                places: Tensor | slice = slice(start * size, stop * size)
            else:
                places = torch.arange(size * m, device=h.device).view(size, m)[:, start:stop].flatten()
            written_out: Tensor = jacobian(form, places).unflatten(0, (size, stop - start))
            return written_out

        def by_step(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.reshape(size, m, -1)

        return Linearization(
            times=times,
            writes=None,
            cols=None,
            jacobian=jacobian_of,
            adjoint=by_step(adjoint),
            adjoint_next=by_step(earned[0]),
            taps=taps,
            active={},
            general=[],
            lossless=all(leaf.grad is None for step in steps for leaf in step.outputs),
            direct=direct,
            jacobians=lambda weights: {},
        )

    def _run(
        self, x: Any, h: Tensor, replay: Sparsity | None, sparsity: Sparsity, batch: int, steps: list[Step]
    ) -> tuple[Any, Tensor, TapRecorder]:
        for copy in (False, True):
            recorder = TapRecorder(self._parameters, batch, self._general, copy=copy)
            with torch.enable_grad(), recorder:
                y, h_next, again = call_cell(self._cell, x, h, replay)
            if not recorder.changed_in_place:
                break
        if not same_choices(again, sparsity):
            raise CellError(f"{self._steps(steps)}: {OTHER_CHOICES}")
        return y, h_next, recorder

    def _same(self, h_next: Tensor, outputs: list[Tensor], after: list[Tensor], steps: list[Step]) -> None:
        expected = [pytrees.interleave(own) for own in (after, *zip(*(s.outputs for s in steps), strict=True))]
        for what, value, wanted in zip(
            ("state", *["output"] * len(outputs)), (h_next, *outputs), expected, strict=True
        ):
            if not checks.nearly_equal(value.detach(), wanted.detach()):
                raise CellError(
                    f"{self._steps(steps)}: run once more as one batch, the cell does not reach the {what} it "
                    "reached step "
                    "by step. Either it is no pure function of (x, h, parameters), its samples are not independent, "
                    "or its "
                    "parameters were changed behind autograd's back inside an open block (call sync() first)"
                )

    def _only_written(
        self, h: Tensor, h_next: Tensor, writes: Tensor | None, inputs: list[Tensor], steps: list[Step]
    ) -> None:
        """Refuse a row that is copied by value only: its derivative must be that of a copy, too."""
        if writes is None:
            return
        outside = ~index_sets.mask(writes, h.shape[1]).reshape(*h.shape[:2], *[1] * (h.ndim - 2))
        change = torch.where(outside, h_next - h, 0.0)
        targets = [*inputs, *self._parameters.values()]

        def moves(weights: Tensor) -> bool:
            grads = torch.autograd.grad(change, targets, weights, retain_graph=True, allow_unused=True)
            return any(grad is not None and bool(grad.count_nonzero()) for grad in grads)

        weights = torch.linspace(1.0, 2.0, change.numel(), dtype=h.dtype, device=h.device).reshape(change.shape)
        if not moves(weights):
            return
        for place, row in outside.reshape(*h.shape[:2]).nonzero().tolist():  # which one? only on the way to an error
            alone = torch.zeros_like(weights)
            alone[place, row] = weights[place, row]
            if moves(alone):
                sample, time = divmod(place, len(steps))
                raise SparsityError(
                    f"step {steps[time].number}: row {row} of the state of sample {sample} is not "
                    "declared as written, yet it depends on more than its own last value (which did not change)"
                )

    def _only_declared(self, jacobian: Tensor, sparsity: Sparsity, steps: list[Step]) -> None:
        """Refuse a Jacobian (rows, N, n, width) with an entry in a column that is neither read nor written."""
        inside = index_sets.union(sparsity.reads, sparsity.writes, jacobian.shape[2])
        if inside is None:
            return
        stray = (jacobian != 0).any(dim=3).any(dim=0) & ~inside
        if bool(stray.any()):
            time, sample = self._first(stray.any(dim=1), steps)
            row = int(stray[sample * len(steps) + time].nonzero()[0])
            raise SparsityError(
                f"step {steps[time].number}: the written rows of sample {sample} depend on row {row} of the state, "
                "which it "
                "declares "
                "neither as read nor as written"
            )

    def _earn(
        self, steps: list[Step], outputs: list[Tensor], inputs: list[Tensor], general: list[str]
    ) -> tuple[list[Tensor | None], dict[str, Tensor], Tensor | None]:
        """What the losses earn through y: at every tap, directly at general parameters, and the adjoint at h."""
        nothing: list[Tensor | None] = [None] * (len(inputs) - 1)
        if all(leaf.grad is None for step in steps for leaf in step.outputs):
            return nothing, {}, None
        heads, weights = [], []
        for place, head in enumerate(outputs):
            given = [step.outputs[place].grad for step in steps]
            if all(g is None for g in given):
                continue
            weight = pytrees.interleave(
                [
                    torch.zeros_like(step.outputs[place]) if g is None else g
                    for step, g in zip(steps, given, strict=True)
                ]
            )
            if not checks.finite(weight):  # which step?
                for step, g in zip(steps, given, strict=True):
                    if g is not None:
                        checks.check_finite("the gradient of the loss at y", g, step.number)
            if head.requires_grad:
                heads.append(head)
                weights.append(weight)
        if not heads:
            return nothing, {}, None
        targets = [*inputs, *(self._parameters[g] for g in general)]
        grads = list(torch.autograd.grad(heads, targets, weights, retain_graph=True, allow_unused=True))
        direct = {name: grad for name, grad in zip(general, grads[len(inputs) :], strict=True) if grad is not None}
        for name, grad in direct.items():
            if not checks.finite(grad):
                raise NonFiniteError(f"{self._steps(steps)}: NaN or infinity in the gradient of parameter {name!r}")
        return [*grads[1 : len(inputs)]], direct, grads[0]

    def _finite(self, steps: list[Step], jacobian: Tensor, adjoint: Tensor | None, taps: list[LinearTap]) -> None:
        """Refuse NaN and infinity, in tensors with the N samples in front."""
        parts = [("the dynamics Jacobian", jacobian)]
        if adjoint is not None:
            parts.append(("the adjoint", adjoint.flatten(0, 1)))
        for tap in taps:
            if isinstance(tap.response, DenseOutputJacobian):
                parts.append(
                    (f"the immediate Jacobian of parameter {tap.tap.name!r}", tap.response.values.movedim(1, 0))
                )
            if tap.earned is not None:
                parts.append((f"the gradient of parameter {tap.tap.name!r}", tap.earned))
        for what, values in parts:
            self._refuse_infinite(what, values, steps)

    def _refuse_infinite(self, what: str, values: Tensor, steps: list[Step]) -> None:
        if not checks.finite(values):
            time, sample = self._first(~torch.isfinite(values).flatten(1).all(dim=1), steps)
            raise NonFiniteError(f"NaN or infinity in {what}, step {steps[time].number}, sample {sample}")

    @staticmethod
    def _first(bad: Tensor, steps: list[Step]) -> tuple[int, int]:
        """The earliest of the steps, and there the first sample, at which one of the N samples is bad."""
        time, sample = (int(i) for i in bad.reshape(-1, len(steps)).T.nonzero()[0])
        return time, sample

    @staticmethod
    def _steps(steps: list[Step]) -> str:
        return f"step {steps[0].number}" if len(steps) == 1 else f"steps {steps[0].number} … {steps[-1].number}"


def _kind(step: Step) -> tuple[Any, ...]:
    """What two steps must share to be run as one batch."""
    x, sparsity = step.x, step.sparsity
    plain = (x.shape, x.dtype) if isinstance(x, Tensor) else pytrees.signature(x)
    return (plain, step.h.shape, step.h.dtype, None if _dense(sparsity) else pytrees.signature(tuple(sparsity)))


def _dense(sparsity: Sparsity) -> bool:
    """Whether a step says nothing of what it touches, so that it may be everything."""
    return sparsity.reads is None and sparsity.writes is None and not sparsity.active
