"""The derivatives of a batch of steps by autograd, from one run with a graph."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, contract
from rtrl._engine.linearization import DenseOutputJacobian, Linearization, LinearizedTap, OutputJacobian
from rtrl._engine.losses import loss_cotangents
from rtrl._engine.recorded import StepBatch
from rtrl._engine.taps import TapRecorder, record_taps
from rtrl._engine.unitwise import UnitwiseDerivatives, UnitwisePattern, unitwise_derivatives
from rtrl._engine.untapped import sample_jacobians, weighted_jacobians
from rtrl._utils import index_sets, pytrees
from rtrl._utils.real_pairs import as_real, is_continuous
from rtrl.cells.protocol import call_cell


class AutogradLinearization:
    """A batch of steps, whose h requires grad, run again with a graph.

    Uses of parameters are recorded as taps, except of those named ``untapped``.

    Args:
        pattern: how the units of the cell were found to interact; None if they may in any way.
        elementwise: see ``TapRecorder``.

    Raises:
        CellError: run as one batch, the cell computes something else than it did step by step.
    """

    def __init__(
        self,
        cell: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: StepBatch,
        untapped: Iterable[str],
        pattern: UnitwisePattern | None = None,
        elementwise: bool = False,
    ) -> None:
        self._elementwise = elementwise
        self.cell, self.parameters, self.batch, self.pattern = cell, parameters, batch, pattern
        y, self.h_next, self.recorder = self._run(untapped)
        self.outputs = [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]
        contract.check_same_result(batch, self.h_next, self.outputs)
        self.written = batch.written(self.h_next)
        # A parameter that the recorded uses were cut off from, and that is reached all the same, has other uses.
        through_state, through_y = (checks.reached_leaves(*heads) for heads in ((self.written,), self.outputs))
        self.untapped = [name for name, p in parameters.items() if id(p) in through_state]
        self.untapped_anywhere = {
            name: p for name, p in parameters.items() if id(p) in through_state or id(p) in through_y
        }

    def _run(self, untapped: Iterable[str]) -> tuple[Any, Tensor, TapRecorder]:
        batch = self.batch
        for copy in (False, True):
            with torch.enable_grad():
                (y, h_next, sparsity), recorder = record_taps(
                    lambda: call_cell(self.cell, batch.x, batch.h, batch.replay),
                    self.parameters,
                    batch.h.shape[0],
                    untapped,
                    copy=copy,
                    gated=self.pattern is not None,
                    elementwise=self._elementwise,
                )
            if not recorder.changed_in_place:
                break
        contract.check_same_choices(batch, sparsity)
        return y, h_next, recorder

    def linearize(self) -> Linearization:
        """Take all derivatives.

        Raises:
            SparsityError: a derivative lies outside the declared sparsity.
            NonFiniteError: NaN or infinity in a derivative.

        Cost: ``w·slot_size`` backward passes over the batch, batched, and one for the losses; a few in place of
            ``w·slot_size`` where the units interact in linear maps alone.
        """
        batch, cell, untapped, by_sample = self.batch, self.cell, self.untapped, self.recorder.inner_gradient
        touched = self._touched()
        inputs = [batch.h, *(taps[0].output for taps in self.recorder.by_output)]
        unitwise = self._unitwise()
        if unitwise is None:
            jacobian, *rows = sample_jacobians(self.written, inputs)
            states = self._state_jacobian(jacobian, touched)
            state_jacobian = _of_steps(batch.by_step(states))
            output_jacobians: Sequence[OutputJacobian | None] = self._output_jacobians(rows)
            named = [("the dynamics Jacobian", states)]
        else:
            output_jacobians, named = unitwise.output_jacobians, []
            state_jacobian = partial(unitwise.state_jacobian.of_steps, size=batch.batch_size)
        (adjoint, *grad_outputs), gradients = loss_cotangents(batch, self.outputs, inputs, self.untapped_anywhere)
        gradients = {name: as_real(gradient) for name, gradient in gradients.items()}
        adjoint = self._touched_adjoint(adjoint, touched)
        taps = self._taps(output_jacobians, grad_outputs)
        self._check_finite(named, adjoint, taps)
        # Only now: NaN would be taken for a dependence.
        contract.check_unwritten_rows(batch, self.h_next, [*inputs, *self.parameters.values()])
        x, h, replay, written = batch.x, batch.h.detach(), batch.replay, batch.sparsity.writes
        return Linearization(
            times=batch.times,
            written=None if written is None else batch.by_step(written),
            touched=None if touched is None else batch.by_step(touched),
            state_jacobian=state_jacobian,
            adjoint=None if adjoint is None else batch.by_step(adjoint),
            adjoint_next=None,
            taps=taps,
            active={
                name: batch.by_step(index) for name, index in batch.sparsity.active.items() if name in self.parameters
            },
            untapped=untapped,
            has_losses=batch.has_losses,
            gradients=gradients,
            untapped_jacobians=lambda weights: weighted_jacobians(
                cell, untapped, weights, x, h, replay, written, by_sample=by_sample
            ),
        )

    def _unitwise(self) -> UnitwiseDerivatives | None:
        """The derivatives of a cell whose units interact in linear maps alone, if they do so here."""
        if self.pattern is None:
            return None
        seed = self.batch.steps[0].number
        return unitwise_derivatives(self.written, self.batch.h, self.recorder, self.parameters, self.pattern, seed)

    def _touched(self) -> Tensor | None:
        """The slots that the steps read or write, (N, c); None for all."""
        reads, writes = self.batch.sparsity.reads, self.batch.sparsity.writes
        if reads is None or writes is None:
            return None
        return index_sets.mask_to_indices(index_sets.union(reads, writes, self.batch.h.shape[1]))

    def _state_jacobian(self, jacobian: Tensor | None, touched: Tensor | None) -> Tensor:
        """``∂h_next[written]/∂h`` (N, W, numbers of a state) → (N, W, c·slot_size)."""
        batch, rows = self.batch, self.written.shape[1]
        if jacobian is None:
            jacobian = batch.h.new_zeros(len(batch.h), rows, batch.h[0].numel())
        slots: Tensor = jacobian.unflatten(2, (batch.h.shape[1], batch.slot_size))
        contract.check_declared_columns(batch, slots)
        if touched is not None:
            slots = slots.gather(2, touched[:, None, :, None].expand(-1, rows, -1, batch.slot_size))
        return slots.flatten(2)

    def _touched_adjoint(self, adjoint: Tensor | None, touched: Tensor | None) -> Tensor | None:
        """``∂ℓ/∂h`` like h → (N, c·slot_size)."""
        if adjoint is None:
            return None
        slots = adjoint.reshape(*adjoint.shape[:2], self.batch.slot_size)
        if touched is not None:
            contract.check_declared_adjoint(self.batch, slots, touched)
            slots = index_sets.gather(slots, touched)
        return slots.flatten(1)

    def _output_jacobians(self, rows: list[Tensor | None]) -> list[DenseOutputJacobian | None]:
        """One for each recorded output, one for those that share their values and shape."""
        jacobians: dict[Any, DenseOutputJacobian | None] = {}
        for taps, values in zip(self.recorder.by_output, rows, strict=True):
            shape = taps[0].shape
            jacobian = None if values is None else DenseOutputJacobian(values.unflatten(2, shape))
            jacobians.setdefault((id(values), shape), jacobian)
        return [
            jacobians[id(values), taps[0].shape] for taps, values in zip(self.recorder.by_output, rows, strict=True)
        ]

    def _taps(
        self, output_jacobians: Sequence[OutputJacobian | None], grad_outputs: list[Tensor | None]
    ) -> list[LinearizedTap]:
        linearized = []
        for taps, jacobian, grad in zip(self.recorder.by_output, output_jacobians, grad_outputs, strict=True):
            grad_output = None if grad is None else grad.reshape(self.batch.h.shape[0], *taps[0].shape)
            linearized += [LinearizedTap(tap, jacobian, grad_output) for tap in taps]
        return linearized

    def _check_finite(self, named: list[tuple[str, Tensor]], adjoint: Tensor | None, taps: list[LinearizedTap]) -> None:
        if adjoint is not None:
            named.append(("the adjoint", adjoint))
        for tap in taps:
            if isinstance(tap.output_jacobian, DenseOutputJacobian):
                named.append((f"the immediate Jacobian of parameter {tap.name!r}", tap.output_jacobian.values))
            if tap.grad_output is not None:
                named.append((f"the gradient of parameter {tap.name!r}", tap.grad_output))
        contract.check_finite_samples(self.batch, named)


def _of_steps(values: Tensor) -> Callable[[int, int], Tensor]:
    """(B, m, ...) → a function that returns its steps from start to stop."""
    return lambda start, stop: values[:, start:stop]
