"""A block of one step of one sample, in a state of independent rows, where launches are all that counts.

With one step nothing has to be swept: ``C`` is the identity, ``λ`` is zero. Of each row and channel,

    S_next = J S + ∂h_next/∂z ⊗ u        gradient = ∂ℓ/∂θ through y + δ S

The general way (``row_linearizer``, ``row_block``) gives the same. The first steps of each kind and those that are
audited go that way, and what is computed here is compared with it; so does every step in which anything is unusual. The
probe of the structure stays at every step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.autograd.graph import _engine_run_backward

from rtrl._engine import deferred
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.row_block import RowBlockResult
from rtrl._engine.row_step_plan import Place, StepPlan, StepRun, form_of, plan_for, run_again
from rtrl._influence.rows import RowInfluence, RowTransition
from rtrl._influence.structure import Structure, by_channel, from_channels
from rtrl.cells.protocol import takes_replay


class RowTrial(NamedTuple):
    """A step that was processed here and is about to be processed in the general way.

    Attributes:
        plan: that of its kind.
        kind: of the step.
        gradients: found here.
        staged: parameter → group → the next influence found here.
        pairs: what else is found here, and in the general way.
    """

    plan: StepPlan
    kind: tuple[Any, ...]
    gradients: dict[str, Tensor]
    staged: dict[str, dict[int, Tensor]]
    pairs: list[tuple[Tensor, Tensor]]


class RowStep:
    """Processes single dense steps of one sample, in a state of independent rows.

    Args:
        cell: the cell.
        parameters: its trainable parameters, by name.

    Attributes:
        usable: whether nothing was found here that the general way does not give.
    """

    def __init__(self, cell: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._cell, self._parameters = cell, dict(parameters)
        self.usable = len({p.dtype for p in parameters.values()}) == 1 and not takes_replay(cell)
        self._plans: dict[tuple[Any, ...], StepPlan] = {}

    def takes(self, step: RecordedStep, structure: Structure) -> bool:
        """Whether steps of this kind were found to be processed here as in the general way."""
        plan = self._plans.get(self._kind(step)) if self.usable and step.dense else None
        return plan is not None and plan.structure is structure

    def process(
        self, step: RecordedStep, last: Tensor, influences: Mapping[str, RowInfluence]
    ) -> dict[str, Tensor] | None:
        """Stage what all influences become by a step, for ``commit``, and return the gradient of its losses.

        Args:
            step: the step, of a kind that is taken.
            last: (1, n, ...), the state after it.
            influences: of all parameters, by name.

        Returns:
            The gradient by parameter name; or None if the step must go the general way. Nothing has changed yet.

        Cost: w + 2 backward passes, and some launches for each parameter.
        """
        found = self._next(self._plans[self._kind(step)], step, last, influences)
        return None if found is None else found[1]

    @staticmethod
    def commit(influences: Mapping[str, RowInfluence]) -> None:
        """Take the influences that ``process`` staged."""
        for influence in influences.values():
            influence.commit()

    # ------------------------------------------------------------------ held against the general way

    def try_out(
        self,
        step: RecordedStep,
        last: Tensor,
        influences: Mapping[str, RowInfluence],
        result: RowBlockResult,
        skipped: Iterable[str],
        audited: bool,
    ) -> RowTrial | None:
        """Process a step that is about to be staged in the general way, if it is of a new kind or audited.

        Args:
            step: the step.
            last: (1, n, ...), the state after it.
            influences: of all parameters, by name.
            result: the step, processed in the general way.
            skipped: parameters whose uses are not recorded.
            audited: whether it was audited.

        Returns:
            What ``settle`` needs once the result has been added; None if there is nothing to compare.
        """
        kind = self._kind(step)
        if not self.usable or not kind or not step.dense or (self.takes(step, result.structure) and not audited):
            return None
        skipped = frozenset(skipped) | result.structure.untapped
        plan = plan_for(self._cell, self._parameters, step, result.structure, skipped)
        found = None if plan is None else self._next(plan, step, last, influences)
        if plan is None or found is None:
            return None
        pairs = list(zip(found[0], result.transition.own, strict=True))
        for name, influence in influences.items():
            right = influence.contract(result.transition.adjoint).sum(dim=0)
            pairs.append((found[1][name], right + result.gradient.get(name, 0.0)))
        staged = {n: {a: p.clone() for a, p in zip(i.parts, i.staged(), strict=True)} for n, i in influences.items()}
        return RowTrial(plan, kind, found[1], staged, pairs)

    def settle(self, trial: RowTrial, influences: Mapping[str, RowInfluence]) -> dict[str, Tensor] | None:
        """Compare a trial with its step, which has been added in the general way. If both are the same, the influences
        become those found here, so that it does not matter for what follows which steps were audited.

        Numbers are the same if they differ by no more than the square root of the dtype's rounding error of the largest
        one.

        Args:
            trial: what ``try_out`` returned.
            influences: of all parameters, by name.

        Returns:
            The gradient by parameter name, as ``process`` gives it; or None if they differ, and no step is taken from
            now on.
        """
        parts = [(p, influences[name].parts[a]) for name, staged in trial.staged.items() for a, p in staged.items()]
        for found, right in [*trial.pairs, *parts]:
            if found.numel():
                allowed = torch.finfo(right.dtype).eps ** 0.5 * right.abs().max()
                if not bool((found - right).abs().max() <= allowed):
                    self.usable, self._plans = False, {}
                    return None
        for found, right in parts:
            right.copy_(found)
        self._plans[trial.kind] = trial.plan
        return trial.gradients

    # ------------------------------------------------------------------ one step

    def _kind(self, step: RecordedStep) -> tuple[Any, ...]:
        """What steps have in common that are processed alike; nothing for a step that is never processed here."""
        x, h = step.x, step.h
        usual = type(x) is Tensor and len(h) == 1 and step.restarted is None and deferred.on_host(h)
        return (x.shape, x.dtype, step.has_loss) if usual else ()

    def _next(
        self, plan: StepPlan, step: RecordedStep, last: Tensor, influences: Mapping[str, RowInfluence]
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]] | None:
        """Stage the next influences, and return J of each group (1, n, w, w) and the gradients; None if anything is
        unusual."""
        grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(True)  # contexts cost several times as much
            run = run_again(self._cell, self._parameters, step, plan.skipped)
            if run is None or form_of(run) != plan.form or not _same(run, step, last):
                return None
            parts: list[Tensor] = []
            heads, inputs = (run.h_next,), tuple(run.inputs)
            for cotangent in plan.cotangents:  # ``torch.autograd.grad``, without its own argument checks
                pulled = _engine_run_backward(heads, (cotangent,), True, False, inputs, True, accumulate_grad=False)
                if not parts and tuple([value is not None for value in pulled]) != plan.reached:
                    return None
                parts += [value for value in pulled if value is not None]
            through_y = _through_y(run, step, inputs)
            torch._C._set_grad_enabled(False)
            values = _flatten_dense_tensors(parts).view(len(plan.cotangents), -1)
            groups = plan.structure.groups
            alone = plan.structure.split(values[:-1, : run.h.numel()])  # (w, n, width)
            own = [rows[: g.shape[1]].transpose(0, 1).unsqueeze(0) for rows, g in zip(alone, groups, strict=True)]
            transition = RowTransition(own, {}, [])
            for influence in influences.values():
                influence.stage(transition)
            for place in plan.places:
                self._add(influences[place.name], place, values[: place.width, place.columns], run)
            gradients = self._gradients(run, through_y, influences, plan.structure)
            numbers = list(gradients.values())
            for influence in influences.values():
                numbers += influence.staged()
            return (own, gradients) if _as_expected(plan, values, numbers) else None
        finally:
            torch._C._set_grad_enabled(grad)

    def _add(self, influence: RowInfluence, place: Place, values: Tensor, run: StepRun) -> None:
        """Add an immediate influence, from derivatives (width, …) of the rows' entries."""
        if place.use is None:
            reach = influence.reach
            channels = by_channel(values.view(place.width, *reach.shape), reach.shape, reach.orientation)
            influence.add_whole(place.group, channels.transpose(0, 1).unsqueeze(0))
            return
        tap = run.uses[place.use[0]][place.use[1]]
        left = values.view(place.width, *tap.shape[1:]).permute(1, 2, 0).unsqueeze(0)  # (1, L, O, width)
        if tap.factor is not None:
            left = left * tap.factor.unsqueeze(3)
        influence.add(place.group, left, None if tap.inputs is None else tap.inputs[:, 0])

    def _gradients(
        self,
        run: StepRun,
        through_y: Sequence[Tensor | None] | None,
        influences: Mapping[str, RowInfluence],
        structure: Structure,
    ) -> dict[str, Tensor]:
        """The gradients of the losses; zeros without one."""
        if through_y is None:
            return {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        adjoint, outputs, others = through_y[0], through_y[1 : len(run.uses) + 1], through_y[len(run.uses) + 1 :]
        gradients = {n: grad.clone() for n, grad in zip(self._parameters, others, strict=True) if grad is not None}

        def add(name: str, value: Tensor) -> None:
            gradients[name] = gradients[name] + value if name in gradients else value

        for taps, at_output in zip(run.uses, outputs, strict=True):
            if at_output is None:
                continue
            for tap in taps:
                weight, shape = at_output.reshape(tap.shape[1:]), self._parameters[tap.name].shape
                if tap.factor is not None:
                    weight = weight * tap.factor[0]
                if tap.inputs is None:
                    add(tap.name, weight.sum(dim=0).view(shape))
                else:
                    product = weight.mT @ tap.inputs[0, 0]
                    add(tap.name, from_channels(product, shape, "last" if tap.transposed else "first"))
        if adjoint is not None:
            groups = structure.split(adjoint.flatten(1))
            for name, influence in influences.items():
                if influence.parts:
                    add(name, influence.contract(groups)[0])
        for name, parameter in self._parameters.items():
            if name not in gradients:
                gradients[name] = torch.zeros_like(parameter)
        return gradients


def _same(run: StepRun, step: RecordedStep, last: Tensor) -> bool:
    """Whether the step, run again, reaches the same state and y."""
    if len(run.outputs) != len(step.outputs):
        return False
    for value, before in zip([run.h_next, *run.outputs], [last, *step.outputs], strict=True):
        if value.shape != before.shape or value.dtype != before.dtype:
            return False
        if not torch.equal(value, before):
            change = torch.dist(value.detach(), before.detach(), math.inf).item()
            if not change <= torch.finfo(value.dtype).eps ** 0.5:
                return False
    return True


def _through_y(run: StepRun, step: RecordedStep, inputs: tuple[Tensor, ...]) -> Sequence[Tensor | None] | None:
    """Pull the gradients of the losses at y back to the inputs; None without any."""
    heads, weights = [], []
    for output, grad in zip(run.outputs, step.grads, strict=True):
        if grad is not None and output.requires_grad:
            heads.append(output)
            weights.append(grad)
    if not heads:
        return None
    return _engine_run_backward(tuple(heads), tuple(weights), False, False, inputs, True, accumulate_grad=False)


def _as_expected(plan: StepPlan, values: Tensor, numbers: Sequence[Tensor]) -> bool:
    """Whether the probe, the last of the passes, is what the others say, and numbers are finite; read at once."""
    terms = plan.mix * values[:-1]
    if len(terms) == 1:
        total, size = terms[0], terms[0].abs()
    else:
        total, size = terms.sum(dim=0), terms.abs().sum(dim=0)
    error = torch.addcmul(values[-1], plan.weights, total, value=-1.0).abs_()
    largest = [part.amax() for part in (*error.split(plan.sizes), *size.split(plan.sizes))]
    sums = [part.sum() for part in numbers]  # not finite with NaN or infinity in it
    read = torch.stack([*largest, *sums]).tolist()
    count = len(plan.sizes)
    for of_error, of_size in zip(read[:count], read[count : 2 * count], strict=True):
        if not of_error <= plan.allowed * of_size:  # so it is with NaN
            return False
    return math.isfinite(sum(read))
