"""What one would run in the place of ``rtrl``, written with some care to be fast: textbook RTRL and backpropagation
through time in PyTorch; and the rate of a plain matrix product, which nothing here can exceed.

Each side has ``advance(steps)``, a loss at every step, and ``gradients()``, the sum over all steps so far. ``Ours`` is
the learner behind the same two.
"""

from typing import Any

import torch
from problems import Problem
from torch import Tensor

import rtrl


class Ours:
    """``rtrl.BlockRTRL``, every gradient delivered at the end of every block."""

    def __init__(self, problem: Problem, **options: Any) -> None:
        self.problem, self.cell, self.t = problem, problem.own_cell(), 0
        self.learner = rtrl.BlockRTRL(self.cell, problem.xs.shape[1], **options)

    def advance(self, steps: int) -> int:
        for _ in range(steps):
            y = self.learner.step(self.problem.x(self.t))
            self.learner.backward(self.problem.loss(self.t, y))
            self.t += 1
            if self.learner.at_block_end:
                self.learner.sync()
        return steps

    def gradients(self) -> dict[str, Tensor]:
        self.learner.sync()
        return {name: p.grad.clone() for name, p in self.cell.named_parameters() if p.grad is not None}


class Sequences(Ours):
    """The same by ``unroll``: all steps of a block at once, one loss for all."""

    def advance(self, steps: int) -> int:
        stop = self.t + steps
        while self.t < stop:
            times = torch.arange(self.t, min(self.t + self.learner.block, stop)) % len(self.problem.xs)
            ys = self.learner.unroll(self.problem.xs[times])
            self.learner.backward((ys - self.problem.targets[times]).square().sum())
            self.learner.sync()
            self.t += len(times)
        return steps


class Unrolled:
    """Eager backpropagation through time, cut off after every ``chunk`` steps: exact over a stream no longer than
    that."""

    def __init__(self, problem: Problem, chunk: int) -> None:
        self.problem, self.cell, self.chunk, self.t = problem, problem.own_cell(), chunk, 0
        self.h = self.cell.init_state(problem.xs.shape[1])  # type: ignore[operator]

    def advance(self, steps: int) -> int:
        total: Tensor | None = None
        for _ in range(steps):
            y, self.h = self.cell(self.problem.x(self.t), self.h)[:2]
            loss = self.problem.loss(self.t, y)
            total = loss if total is None else total + loss
            self.t += 1
            if self.t % self.chunk == 0:
                total.backward()
                self.h, total = self.h.detach(), None
        assert total is None, "the steps must end at the end of a chunk"
        return steps

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.cell.named_parameters() if p.grad is not None}


class Textbook:
    """RTRL as in the textbook, ``S ← J S + B`` with all parameters dense, for one sample.

    J and B are the rows of one batched backward pass of the step; the product is added into B where it lies, so that
    no third matrix of that size is needed. Bytes held: two times H·P numbers.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.xs.shape[1] == 1
        self.problem, self.cell, self.t = problem, problem.own_cell(), 0
        self.parameters = dict(self.cell.named_parameters())
        self.h: Tensor = self.cell.init_state(1)  # type: ignore[operator]
        self.influence = {name: p.new_zeros(self.h.numel(), p.numel()) for name, p in self.parameters.items()}
        self.accumulated = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def advance(self, steps: int) -> int:
        for _ in range(steps):
            dynamics, immediate = self.linearise()
            self.move(dynamics, immediate)
        return steps

    def linearise(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step forward, accumulate the gradient of its loss, and return J (H, H) and B, name → (H, p)."""
        h = self.h.requires_grad_()
        leaves = [h, *self.parameters.values()]
        y, h_next = self.cell(self.problem.x(self.t), h)[:2]
        loss = self.problem.loss(self.t, y)
        adjoint, *direct = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        for (name, influence), now in zip(self.influence.items(), direct, strict=True):
            self.accumulated[name] += now + (adjoint.flatten() @ influence).view_as(now)
        size = h.numel()
        basis = torch.eye(size, dtype=h.dtype).view(size, *h_next.shape)
        dynamics, *rows = torch.autograd.grad(h_next, leaves, basis, is_grads_batched=True, allow_unused=True)
        immediate = {
            name: torch.zeros_like(self.influence[name]) if row is None else row.reshape(size, -1)
            for name, row in zip(self.parameters, rows, strict=True)
        }
        self.h, self.t = h_next.detach(), self.t + 1
        return dynamics.view(size, size), immediate

    def move(self, dynamics: Tensor, immediate: dict[str, Tensor]) -> None:
        """``S ← J S + B``: exactly H²·P multiply-adds."""
        for name, product in immediate.items():
            self.influence[name] = product.addmm_(dynamics, self.influence[name])

    def gradients(self) -> dict[str, Tensor]:
        return dict(self.accumulated)


class Product:
    """``(n, k) @ (k, p)`` again and again, into memory that is there already; its unit is a multiply-add."""

    def __init__(self, n: int, k: int, p: int, dtype: torch.dtype = torch.float32) -> None:
        self.a, self.b = torch.randn(n, k, dtype=dtype), torch.randn(k, p, dtype=dtype)
        self.out = torch.empty(n, p, dtype=dtype)

    def advance(self, times: int) -> int:
        for _ in range(times):
            torch.mm(self.a, self.b, out=self.out)
        return times * self.a.numel() * self.b.shape[1]
