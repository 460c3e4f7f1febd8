"""A block of one step of a dense cell that supplies its derivatives, where launches are all that counts.

With ``λ = ∂ℓ/∂h_next`` and ``δ = ∂ℓ/∂h`` through y, one product brings all influences up to date, and one more gives
the gradient of all parameters:

    S_next = J S + B        gradient = λ S_next + δ S + ∂ℓ/∂θ through y

The general way (``linearizer``, ``block``) gives the same. The first steps of each kind and those that are audited go
that way, and what is computed here is compared with it; so does every step in which anything is unusual.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from rtrl._engine import deferred
from rtrl._engine.analytic import written_out
from rtrl._engine.block import BlockResult
from rtrl._engine.recorded import RecordedStep
from rtrl._influence.joint import JointInfluence
from rtrl._influence.store import BUFFER_NUMBERS, ParameterInfluence
from rtrl._utils import pytrees
from rtrl.cells.analytic import AnalyticStep, HasAnalyticStep, UnitTap
from rtrl.cells.supported import runs_as_written


class _Target(NamedTuple):
    """Where the immediate influence through one linear map goes.

    Attributes:
        weight, bias: the parameters of the map.
        shape: of its response, (B, S, G, U).
        of_weight, of_bias: their entries (B, S, G, U, p) in either tensor of the joint influence, without B for one
            sample; None of one that is frozen.
    """

    weight: Tensor
    bias: Tensor | None
    shape: torch.Size
    of_weight: tuple[Tensor, Tensor] | None
    of_bias: tuple[Tensor, Tensor] | None

    def fits(self, tap: UnitTap) -> bool:
        """Whether this is the map."""
        return tap.weight is self.weight and tap.bias is self.bias and tap.response.shape == self.shape

    def add(self, response: Tensor, inputs: Tensor, where: int) -> None:
        """Add the immediate influence to one of the two tensors, for a response (B, S, G, U, 1)."""
        if self.of_weight is not None:
            of_weight = self.of_weight[where]
            many = of_weight.ndim == 5
            of_weight.addcmul_(response, inputs.view(len(inputs), 1, 1, 1, -1) if many else inputs)
        if self.of_bias is not None:
            self.of_bias[where].add_(response)


class _ThroughY(NamedTuple):
    """What the losses of a step give through its y.

    Attributes:
        adjoint_next: like the state, ``∂ℓ/∂h_next``; None if it is zero.
        adjoint: like the state, ``∂ℓ/∂h`` with h_next held fixed; None if it is zero.
        gradients: name → ``∂ℓ/∂θ`` with both held fixed.
        changes: how far each tensor of y is from what it was when the step was taken, where it is not the state.
    """

    adjoint_next: Tensor | None
    adjoint: Tensor | None
    gradients: Mapping[str, Tensor]
    changes: list[Tensor]


class Trial(NamedTuple):
    """A step that was processed here and is about to be processed in the general way.

    Attributes:
        kind: of the step.
        pairs: what is found here, and in the general way.
    """

    kind: tuple[Any, ...]
    pairs: list[tuple[Tensor, Tensor]]


class OneStep:
    """Processes single dense steps of a cell.

    Args:
        cell: the cell.
        parameters: its trainable parameters, by name.

    Attributes:
        usable: whether the cell supplies its derivatives, and nothing was found here that the general way does not
            give.
    """

    def __init__(self, cell: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._cell, self._parameters = cell, dict(parameters)
        self.usable = isinstance(cell, HasAnalyticStep) and not any(p.is_complex() for p in parameters.values())
        self._known: set[tuple[Any, ...]] = set()
        self._joint: JointInfluence | None = None
        self._targets: list[_Target] = []
        self._rounding = max(torch.finfo(parameter.dtype).eps for parameter in parameters.values()) ** 0.5

    @property
    def n_bytes(self) -> int:
        """Bytes held beside the influences."""
        return 0 if self._joint is None else self._joint.n_bytes

    def takes(self, step: RecordedStep) -> bool:
        """Whether steps of this kind were found to be processed here as in the general way."""
        return self.usable and self._kind(step) in self._known and runs_as_written(self._cell)

    def process(
        self, step: RecordedStep, last: Tensor, influences: Mapping[str, ParameterInfluence], now: int
    ) -> dict[str, Tensor] | None:
        """Compute what all influences become by a step, for ``commit``, and return the gradient of its losses.

        Args:
            step: the step, of a kind that is taken.
            last: (B, n, ...), the state after it.
            influences: of all parameters, by name.
            now: the number of blocks, this step included.

        Returns:
            The gradient by parameter name; or None if the step must go the general way. Nothing has changed yet.

        Cost: ``B·H²·P`` multiply-adds in one product, ``B·H·P`` in another, and some launches.
        """
        joint = self._joined(influences)
        if joint is None:
            return None
        joint.allocate(now - 1)
        found = self._next(joint, step, last)
        return None if found is None else self._by_name(found[1])

    def commit(self, now: int) -> None:
        """Take the influences that ``process`` computed, which are up to date with block ``now``."""
        assert self._joint is not None
        self._joint.swap(now)

    # ------------------------------------------------------------------ held against the general way

    def try_out(
        self,
        step: RecordedStep,
        last: Tensor,
        influences: Mapping[str, ParameterInfluence],
        now: int,
        result: BlockResult,
        audited: bool,
    ) -> Trial | None:
        """Process a step that is about to be added in the general way, if it is of a new kind or audited.

        Args:
            step: the step.
            last: (B, n, ...), the state after it.
            influences: of all parameters, by name.
            now: the number of blocks before it.
            result: the step, processed in the general way.
            audited: whether it was audited.

        Returns:
            What ``settle`` needs once the result has been added; None if there is nothing to compare.
        """
        kind = self._kind(step)
        if not self.usable or not kind or not step.dense or (kind in self._known and not audited):
            return None
        joint = self._joined(influences)
        if joint is None:
            return None
        joint.allocate(now)
        found = self._next(joint, step, last)
        if found is None:
            return None
        right = torch.einsum("bh,bhp->p", result.transition.adjoint, joint.values)
        for name, gradient in result.gradient.items():
            right[joint.columns[name]] += gradient.flatten()
        pairs = [(found[0], result.transition.jacobian), (found[1], right), (joint.next_values, joint.values)]
        return Trial(kind, pairs)

    def settle(self, trial: Trial, now: int) -> dict[str, Tensor] | None:
        """Compare a trial with its step, which has been added in the general way. If both are the same, the influences
        become those found here, so that it does not matter for what follows which steps were audited.

        Numbers are the same if they differ by no more than the square root of the dtype's rounding error of the largest
        one.

        Args:
            trial: what ``try_out`` returned.
            now: the number of blocks, this step included.

        Returns:
            The gradient by parameter name, as ``process`` gives it; or None if they differ, and no step is taken from
            now on.
        """
        joint = self._joint
        for found, right in trial.pairs:
            allowed = torch.finfo(right.dtype).eps ** 0.5 * right.abs().max()
            if joint is None or not bool((found - right).abs().max() <= allowed):
                self.usable, self._joint, self._targets = False, None, []
                return None
        assert joint is not None
        self._known.add(trial.kind)
        joint.swap(now)
        return self._by_name(trial.pairs[1][0])

    def state_dict(self) -> list[list[Any]]:
        """Return the kinds of steps that are known, as plain values."""
        return [[list(shape), str(dtype), has_loss] for shape, dtype, has_loss in self._known]

    def load_state_dict(self, saved: list[list[Any]]) -> None:
        """Restore what ``state_dict`` returned."""
        dtypes = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
        self._known = {(torch.Size(shape), dtypes[dtype], bool(has_loss)) for shape, dtype, has_loss in saved}

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut numbers (P,) into those of each parameter."""
        shaped = _unflatten_dense_tensors(flat, list(self._parameters.values()))
        return dict(zip(self._parameters, shaped, strict=True))

    def _joined(self, influences: Mapping[str, ParameterInfluence]) -> JointInfluence | None:
        """The influences as one tensor; None if they cannot be that, or if another such tensor would take much
        memory."""
        if self._joint is None or not self._joint.holds(influences):
            self._joint, self._targets = None, []
            held = influences.values()
            numbers = sum(influence.values.numel() for influence in held)
            if numbers <= BUFFER_NUMBERS and all(not i.sliced and len(i.values) == i.batch_size for i in held):
                self._joint = JointInfluence(influences)
        return self._joint

    # ------------------------------------------------------------------ one step

    def _kind(self, step: RecordedStep) -> tuple[Any, ...]:
        """What steps have in common that are processed alike; nothing for a step that is never processed here."""
        x = step.x
        return (x.shape, x.dtype, step.has_loss) if type(x) is Tensor and deferred.on_host(step.h) else ()

    def _next(self, joint: JointInfluence, step: RecordedStep, last: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute the next influences, and return J (B, H, H) and the gradient (P,); None if anything is unusual."""
        grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(True)  # contexts cost several times as much
            h = step.h.detach().requires_grad_()
            analytic: AnalyticStep | None = self._cell.analytic_step(step.x, h)  # type: ignore[operator]
            if analytic is None or not self._find_targets(joint, analytic.taps):
                return None
            adjoint_next, adjoint, gradients, changes = self._through_y(analytic, step, h)
            torch._C._set_grad_enabled(False)
            jacobian = written_out(analytic)
            following = joint.propagate(jacobian)
            known, where, response = None, 1 - joint.present, jacobian
            for tap, target in zip(analytic.taps, self._targets, strict=True):
                if tap.response is not known:
                    known = tap.response
                    response = known.view((*known.shape[known.shape[0] == 1 :], 1))
                target.add(response, tap.inputs, where)
            changes.append(torch.dist(analytic.h_next, last, math.inf))
            sums = [jacobian.sum()]
            if adjoint_next is not None:
                gradient = torch.mm(adjoint_next.reshape(1, -1), following).view(-1)
            else:
                gradient = following.new_zeros(following.shape[1])
                sums.append(following.sum())  # which no gradient shows
            if adjoint is not None:
                gradient += torch.mm(adjoint.reshape(1, -1), joint.flat).view(-1)
            for name, value in gradients.items():
                gradient[joint.columns[name]] += value.flatten()
            sums.append(gradient.sum())
            return (jacobian, gradient) if self._as_expected(changes, sums) else None
        finally:
            torch._C._set_grad_enabled(grad)

    def _through_y(self, analytic: AnalyticStep, step: RecordedStep, h: Tensor) -> _ThroughY:
        """Pull the gradients of the losses at y back."""
        if analytic.y is analytic.h_next:
            return _ThroughY(step.grads[0], None, {}, [])
        heads, weights, changes = [], [], []
        outputs = [leaf for leaf in pytrees.tensors(analytic.y) if leaf.is_floating_point()]
        for output, leaf, grad in zip(outputs, step.outputs, step.grads, strict=True):
            changes.append(torch.dist(output.detach(), leaf.detach(), math.inf))
            if grad is not None and output.requires_grad:
                heads.append(output)
                weights.append(grad)
        if not heads:
            return _ThroughY(None, None, {}, changes)
        targets = [analytic.h_next, h, *self._parameters.values()]
        at_next, at_state, *others = torch.autograd.grad(heads, targets, weights, allow_unused=True)
        gradients = {n: grad for n, grad in zip(self._parameters, others, strict=True) if grad is not None}
        return _ThroughY(at_next, at_state, gradients, changes)

    def _find_targets(self, joint: JointInfluence, taps: Sequence[UnitTap]) -> bool:
        """Find where the immediate influences through linear maps go, if it is not known; return whether there is a
        place for all."""
        if len(taps) == len(self._targets):
            for tap, target in zip(taps, self._targets, strict=True):
                if not target.fits(tap):
                    break
            else:
                return True
        self._targets = []
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for tap in taps:
            _, parts, gates, units = tap.response.shape
            views: list[tuple[Tensor, Tensor] | None] = []
            for used in (tap.weight, tap.bias):
                if used is not None and not isinstance(used, nn.Parameter):  # it was computed
                    return False
                name = names.get(id(used))
                views.append(None if name is None else joint.unit_blocks(name, parts, gates, units))
            self._targets.append(_Target(tap.weight, tap.bias, tap.response.shape, *views))
        return True

    def _as_expected(self, changes: Sequence[Tensor], sums: Sequence[Tensor]) -> bool:
        """Whether changes are no more than rounding errors, and sums are finite."""
        for change in changes:
            if not change.item() <= self._rounding:
                return False
        return math.isfinite(sum([total.item() for total in sums]))
