"""Cells whose dynamics Jacobian has a form that can be read off, and a walk of any learner along a stream."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from running import gradients, trainable
from torch import Tensor, nn

F64 = torch.float64
Loss = Callable[[int, Any], Tensor | None]


class Ring(nn.Module):
    """``tanh(W x + (U ∘ ring) h)``: entry i of the state sees itself and entry i − 1. What is masked is no weight."""

    ring: Tensor

    def __init__(self, d_in: int, hidden: int) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.empty(hidden, d_in))
        self.recurrent = nn.Parameter(torch.empty(hidden, hidden))
        self.register_buffer("ring", torch.eye(hidden) + torch.eye(hidden).roll(1, 0))

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.new_full((batch_size, self.inward.shape[0]), 0.3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(x @ self.inward.T + h @ (self.recurrent * self.ring).T)
        return torch.cat([h, h_next], dim=-1), h_next


class Leaky(nn.Module):
    """``a ∘ h + (1 − a) tanh(W x)``: the dynamics Jacobian is diag(a), and a is a parameter or the same constant for
    all."""

    def __init__(self, d_in: int, hidden: int, leak: float | None) -> None:
        super().__init__()
        self.inward = nn.Linear(d_in, hidden)
        self.rate = nn.Parameter(torch.empty(hidden)) if leak is None else None
        self.leak = leak

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.weight.new_zeros(batch_size, self.inward.out_features)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        keep = 1 - self.leak if self.rate is None else torch.sigmoid(self.rate)
        h_next = keep * h + (1 - keep) * torch.tanh(self.inward(x))
        return h + h_next, h_next


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
