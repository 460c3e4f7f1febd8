"""An update of the parameters after every step, by SGD: this package, backpropagation through one step, and exact RTRL
of an element-wise LSTM written by hand.

Each side has ``advance(steps)``. ``check_every_step`` holds its gradients to the oracle, at each step's parameters.
"""

from collections.abc import Callable
from functools import cache

import torch
from agreement import STEPS, small
from problems import Problem
from torch import Tensor

import oracles
import rtrl
from rtrl.testing import assert_gradients_equal

RATE = 1e-3


class EveryStep:
    """Take a step, compute the gradient of its loss, and change the parameters; subclasses say how."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.cell, self.t = problem, problem.own_cell(), 0
        self.optimizer = torch.optim.SGD(self.cell.parameters(), lr=RATE)

    def advance(self, steps: int) -> int:
        for _ in range(steps):
            self.differentiate()
            self.update()
        return steps

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.t += 1

    def differentiate(self) -> None:
        """Take a step and leave the gradient of its loss in ``.grad``."""
        raise NotImplementedError

    def state(self) -> Tensor:
        raise NotImplementedError


class Ours(EveryStep):
    """``rtrl.BlockRTRL`` in blocks of one step."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.learner = rtrl.BlockRTRL(self.cell, 1)

    def differentiate(self) -> None:
        y = self.learner.step(self.problem.x(self.t))
        self.learner.backward(self.problem.loss(self.t, y))
        self.learner.sync()

    def state(self) -> Tensor:
        return self.learner.state


class OneStepBPTT(EveryStep):
    """The gradient of each loss through its own step alone: TBPTT(1)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.h: Tensor = self.cell.init_state(1)  # type: ignore[operator]

    def differentiate(self) -> None:
        y, h = self.cell(self.problem.x(self.t), self.h)
        self.problem.loss(self.t, y).backward()
        self.h = h.detach()

    def state(self) -> Tensor:
        return self.h


class ElementwiseLSTMByHand(EveryStep):
    """Exact RTRL of an element-wise LSTM at O(P) a step, from the equations of Irie, Gopalakrishnan and Schmidhuber
    (2024): one number for each parameter element, ``E ← λ ⊙ E + s ⊗ u`` with ``λ = ∂c′/∂c``, for a batch of one."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        cell, n = self.cell, problem.hidden
        inputs = problem.xs.shape[-1]
        self.c = cell.init_state(1)[0]  # type: ignore[operator]
        like = cell.forget.weight  # type: ignore[union-attr]
        self.by_weight, self.by_bias, self.by_state = (
            like.new_zeros(shape) for shape in ((2, n, inputs), (2, n), (2, n))
        )
        self.learned = [  # what the influence is kept for, forget gate first
            [cell.forget.weight, cell.enter.weight],  # type: ignore[union-attr]
            [cell.forget.bias, cell.enter.bias],  # type: ignore[union-attr]
            [cell.forget_weight, cell.enter_weight],
        ]

    @torch.no_grad()
    def differentiate(self) -> None:
        cell, x, c = self.cell, self.problem.x(self.t)[0], self.c
        forget = torch.sigmoid(cell.forget(x) + cell.forget_weight * c)  # type: ignore[operator]
        enter = torch.tanh(cell.enter(x) + cell.enter_weight * c)  # type: ignore[operator]
        new = enter + forget * (c - enter)
        out = torch.sigmoid(cell.out(x) + cell.out_state(new))  # type: ignore[operator]
        y = (out * new).unsqueeze(0).requires_grad_()
        with torch.enable_grad():
            self.problem.loss(self.t, y).backward()
        by_y = y.grad[0]  # type: ignore[index]

        slopes = torch.stack([(c - enter) * forget * (1 - forget), (1 - forget) * (1 - enter * enter)])
        decay = forget + slopes[0] * cell.forget_weight + slopes[1] * cell.enter_weight
        self.by_weight.mul_(decay[:, None]).addcmul_(slopes[..., None], x)
        self.by_bias.mul_(decay).add_(slopes)
        self.by_state.mul_(decay).addcmul_(slopes, c)

        at_gate = by_y * new * out * (1 - out)
        adjoint = by_y * out + at_gate @ cell.out_state.weight  # type: ignore[union-attr, operator]
        cell.out.weight.grad = torch.outer(at_gate, x)  # type: ignore[union-attr]
        cell.out.bias.grad = at_gate  # type: ignore[union-attr]
        cell.out_state.weight.grad = torch.outer(at_gate, new)  # type: ignore[union-attr]
        influences = (self.by_weight * adjoint[:, None], self.by_bias * adjoint, self.by_state * adjoint)
        for parameters, gradient in zip(self.learned, influences, strict=True):
            parameters[0].grad, parameters[1].grad = gradient.unbind(0)
        self.c = new

    def state(self) -> Tensor:
        return self.c.unsqueeze(0)

    def held_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.c, self.by_weight, self.by_bias, self.by_state))


@cache
def check_every_step(make: Callable[[Problem], EveryStep], kind: str) -> None:
    """In float64 over a stream: an oracle in which step t has the parameters that it had here agrees.

    A side that backpropagates through one step is held to an oracle that begins each step with a constant state.
    """
    problem = small(kind)
    side = make(problem)
    first = {name: p.detach().clone() for name, p in side.cell.named_parameters()}
    found = {name: torch.zeros_like(p) for name, p in first.items()}
    expected, offsets = dict(found), []
    cut = isinstance(side, OneStepBPTT)
    for t in range(STEPS):
        offsets.append({name: p.detach() - first[name] for name, p in side.cell.named_parameters()})
        state = side.state()
        side.differentiate()
        for name, p in side.cell.named_parameters():
            found[name] = found[name] + (0 if p.grad is None else p.grad)
        side.update()
        if cut:
            one = oracles.bptt(
                problem.cell, problem.xs[t : t + 1], lambda _, y, t=t: problem.loss(t, y), state, offsets=offsets[-1:]
            )
            expected = {name: value + one[name] for name, value in expected.items()}
    if not cut:
        expected = oracles.bptt(problem.cell, problem.xs[:STEPS], problem.loss, offsets=offsets)
    assert float(max(offset.abs().max() for offset in offsets[-1].values())) > 1e-4, "nothing was learned"
    assert_gradients_equal(found, expected)
