"""A walk of any learner along a stream, and cells whose dynamics Jacobian has a form that can be read off."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.running import gradients, trainable
from helpers.toy_cells import Leaky, Ring

__all__ = ["F64", "Leaky", "Loss", "Ring", "differ", "earned", "normal", "squares"]

F64 = torch.float64
Loss = Callable[[int, Any], Tensor | None]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def squares(t: int, y: Tensor) -> Tensor:
    """A loss at every step that no symmetry makes zero."""
    return (y - 0.1 * t).square().sum() + y.sum()


def earned(learner: Any, xs: Sequence[Tensor], loss: Loss, syncs: frozenset[int] = frozenset()) -> dict[str, Tensor]:
    """Walk a learner along a stream; the sum of what it delivers."""
    for parameter in trainable(learner.cell).values():
        parameter.grad = None
    for t, x in enumerate(xs):
        y = learner.step(x)
        value = loss(t, y)
        if value is not None:
            learner.backward(value)
        if t in syncs:
            learner.sync()
    learner.sync()
    return gradients(learner.cell)


def differ(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two gradients are apart by much more than rounding, relative to their size."""
    size = max(float(value.abs().max()) for value in two.values())
    return max(float((one[name] - two[name]).abs().max()) for name in two) > 1e-4 * size
