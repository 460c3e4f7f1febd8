"""Checks of what happens to a learner in its life: learned first states, frozen parameters, updates, copies."""

import copy
import warnings

import pytest
import torch
from helpers.running import gradients, run
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ParameterChangedError

FIRST = torch.tensor([True, False])


class _Learned(nn.Module):
    """A tanh cell with a learned first state."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.recurrent = nn.Parameter(normal(1, 2, 3)), nn.Parameter(normal(2, 3, 3))
        self.h0 = nn.Parameter(normal(3, 3))

    def init_state(self, batch_size: int) -> Tensor:
        return self.h0.expand(batch_size, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(x @ self.inward + h @ self.recurrent)
        return h_next + h, h_next


def _loss(t: int, y: Tensor) -> Tensor:
    return (y - 0.1 * t).square().sum()


def learned_first_states() -> None:
    """Across resets, two of them without a step in between."""
    cell, xs, resets = _Learned(), normal(4, 9, 2, 2), torch.zeros(9, 2, dtype=torch.bool)
    resets[4], resets[7] = FIRST, ~FIRST
    found = run(cell, xs, _loss, resets=resets, block=3)
    expected, influences = oracles.dense_rtrl(cell, xs, _loss, resets=resets, return_influence=True)
    assert_gradients_equal(found.gradients, expected)
    assert_influences_equal(found.influences, influences[-1])
    learner = rtrl.BlockRTRL(cell, 2)
    learner.step(xs[0])
    learner.reset(FIRST)
    learner.reset(~FIRST)
    assert torch.equal(learner.influence("h0"), torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def fused_updates() -> None:
    cell = _Learned()
    learner, optimizer = rtrl.BlockRTRL(cell, 2, block=3), torch.optim.SGD(cell.parameters(), lr=1e-9, fused=True)
    learner.backward(learner.step(normal(5, 2, 2)).sum())
    learner.sync()
    optimizer.step()
    learner.step(normal(5, 2, 2))
    learner.step(normal(5, 2, 2))
    optimizer.step()
    with pytest.raises(ParameterChangedError):
        learner.step(normal(5, 2, 2))


def gradients_that_no_optimizer_finds() -> None:
    cell = _Learned()
    learner, optimizer = rtrl.BlockRTRL(cell, 2), torch.optim.SGD(cell.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            learner.backward(learner.step(normal(5, 2, 2)).sum())
            optimizer.step()
            learner.sync()
            optimizer.zero_grad()
    assert len(caught) == 1


def frozen_parameters() -> None:
    cell = _Learned()
    learner = rtrl.BlockRTRL(cell, 2, block=2)
    for frozen in (True, False):
        for x in normal(6, 4, 2, 2):
            learner.backward(learner.step(x).sum())
        learner.sync()
        cell.recurrent.requires_grad_(not frozen)
    assert not bool(learner.influence("recurrent").any()) and bool(learner.influence("inward").any())


def gradients_at_inputs() -> None:
    """Of one block, with a loss at its end."""
    cell, xs = _Learned(), normal(7, 3, 2, 2).requires_grad_()
    learner, h, y = rtrl.BlockRTRL(cell, 2, block=3, input_grad="block"), cell.init_state(2), None
    for x in xs:
        y = learner.step(x)
    learner.backward(_loss(3, y))
    learner.sync()
    found, xs.grad = xs.grad, None
    for x in xs:
        y, h = cell(x, h)
    _loss(3, y).backward()  # type: ignore[arg-type, no-untyped-call]
    assert found is not None and xs.grad is not None
    assert_gradients_equal({"x": found}, {"x": xs.grad})


def copies() -> None:
    """Made inside an open block, with a loss."""
    learner = rtrl.BlockRTRL(_Learned(), 2, block=3)
    for t, x in enumerate(normal(8, 5, 2, 2)):
        learner.backward(_loss(t, learner.step(x)))
    other = copy.deepcopy(learner)
    learner.sync()
    other.sync()
    found, expected = gradients(other.cell), gradients(learner.cell)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


LIFECYCLE_CHECKS = {
    check.__name__: check
    for check in (
        learned_first_states,
        fused_updates,
        gradients_that_no_optimizer_finds,
        frozen_parameters,
        gradients_at_inputs,
        copies,
    )
}
