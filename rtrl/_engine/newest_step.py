"""Losses of the newest step, pulled back through the open block one by one: nothing is recorded, nothing changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, losses
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.untapped import pull_rows
from rtrl._utils import pytrees
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import as_real, is_continuous
from rtrl.cells.protocol import OTHER_CHOICES, call_cell, same_choices
from rtrl.errors import CellError, ConfigError, LossError


@dataclass(frozen=True, slots=True)
class SeparateLosses:
    """L losses of the newest step, at its y.

    Attributes:
        names: of the losses.
        cotangents: for each tensor of y, ``∂ℓ/∂y`` (L, *y.shape), of a complex one as pairs.
        direct: for each loss, name → ``∂ℓ/∂θ`` of the parameters that it depends on other than through y.
    """

    names: list[str]
    cotangents: list[Tensor]
    direct: list[dict[str, Tensor]]

    def by_sample(self) -> "list[Tensor]":
        """``cotangents`` with each sample's part alone, (L·B, *y.shape)."""
        size = self.cotangents[0].shape[1]
        alone = torch.eye(size, dtype=torch.bool, device=self.cotangents[0].device)
        return [
            torch.where(alone.reshape(size, size, *[1] * (at_y.ndim - 2)), at_y.unsqueeze(1), 0.0).flatten(0, 1)
            for at_y in self.cotangents
        ]


@dataclass(frozen=True, slots=True)
class PulledLosses:
    """R cotangents of the newest step's y, pulled back to the start of its block.

    Attributes:
        state: (R, B, H), the adjoints of the state at the block's start.
        parameters: name → (R, *shape), the gradients inside the block, of a complex one as pairs.
    """

    state: Tensor
    parameters: dict[str, Tensor]


def separate_losses(
    given: Any, steps: Sequence[RecordedStep], number: int, parameters: Mapping[str, Tensor]
) -> SeparateLosses:
    """Take the gradients of losses at the y of the newest step; their graphs are kept.

    Args:
        given: name → scalar.
        steps: the steps of the open block.
        number: that of the newest step, for messages.
        parameters: name → trainable parameter.

    Raises:
        ConfigError: ``given`` is not a dict of losses by name, or is empty.
        LossError: one of them is not a loss of the newest step alone.
        NonFiniteError: NaN or infinity in a loss, on a CPU.
    """
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise ConfigError('losses must be a dict of scalars by name, such as {"value": y.sum()}, with at least one')
    newest = steps[-1] if steps else None
    outputs = [] if newest is None else newest.leaves
    earlier = {id(leaf) for step in steps for leaf in step.leaves} - set(map(id, outputs))
    pulled = []
    direct: list[dict[str, Tensor]] = []
    for name, loss in given.items():
        try:
            reached = losses.check_loss(loss, outputs, [], number)
        except LossError as error:
            raise LossError(f"{name!r}: {error}") from error
        if any(id(leaf) in earlier or losses.is_closed(leaf) for leaf in reached):
            raise LossError(_of_an_earlier_step(name, number))
        found = {id(leaf) for leaf in reached}
        beside = {key: p for key, p in parameters.items() if id(p) in found}
        try:
            grads = torch.autograd.grad(loss, [*outputs, *beside.values()], retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise LossError(
                f"{name!r} could not be pulled back: {error}. If backward() has gone through its graph, call "
                "gradients() first"
            ) from error
        filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(outputs, grads, strict=False)]
        if newest is not None and newest.sequence is not None:
            if any(bool(grad[: newest.index].any()) for grad in filled):
                raise LossError(_of_an_earlier_step(name, number))
            filled = [grad[newest.index] for grad in filled]
        pulled.append(filled)
        at_parameters = zip(beside, grads[len(outputs) :], strict=True)
        direct.append({key: grad.detach() for key, grad in at_parameters if grad is not None})
    cotangents = [as_real(torch.stack(at_y).detach()) for at_y in zip(*pulled, strict=True)]
    return SeparateLosses(list(given), cotangents, direct)


def _of_an_earlier_step(name: str, number: int) -> str:
    return (
        f"{name!r} depends on the y of an earlier step, too; losses of the newest step, {number}, alone can be taken "
        "apart. Detach the other y"
    )


def pull_back(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    steps: Sequence[RecordedStep],
    last: Tensor,
    cotangents: Sequence[Tensor],
    takes_replay: bool,
) -> PulledLosses:
    """Run the steps of an open block again and pull cotangents of the newest y back to its start.

    Args:
        cell: the cell.
        parameters: its trainable parameters.
        steps: the steps, in order.
        last: (B, n, ...), the state that they reached.
        cotangents: for each tensor of the newest y, (R, *y.shape), of a complex one as pairs.
        takes_replay: whether the cell takes the choices to make as ``replay``.

    Raises:
        CellError: run again, the cell does something else than it did.

    Cost: one run of the steps with a graph, and R backward passes through it; many of these in one batch.
    """
    with torch.enable_grad():
        first = h = steps[0].h.detach().clone().requires_grad_()
        y: Any = None
        for step in steps:
            y, h, sparsity = call_cell(cell, step.x, step.continued(h), step.sparsity if takes_replay else None)
            if not same_choices(sparsity, step.sparsity):
                raise CellError(f"step {step.number}: {OTHER_CHOICES}")
        heads = [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]
        head = torch.cat([as_real(leaf).reshape(len(first), -1) for leaf in heads], dim=1)
    recorded = [last, *steps[-1].outputs]
    if len(recorded) != len(heads) + 1 or not all(map(_same, [h, *heads], recorded)):
        raise CellError(
            f"step {steps[-1].number}: run again, the cell gives another y or next state; it must be a pure function "
            "of (x, h, parameters)"
        )
    weights = torch.cat([weight.reshape(*weight.shape[:2], -1) for weight in cotangents], dim=2).to(head.dtype)
    inputs = [first, *parameters.values()]
    if len(weights) <= _FEW or not head.requires_grad:
        rows = [_pull(head, inputs, weight) for weight in weights]
        state, *gradients = [torch.stack(of_input) for of_input in zip(*rows, strict=True)]
    else:
        state, *gradients = pull_rows(head, inputs, weights)
    return PulledLosses(state.flatten(2), dict(zip(parameters, map(as_real, gradients), strict=True)))


_FEW = 8  # rows: up to this many backward passes take less time one by one than in a batch


def _pull(head: Tensor, inputs: Sequence[Tensor], weight: Tensor) -> Sequence[Tensor]:
    if not head.requires_grad:
        return [torch.zeros_like(value) for value in inputs]
    return torch.autograd.grad(head, inputs, weight, retain_graph=True, allow_unused=True, materialize_grads=True)


def _same(again: Tensor, recorded: Tensor) -> bool:
    again, recorded = again.detach(), recorded.detach()
    return torch.equal(again, recorded) or checks.nearly_equal(again, recorded)
