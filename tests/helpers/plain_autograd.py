"""Gradients and influences by unrolling the cell itself, for inputs that do not stack into one tensor."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rtrl
from helpers.running import trainable
from helpers.tolerances import assert_gradients_equal, assert_influences_equal


def squares(y: Any) -> Tensor:
    """A smooth loss of everything in y."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(y) if leaf.is_floating_point()]
    return sum((leaf.square().sum() + leaf.sum() for leaf in leaves), start=torch.zeros((), dtype=torch.float64))


def unrolled(cell: nn.Module, xs: Sequence[Any], loss: Callable[[Any], Tensor], size: int) -> list[dict[str, Tensor]]:
    """The gradients of the summed loss, and the influences (B, H, P) of the last state."""
    parameters = trainable(cell)
    h, total = cell.init_state(size), torch.zeros((), dtype=torch.float64)  # type: ignore[operator]
    for x in xs:
        y, h = cell(x, h)[:2]
        total = total + loss(y)

    def pulled(head: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(head, list(parameters.values()), retain_graph=True, materialize_grads=True)

    rows = [[g.flatten() for g in pulled(entry)] for entry in h.reshape(-1)]
    influences = [torch.stack(columns).unflatten(0, (size, -1)) for columns in zip(*rows, strict=True)]
    return [dict(zip(parameters, values, strict=True)) for values in (pulled(total), influences)]


def assert_exact(
    cell: nn.Module,
    xs: Sequence[Any],
    size: int,
    *,
    block: int,
    loss: Callable[[Any], Tensor] = squares,
    **options: Any,
) -> None:
    """A BlockRTRL with a loss at every step has the gradients and influences of plain autograd."""
    cell.zero_grad()
    learner = rtrl.BlockRTRL(cell, size, block=block, **options)
    for x in xs:
        learner.backward(loss(learner.step(x)))
    learner.sync()
    gradients, influences = unrolled(cell, xs, loss, size)
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(cell).items()}
    assert_gradients_equal(found, gradients, may_be_zero=True)
    assert_influences_equal({name: learner.influence(name) for name in influences}, influences, may_be_zero=True)
