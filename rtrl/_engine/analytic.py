"""The derivatives of a batch of steps from the cell's own ``analytic_step`` (``rtrl.cells.analytic``)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl._engine import checks, contract
from rtrl._engine.linearization import Linearization, LinearizedTap, UnitwiseOutputJacobian
from rtrl._engine.losses import loss_cotangents
from rtrl._engine.mixing import normal_like, perturb
from rtrl._engine.recorded import StepBatch
from rtrl._engine.taps import Tap, TapRecorder
from rtrl._engine.unitwise import StateUse, UnitwiseStateJacobian
from rtrl._utils import pytrees
from rtrl._utils.functional_call import Substitution, functional_call
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.analytic import AnalyticStep, UnitTap
from rtrl.errors import CellError


class AnalyticLinearization:
    """A batch of dense steps, run again by ``analytic_step``; y and its readout are left to autograd.

    Uses of parameters in y are recorded as taps, except of those named ``untapped``.

    Attributes:
        step: the step and its derivatives; None if the cell has none for this batch, so that autograd is left.
    """

    def __init__(
        self, cell: nn.Module, parameters: Mapping[str, nn.Parameter], batch: StepBatch, untapped: Iterable[str]
    ) -> None:
        self.parameters, self.batch = parameters, batch
        self.recorder = TapRecorder(parameters, batch.h.shape[0], untapped, copy=True)
        with torch.enable_grad(), self.recorder:
            self.step = _step_of(cell, batch.x, batch.h)

    def linearize(self) -> Linearization:
        """Take all derivatives.

        Raises:
            CellError: the cell computes something else than it did step by step.
            NonFiniteError: NaN or infinity in a derivative.

        Cost: one backward pass of y for the losses.
        """
        assert self.step is not None
        batch, step = self.batch, self.step
        outputs = [leaf for leaf in pytrees.tensors(step.y) if is_continuous(leaf)]
        contract.check_same_result(batch, step.h_next, outputs)
        through_y = checks.reached_leaves(*outputs)
        (adjoint, adjoint_next, *grad_outputs), gradients = loss_cotangents(
            batch,
            outputs,
            [batch.h, step.h_next, *(taps[0].output for taps in self.recorder.by_output)],
            {name: p for name, p in self.parameters.items() if id(p) in through_y},
        )
        taps = self._taps(step, grad_outputs)
        parts = [value.detach() for value in (step.direct, *(tap.response for tap in step.taps)) if value is not None]
        adjoints = [value for value in (adjoint, adjoint_next) if value is not None]
        grads = [(tap.name, tap.grad_output) for tap in taps if tap.grad_output is not None]
        contract.check_finite_samples(
            batch,
            [
                *(("the dynamics Jacobian", value) for value in parts),
                *(("the adjoint", value) for value in adjoints),
                *((f"the gradient of parameter {name!r}", value) for name, value in grads),
            ],
        )
        jacobian = _state_jacobian(step)
        size = batch.batch_size
        return Linearization(
            times=batch.times,
            written=None,
            touched=None,
            state_jacobian=lambda start, stop: jacobian.of_steps(start, stop, size),
            adjoint=None if adjoint is None else batch.by_step(adjoint.flatten(1)),
            adjoint_next=None if adjoint_next is None else batch.by_step(adjoint_next.flatten(1)),
            taps=taps,
            active={},
            untapped=[],
            has_losses=batch.has_losses,
            gradients=gradients,
            untapped_jacobians=lambda cotangents: {},
        )

    def _taps(self, step: AnalyticStep, grad_outputs: list[Tensor | None]) -> list[LinearizedTap]:
        """The linear maps of the step, and those recorded in its readout."""
        names = {id(p): name for name, p in self.parameters.items()}
        linearized: list[LinearizedTap] = []
        jacobians: dict[int, UnitwiseOutputJacobian] = {}
        for tap in step.taps:
            jacobian = jacobians.setdefault(id(tap.response), UnitwiseOutputJacobian(tap.response))
            shape = (1, 1, tap.weight.shape[0])
            inputs = tap.inputs.detach()[:, None, None]
            for parameter, right in ((tap.weight, inputs), (tap.bias, None)):
                if parameter is not None and id(parameter) in names:
                    use = Tap(names[id(parameter)], None, right, step.h_next, shape)
                    linearized.append(LinearizedTap(use, jacobian, None))
        for taps, grad in zip(self.recorder.by_output, grad_outputs, strict=True):
            grad_output = None if grad is None else grad.reshape(self.batch.h.shape[0], *taps[0].shape)
            linearized += [LinearizedTap(tap, None, grad_output) for tap in taps]
        return linearized


def _state_jacobian(step: AnalyticStep) -> UnitwiseStateJacobian:
    u = step.h_next.shape[-1]
    uses = [
        StateUse(tap.response, tap.weight.detach().view(-1, u, u), tap.part)
        for tap in step.taps
        if tap.part is not None
    ]
    return UnitwiseStateJacobian(step.h_next.detach(), (step.h_next[0].numel() // u, u), uses, step.direct)


def written_out(step: AnalyticStep) -> Tensor:
    """``∂h'/∂h`` of all samples, every entry written out: (N, S·U, S·U), in few launches.

    Cost: ``N·S·G·U²`` multiplications for each linear map of the state.
    """
    taps = [tap for tap in step.taps if tap.part is not None]
    if step.h_next.ndim > 2 or len(taps) != 1:
        return _state_jacobian(step).written_out(slice(None))
    return _of_one_map(taps[0], step.direct)


def _of_one_map(tap: UnitTap, direct: Tensor | None) -> Tensor:
    """``∂h'/∂h`` of all samples (E, U, U), for a state of one part and one linear map of it, in few launches."""
    size, _, gates, units = tap.response.shape
    if gates == 1:
        jacobian = tap.response.view(size, units, 1) * tap.weight
    else:
        jacobian = (tap.response.view(size, gates, units, 1) * tap.weight.view(gates, units, units)).sum(dim=1)
    if direct is not None:
        jacobian.diagonal(dim1=1, dim2=2).add_(direct.view(size, units))
    return jacobian


def check_analytic_step(
    cell: nn.Module, parameters: Mapping[str, nn.Parameter], x: Any, h: Tensor, number: int
) -> None:
    """Compare a cell's ``analytic_step`` with autograd at a perturbed point, along a random direction.

    Raises:
        CellError: they disagree; with the step's number.

    Cost: two forward passes and two backward passes.
    """
    generator = torch.Generator().manual_seed(1)  # not the user's, whose random numbers stay as they are
    named = dict(cell.named_parameters())
    theta = {name: perturb(p, generator).requires_grad_(name in parameters) for name, p in named.items()}
    substitution = Substitution({id(p): theta[name] for name, p in named.items()})
    h = perturb(h, generator).requires_grad_()
    y, h_next = functional_call(cell, theta, (x, h))[:2]
    with substitution:
        step = _step_of(cell, x, h)
    if step is None:
        return
    outputs, analytic_outputs = ([t for t in pytrees.tensors(tree) if is_continuous(t)] for tree in (y, step.y))
    pairs = [("the next state", step.h_next, h_next)]
    pairs += [("y", a, b) for a, b in zip(analytic_outputs, outputs, strict=False)]
    for what, analytic, value in pairs:
        if not checks.nearly_equal(analytic.detach(), value.detach()):
            raise CellError(f"step {number}: analytic_step computes another value of {what} than the cell itself")

    weights = [normal_like(t, generator) for t in (h_next, *outputs)]
    names = [name for name in theta if name in parameters]
    targets = [h, *(theta[name] for name in names)]
    expected = _grads([h_next, *outputs], targets, weights)
    at_next, *through_y = _grads(analytic_outputs, [step.h_next, *targets], weights[1:])
    with substitution:
        first_order = _first_order(step, h)
    through_state = _grads([first_order], targets, [weights[0] + at_next])
    grads = [a + b for a, b in zip(through_y, through_state, strict=True)]
    for name, grad, reference in zip(["the state", *map(repr, names)], grads, expected, strict=True):
        if not checks.nearly_equal(grad.flatten()[None], reference.flatten()[None]):
            raise CellError(
                f"step {number}: analytic_step gives another derivative with respect to {name} than autograd does"
            )


def _step_of(cell: nn.Module, x: Any, h: Tensor) -> AnalyticStep | None:
    """The cell's analytic step; None if it has none, or if a weight or bias is computed from parameters: it cannot be
    named."""
    step: AnalyticStep | None = cell.analytic_step(x, h)  # type: ignore[operator]
    used = () if step is None else [t for tap in step.taps for t in (tap.weight, tap.bias) if t is not None]
    return step if all(isinstance(t, nn.Parameter) for t in used) else None


def _grads(heads: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of weighted heads at the inputs; zeros where no head depends on one."""
    pairs = [(head, weight) for head, weight in zip(heads, weights, strict=False) if head.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    heads, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(heads, inputs, weights, allow_unused=True, materialize_grads=True)


def _first_order(step: AnalyticStep, h: Tensor) -> Tensor:
    """A function of h and the parameters, of the next state's shape, with the derivatives that the step states."""
    parts = h.reshape(len(h), -1, step.h_next.shape[-1])
    out = torch.zeros_like(parts) if step.direct is None else torch.einsum("nsti,nti->nsi", step.direct, parts)
    for tap in step.taps:
        z = F.linear(tap.inputs.detach(), tap.weight, tap.bias)
        if tap.part is not None:
            z = z + F.linear(parts[:, tap.part], tap.weight.detach())
        out = out + torch.einsum("nsgi,ngi->nsi", tap.response.detach(), z.unflatten(1, (-1, parts.shape[2])))
    return out.view(step.h_next.shape)
