"""Checks of what failures leave behind: half a delivery, half a block, memory that ran out, skipped steps."""

import warnings

import pytest
import torch
from helpers.running import gradients
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ConfigError, RTRLError

XS = normal(11, 6, 2, 2)


def _loss(t: int, y: Tensor) -> Tensor:
    return (y - 0.1 * t).square().sum() + y.sum()


def _along(learner: rtrl.BlockRTRL, start: int, stop: int) -> None:
    for t in range(start, stop):
        learner.backward(_loss(t, learner.step(XS[t])))


def half_a_delivery() -> None:
    """One of the parameters has a .grad that cannot be added to."""
    cell = seeded(PlainRNN(2, 3), 0)
    learner = rtrl.BlockRTRL(cell, 2, block=2)
    for p in cell.parameters():
        p.grad = torch.zeros_like(p)
    last = list(cell.parameters())[-1]
    last.grad = torch.zeros((), dtype=last.dtype).expand(last.shape)
    _along(learner, 0, 6)
    with pytest.raises(ConfigError):
        learner.sync()
    last.grad = None
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, XS, _loss))


def half_a_block() -> None:
    """The second block is broken off while it is added."""
    cell = seeded(PlainRNN(2, 3), 0)
    learner = rtrl.BlockRTRL(cell, 2, block=2, structure="off")
    _along(learner, 0, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtrl._influence.history.History.append", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.sync()
    for _ in range(2):
        with pytest.raises(RTRLError, match="left half changed"):
            learner.sync()
    learner.reset(discard=True)
    _along(learner, 0, 6)
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, XS, _loss))


class _Hungry(nn.Module):
    """Has memory for a few samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.most = seeded(PlainRNN(2, 3), 0), 2

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 3, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        y, h = self.cell(x, h)
        return y, h


def memory_that_runs_out() -> None:
    """In a step, and then in a block, which goes in pieces."""
    cell = _Hungry()
    learner = rtrl.BlockRTRL(cell, 2, block=6, structure="off")
    cell.most = 1
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        learner.step(XS[0])
    cell.most = 4
    _along(learner, 0, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.sync()
    assert sum("not enough memory" in str(each.message) for each in caught) == 1
    cell.most = 9
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, XS, _loss))


def skipped_steps() -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    learner = rtrl.BlockRTRL(cell, 2, block=3, on_nonfinite="skip")
    _along(learner, 0, 4)
    learner.backward(learner.step(XS[0]).sum() * torch.nan)
    _along(learner, 4, 6)
    learner.sync()
    assert learner.skipped_steps == 1
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, XS, _loss))


FAULT_CHECKS = {check.__name__: check for check in (half_a_delivery, half_a_block, memory_that_runs_out, skipped_steps)}
