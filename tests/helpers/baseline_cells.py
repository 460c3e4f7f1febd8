"""The learners beside ``BlockRTRL``, a run of any learner along a stream, and cells whose dynamics Jacobian has a form
that can be read off."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.running import gradients, trainable
from helpers.toy_cells import Leaky, Ring
from rtrl.learners import BPTT, RFLO, TBPTT, UORO, DenseRTRL, DiagonalRTRL, SnAp

__all__ = ["BASELINES", "F64", "Leaky", "Loss", "Ring", "delivered", "differ", "normal", "squares"]

F64 = torch.float64
Loss = Callable[[int, Any], Tensor | None]

# ``make(cell, batch_size)``, for ``pytest.mark.parametrize``
BASELINES = [
    pytest.param(BPTT, id="bptt"),
    pytest.param(functools.partial(TBPTT, horizon=3), id="sliding"),
    pytest.param(functools.partial(TBPTT, horizon=3, sliding=False), id="chunked"),
    pytest.param(DenseRTRL, id="dense"),
    pytest.param(functools.partial(SnAp, order=1), id="snap"),
    pytest.param(functools.partial(RFLO, leak=0.5), id="rflo"),
    pytest.param(DiagonalRTRL, id="diagonal"),
    pytest.param(lambda *a, **k: UORO(*a, generator=torch.Generator().manual_seed(0), **k), id="uoro"),
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def squares(t: int, y: Tensor) -> Tensor:
    """A loss at every step that no symmetry makes zero."""
    return (y - 0.1 * t).square().sum() + y.sum()


def delivered(learner: Any, xs: Sequence[Tensor], loss: Loss, syncs: frozenset[int] = frozenset()) -> dict[str, Tensor]:
    """Run a learner along a stream, and return the sum of the gradients that it delivers."""
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
