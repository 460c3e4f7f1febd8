"""A run of recorded steps → their row-sparse dynamics Jacobians, adjoints and taps, all in one batch.

Going forward needs no graph. Afterwards the cell is run once more on all the steps of a block as one batch of
``steps · B`` samples, with its choices replayed, and every derivative is taken in one batched backward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from rtrl import _guard, _rows, _tree
from rtrl._contract import StepKind, taps_that_mix
from rtrl.cells.protocol import OTHER_CHOICES, Sparsity, call_cell, same_choices, takes_replay
from rtrl.errors import CellError, NonFiniteError, SparsityError
from rtrl.general import jacobian_rows, weighted_jacobians
from rtrl.taps import Tap, TapRecorder


@dataclass(slots=True)
class Step:
    """What is kept of one step until its block closes.

    Attributes:
        x: the input, a tree of tensors (B, ...).
        h: (B, n, ...), the state that the step received.
        sparsity: what the cell declared, or was made to do.
        outputs: the floating-point tensors of y, as leaves whose ``.grad`` collects the gradient of the losses.
        number: the absolute number of the step, for messages.
    """

    x: Any
    h: Tensor
    sparsity: Sparsity
    outputs: list[Tensor]
    number: int


@dataclass(frozen=True, slots=True)
class LinearTap:
    """A ``Tap`` with its derivatives, over the m steps and B samples of a group.

    Attributes:
        tap: the use; its ``index`` and ``inputs`` have N = m·B samples, step-major.
        response: (m, B, w·width, K, L, O), ∂h_next[writes]/∂z.
        earned: (m·B, K, L, O), ∂ℓ/∂z through y; None if no loss reaches it.
    """

    tap: Tap
    response: Tensor
    earned: Tensor | None


@dataclass(frozen=True, slots=True)
class Linearization:
    """m steps of one kind, linearised at their own states and at the present parameters.

    Attributes:
        times: positions of the steps in their block, ascending.
        writes, cols: LongTensors (m, B, w) and (m, B, c), or None for all rows: the rows and columns of ``jacobian``.
        jacobian: (m, B, w·width, c·width), ∂h_next[writes]/∂h[cols].
        adjoint: (m, B, c·width), ∂ℓ/∂h[cols] through each step's own y.
        taps: the linear uses of parameters.
        active: for each sliced parameter, LongTensor (m, B, k).
        general: names of parameters with uses that are no taps.
        lossless: no loss was given at any of the steps.
        direct: their gradient through y, summed over steps and samples.
        pull: (m, B, w·width) weights on h_next[writes] → the general parameters' gradient outside taps.
        jacobians: (B, U, m, w·width) weights → the general parameters' weighted immediate Jacobians (B, U, *shape),
            all uses included.
    """

    times: list[int]
    writes: Tensor | None
    cols: Tensor | None
    jacobian: Tensor
    adjoint: Tensor
    taps: list[LinearTap]
    active: Mapping[str, Tensor]
    general: list[str]
    lossless: bool
    direct: dict[str, Tensor]
    pull: Callable[[Tensor], dict[str, Tensor]]
    jacobians: Callable[[Tensor], dict[str, Tensor]]


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
            groups.setdefault(_tree.signature((step.x, step.h, tuple(step.sparsity))), []).append(time)
        after = [step.h for step in steps[1:]] + [last]
        try:
            return [
                self._group(key, times, [steps[t] for t in times], [after[t] for t in times])
                for key, times in groups.items()
            ]
        except CheckpointError as error:
            raise CellError(
                "the cell checkpoints activations (torch.utils.checkpoint) around a parameter, and what it computes"
                " again there cannot be told apart; remove the checkpoint: no graph outlives a block anyway"
            ) from error

    def _group(self, key: tuple[Any, ...], times: list[int], steps: list[Step], after: list[Tensor]) -> Linearization:
        m, size = len(steps), steps[0].h.shape[0]
        batch = m * size
        x = _tree.concatenate([step.x for step in steps])
        h = torch.cat([step.h for step in steps]).requires_grad_()
        sparsity: Sparsity = _tree.concatenate([step.sparsity for step in steps])
        replay = sparsity if self._replays else None
        n, width = h.shape[1], h[0, 0].numel()

        if (*key, m) not in self._verified:
            kind = StepKind(x, h.detach(), replay, sparsity, steps[0].number)
            self._general |= taps_that_mix(self._cell, self._parameters, kind, self._general)
            self._verified.add((*key, m))
        y, h_next, recorder = self._run(x, h, replay, sparsity, batch, steps)
        outputs = [leaf for leaf in _tree.tensors(y) if leaf.is_floating_point()]
        self._same(h_next, outputs, after, steps)
        written = _rows.take(h_next.reshape(batch, n, width), sparsity.writes).flatten(1)
        # What autograd's graph still leads to has a use that is no tap.
        reached = _guard.reached_leaves(written, *outputs)
        general = [name for name, p in self._parameters.items() if id(p) in reached]

        inputs = [h, *(tap.output for tap in recorder.taps)]
        grads = jacobian_rows(written, inputs)
        jacobian = grads[0].reshape(written.shape[1], batch, n, width)
        cols = None
        if sparsity.reads is not None and sparsity.writes is not None:
            cols = _rows.members(_rows.union(sparsity.reads, sparsity.writes, n))
        self._only_declared(jacobian, sparsity, steps)
        if cols is not None:
            jacobian = jacobian.gather(2, cols[None, :, :, None].expand(jacobian.shape[0], -1, -1, width))

        earned, direct, adjoint = self._earn(steps, outputs, inputs, general)
        adjoint = adjoint.reshape(batch, n, width)
        if cols is not None:
            if int(adjoint.count_nonzero()) > int(_rows.take(adjoint, cols).count_nonzero()):
                raise SparsityError(
                    f"{self._steps(steps)}: y depends on rows of the state outside the declared reads and writes"
                )
            adjoint = _rows.take(adjoint, cols)

        taps = []
        for tap, response, own in zip(recorder.taps, grads[1:], earned, strict=True):
            k, length, o = tap.shape
            shaped = response.reshape(written.shape[1], m, size, k, length, o).permute(1, 2, 0, 3, 4, 5)
            taps.append(LinearTap(tap, shaped, None if own is None else own.reshape(batch, k, length, o)))
        self._finite(steps, jacobian.movedim(0, 1), adjoint, taps)
        self._only_written(h, h_next, sparsity.writes, inputs, steps)  # once NaN cannot be taken for a dependence

        def by_step(index: Tensor | None) -> Tensor | None:
            return None if index is None else index.reshape(m, size, index.shape[1])

        def pull(weights: Tensor) -> dict[str, Tensor]:
            values = torch.autograd.grad(
                written,
                [self._parameters[g] for g in general],
                weights.reshape(batch, weights.shape[2]),
                allow_unused=True,
                retain_graph=True,
            )
            return {name: value for name, value in zip(general, values, strict=True) if value is not None}

        return Linearization(
            times=times,
            writes=by_step(sparsity.writes),
            cols=by_step(cols),
            jacobian=jacobian.permute(1, 0, 2, 3).reshape(m, size, jacobian.shape[0], jacobian.shape[2] * width),
            adjoint=adjoint.reshape(m, size, adjoint.shape[1] * width),
            taps=taps,
            active={
                name: index.reshape(m, size, index.shape[1])
                for name, index in sparsity.active.items()
                if name in self._parameters
            },
            general=general,
            lossless=all(leaf.grad is None for step in steps for leaf in step.outputs),
            direct=direct,
            pull=pull if general and written.requires_grad else lambda weights: {},
            jacobians=lambda weights: weighted_jacobians(
                self._cell, general, weights, x, h.detach(), replay, sparsity.writes
            ),
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
        expected = [torch.cat(after), *(torch.cat(own) for own in zip(*(s.outputs for s in steps), strict=True))]
        for what, value, wanted in zip(
            ("state", *["output"] * len(outputs)), (h_next, *outputs), expected, strict=True
        ):
            if not _guard.nearly_equal(value.detach(), wanted.detach()):
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
        outside = ~_rows.mask(writes, h.shape[1]).reshape(*h.shape[:2], *[1] * (h.ndim - 2))
        change = torch.where(outside, h_next - h, 0.0)
        targets = [*inputs, *self._parameters.values()]

        def moves(weights: Tensor) -> bool:
            grads = torch.autograd.grad(change, targets, weights, retain_graph=True, allow_unused=True)
            return any(grad is not None and bool(grad.count_nonzero()) for grad in grads)

        weights = torch.linspace(1.0, 2.0, change.numel(), dtype=h.dtype, device=h.device).reshape(change.shape)
        if not moves(weights):
            return
        for sample, row in outside.reshape(*h.shape[:2]).nonzero().tolist():  # which one? only on the way to an error
            alone = torch.zeros_like(weights)
            alone[sample, row] = weights[sample, row]
            if moves(alone):
                size = steps[0].h.shape[0]
                raise SparsityError(
                    f"step {steps[sample // size].number}: row {row} of the state of sample {sample % size} is not "
                    "declared as written, yet it depends on more than its own last value (which did not change)"
                )

    def _only_declared(self, jacobian: Tensor, sparsity: Sparsity, steps: list[Step]) -> None:
        """Refuse a Jacobian (rows, N, n, width) with an entry in a column that is neither read nor written."""
        inside = _rows.union(sparsity.reads, sparsity.writes, jacobian.shape[2])
        if inside is None:
            return
        stray = (jacobian != 0).any(dim=3).any(dim=0) & ~inside
        if bool(stray.any()):
            sample, row = (int(i) for i in stray.nonzero()[0])
            step, size = steps[sample // steps[0].h.shape[0]].number, steps[0].h.shape[0]
            raise SparsityError(
                f"step {step}: the written rows of sample {sample % size} depend on row {row} of the state, which it "
                "declares "
                "neither as read nor as written"
            )

    def _earn(
        self, steps: list[Step], outputs: list[Tensor], inputs: list[Tensor], general: list[str]
    ) -> tuple[list[Tensor | None], dict[str, Tensor], Tensor]:
        """What the losses earn through y: at every tap, directly at general parameters, and the adjoint at h."""
        nothing: list[Tensor | None] = [None] * (len(inputs) - 1)
        if all(leaf.grad is None for step in steps for leaf in step.outputs):
            return nothing, {}, torch.zeros_like(inputs[0])
        heads, weights = [], []
        for place, head in enumerate(outputs):
            given = [step.outputs[place].grad for step in steps]
            if not head.requires_grad or all(g is None for g in given):
                continue
            heads.append(head)
            weights.append(
                torch.cat(
                    [
                        torch.zeros_like(step.outputs[place]) if g is None else g
                        for step, g in zip(steps, given, strict=True)
                    ]
                )
            )
        if not heads:
            return nothing, {}, torch.zeros_like(inputs[0])
        targets = [*inputs, *(self._parameters[g] for g in general)]
        grads = list(torch.autograd.grad(heads, targets, weights, retain_graph=True, allow_unused=True))
        adjoint = torch.zeros_like(inputs[0]) if grads[0] is None else grads[0]
        direct = {name: grad for name, grad in zip(general, grads[len(inputs) :], strict=True) if grad is not None}
        for name, grad in direct.items():
            if not _tree.finite(grad):
                raise NonFiniteError(f"{self._steps(steps)}: NaN or infinity in the gradient of parameter {name!r}")
        return [*grads[1 : len(inputs)]], direct, adjoint

    def _finite(self, steps: list[Step], jacobian: Tensor, adjoint: Tensor, taps: list[LinearTap]) -> None:
        checks = [("the dynamics Jacobian", jacobian), ("the adjoint", adjoint)]
        for tap in taps:
            checks.append((f"the immediate Jacobian of parameter {tap.tap.name!r}", tap.response.flatten(0, 1)))
            if tap.earned is not None:
                checks.append((f"the gradient of parameter {tap.tap.name!r}", tap.earned))
        size = steps[0].h.shape[0]
        for what, values in checks:
            if not _tree.finite(values):
                good = torch.isfinite(values)
                sample = int((~good.flatten(1).all(dim=1)).nonzero()[0])
                raise NonFiniteError(
                    f"NaN or infinity in {what}, step {steps[sample // size].number}, sample {sample % size}"
                )

    @staticmethod
    def _steps(steps: list[Step]) -> str:
        return f"step {steps[0].number}" if len(steps) == 1 else f"steps {steps[0].number} … {steps[-1].number}"
