"""What a third party brings: textbook RTRL of its own, and three versions of it that are wrong in ways that are easy to
get wrong. Nothing of ``rtrl`` is used; the tests copy this file to a folder of its own."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class Textbook:
    """S ← J S + B, the adjoint meeting the S of the step's input state; for any cell, sparse or not."""

    def __init__(self, cell: Any, batch_size: int) -> None:
        self.cell, self.batch_size = cell, batch_size
        self.names = [name for name, p in cell.named_parameters() if p.requires_grad]
        self.theta = [p for p in cell.parameters() if p.requires_grad]
        self.h = cell.init_state(batch_size).detach()
        size, count = self.h[0].numel(), sum(p.numel() for p in self.theta)
        self.influence = [self.h.new_zeros(size, count) for _ in range(batch_size)]
        self.gradient = self.h.new_zeros(count)
        self.taken = 0

    def step(self, x: Any) -> Any:
        self.refuse_more_losses()
        self.h.requires_grad_()
        out = self.cell(x, self.h)
        self.y, self.h_next = out[0], out[1]
        self.used = self.entries(out[2].active) if len(out) == 3 else [1.0] * self.batch_size
        before = self.influence
        self.influence = [self.advanced(b, s) for b, s in enumerate(before)]
        self.met = self.met_by_the_adjoint(before, self.influence)
        self.before, self.h = self.h, self.h_next.detach()
        self.taken += 1
        return self.y

    def refuse_more_losses(self) -> None:
        """A loss that reaches the y of an earlier step is an error."""

        def refuse(gradient: torch.Tensor) -> None:
            raise ValueError("a loss may reach the y of the last step only")

        for leaf in tree_leaves(getattr(self, "y", None)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(refuse)

    def advanced(self, b: int, influence: torch.Tensor) -> torch.Tensor:
        dynamics, immediate = [], []
        for value in self.h_next[b].flatten():
            by_state, by_theta = self.pulled(value)
            dynamics.append(by_state[b])
            immediate.append(by_theta)
        return torch.stack(dynamics) @ influence + torch.stack(immediate)

    def pulled(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.h if self.h.requires_grad else self.before
        by_state, *by_theta = torch.autograd.grad(
            value, [before, *self.theta], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return by_state.flatten(1), torch.cat([g.flatten() for g in by_theta])

    def met_by_the_adjoint(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> list[torch.Tensor]:
        return before

    def backward(self, loss: torch.Tensor) -> None:
        adjoint, direct = self.pulled(loss)
        self.gradient = self.gradient + direct
        for b, influence in enumerate(self.met):
            self.gradient = self.gradient + adjoint[b] @ influence * self.counted(b)

    def counted(self, b: int) -> Any:
        return 1.0

    def entries(self, active: Any) -> list[torch.Tensor]:
        """Which entries of θ a sample uses."""
        found = []
        for b in range(self.batch_size):
            parts = []
            for name, p in zip(self.names, self.theta, strict=True):
                used = torch.ones_like(p)
                if name in active:
                    used = torch.zeros_like(p)
                    used[active[name][b]] = 1.0
                parts.append(used.flatten())
            found.append(torch.cat(parts))
        return found

    def sync(self) -> None:
        parts = self.gradient.split([p.numel() for p in self.theta])
        for p, part in zip(self.theta, parts, strict=True):
            p.grad = part.reshape(p.shape) if p.grad is None else p.grad + part.reshape(p.shape)
        self.gradient = torch.zeros_like(self.gradient)


class OffByOne(Textbook):
    """The influence advances before the adjoint meets it."""

    def met_by_the_adjoint(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> list[torch.Tensor]:
        return after


class CutAtBorders(Textbook):
    """The influence is dropped at the borders of blocks of five steps: truncated BPTT in disguise."""

    def step(self, x: Any) -> Any:
        if self.taken % 5 == 0:
            self.influence = [torch.zeros_like(s) for s in self.influence]
        return super().step(x)


class IgnoresDormantLosses(Textbook):
    """Losses at the dormant steps of an expert never reach it."""

    def counted(self, b: int) -> Any:
        return self.used[b]


def textbook(cell: Any, batch_size: int) -> Textbook:
    return Textbook(cell, batch_size)


def off_by_one(cell: Any, batch_size: int) -> Textbook:
    return OffByOne(cell, batch_size)


def cut_at_borders(cell: Any, batch_size: int) -> Textbook:
    return CutAtBorders(cell, batch_size)


def ignores_dormant_losses(cell: Any, batch_size: int) -> Textbook:
    return IgnoresDormantLosses(cell, batch_size)


def backpropagation(cell: Any, xs: torch.Tensor, loss_fn: Any) -> dict[str, torch.Tensor]:
    """The other form: one function of the whole stream."""
    h, total = cell.init_state(xs.shape[1]), torch.zeros((), dtype=xs.dtype)
    for t, x in enumerate(xs):
        y, h = cell(x, h)[:2]
        loss = loss_fn(t, y)
        total = total if loss is None else total + loss
    parameters = {name: p for name, p in cell.named_parameters() if p.requires_grad}
    if not total.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    found = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))
