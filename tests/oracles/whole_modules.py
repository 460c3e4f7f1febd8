"""Small cells that only a call of the module itself, on its own parameters, differentiates correctly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cells import F64
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=F64))


class Cell(nn.Module):
    """h' = step(x, h) and y = h'; the first state is zero."""

    width = 1

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, self.width, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.step(x, h)
        return h, h

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError


class Held(Cell):
    """h' = a h + x; the step finds the parameter a in an attribute, a list, a dict or a closure."""

    def __init__(self, held: str = "attribute", value: float = 0.5) -> None:
        super().__init__()
        self.a = a = parameter(value)
        self.all, self.named, self.held = [a], {"a": a}, held
        self.find = lambda: a

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        a = {"attribute": self.a, "list": self.all[0], "dict": self.named["a"], "closure": self.find()}[self.held]
        return a * h + x


class Energy(Cell):
    """h' = h + x − dE/dh with E = ½ (w h)², the gradient being taken in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(1, 1, bias=False, dtype=F64)
        nn.init.constant_(self.w.weight, 0.5)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        z = h if h.requires_grad else h.clone().requires_grad_()
        (force,) = torch.autograd.grad(0.5 * self.w(z).square().sum(), z, create_graph=True)
        return h + x - force


class Embedded(Cell):
    """h' = 0.5 h + emb(0)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(1, 1, dtype=F64, **options)
        nn.init.ones_(self.emb.weight)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * h + self.emb(torch.zeros(len(x), dtype=torch.long))


class Wrapped(Cell):
    """One of PyTorch's cells, its parameters drawn from a seed or of the given constants."""

    def __init__(self, inner: nn.Module, width: int, constants: dict[str, float] | None = None) -> None:
        super().__init__()
        self.inner, self.width = inner, width
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in inner.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) if not constants else p)
                if constants:
                    p.fill_(constants[name])

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        after: Tensor = self.inner(x, h)
        return after


def pruned() -> Cell:
    inner = nn.RNNCell(1, 1, bias=False, nonlinearity="relu", dtype=F64)
    cell = Wrapped(inner, 1, {"weight_ih": 1.0, "weight_hh": 0.5})
    prune.identity(inner, "weight_hh")
    inner.weight_hh = torch.full((1, 1), 9.0, dtype=F64)  # stale until the hook before the next forward
    return cell


class LearnedStart(Cell):
    """h' = 0.5 h + x from a learned first state; a tanh of w h in its place where w is given."""

    def __init__(self, start: float = 1.0, w: float | None = None) -> None:
        super().__init__()
        self.h0 = parameter(start)
        self.w = None if w is None else parameter(w)

    def init_state(self, batch_size: int) -> Tensor:
        return self.h0.square().expand(batch_size, 1) if self.w is not None else self.h0.expand(batch_size, 1)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * h + x if self.w is None else torch.tanh(self.w * h + x)


class Clip(torch.autograd.Function):
    """The identity, whose backward pass clips."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-1, 1)


class Clipping(Cell):
    """h' = a clip(h) + x, by a function, or by a hook on a copy of the state or on the state itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = parameter(1.0), how

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        if self.how == "function":
            h = Clip.apply(h)
        elif h.requires_grad:
            h = h if self.how == "hook on the state" else h.clone()
            h.register_hook(lambda grad: grad.clamp(-1, 1))
        return self.a * h + x


class Functional(Held):
    """h' = h + x − dE/dh with E = ½ (a h)², by torch.func inside the forward."""

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        force = torch.func.grad(lambda z: 0.5 * (self.a * z).square().sum())(h)
        return h + x - force


class Noisy(Cell):
    """h' = a h + x, with a little noise."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.where, self.calls = parameter(0.5), where, 0

    def init_state(self, batch_size: int) -> Tensor:
        return torch.rand(batch_size, 1, dtype=F64) if self.where == "start" else super().init_state(batch_size)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        noise = {"start": 0.0, "step": torch.rand(()), "memory": 0.1 * self.calls}[self.where]
        return self.a * h + x + noise


def parametrized(kind: str) -> Cell:
    cell = Wrapped(nn.RNNCell(2, 3, dtype=F64), 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the first vectors of spectral_norm
        getattr(parametrizations, kind)(cell.inner, "weight_hh")
    return cell.eval()


# The cell, and the gradient of h₁ + h₂ + h₃ at x = 1 by one of its parameters.
BY_HAND: dict[str, tuple[Callable[[], Cell], str, float]] = {
    "in a list": (lambda: Held("list"), "a", 3.0),
    "in a dict": (lambda: Held("dict"), "a", 3.0),
    "in a closure": (lambda: Held("closure"), "a", 3.0),
    "a gradient in the forward": (Energy, "w.weight", -3.5),
    "torch.func in the forward": (Functional, "a", -3.5),
    "scaled by frequency": (lambda: Embedded(scale_grad_by_freq=True), "emb.weight", 4.25),
    "sparse gradients": (lambda: Embedded(sparse=True), "emb.weight", 4.25),
    "pruned": (pruned, "inner.weight_hh_orig", 3.0),
    "a learned first state": (LearnedStart, "h0", 0.875),
}
# Cells that three derivations are compared on, with parameters that move.
MOVING: dict[str, Callable[[], Cell]] = {
    "in a list": lambda: Held("list"),
    "in a closure": lambda: Held("closure"),
    "a gradient in the forward": Energy,
    "pruned": pruned,
    "a learned first state": lambda: LearnedStart(0.8, 0.7),
    **{kind: lambda kind=kind: parametrized(kind) for kind in ("weight_norm", "orthogonal", "spectral_norm")},
}
