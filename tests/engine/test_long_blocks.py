"""Blocks that are linearised in several pieces, of cells that know their derivatives."""

import pytest
import torch
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import seeded
from torch import nn

import oracles
import rtrl
from rtrl._engine import linearizer, reverse_sweep
from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.step import take

KINDS = [nn.RNNCell, nn.GRUCell, nn.LSTMCell]


def readout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("lossless", [False, True], ids=["losses everywhere", "none in the first piece"])
def test_pieces_of_analytic_steps_are_joined(monkeypatch: pytest.MonkeyPatch, kind: type, lossless: bool) -> None:
    monkeypatch.setattr(linearizer, "_SPAN_NUMBERS", 1)
    monkeypatch.setattr(linearizer, "_LEAST_SPAN", 3)
    cell, xs = seeded(rtrl.cells.from_torch(kind(3, 4), readout()), 0), normal(0, 11, 2, 3)
    loss = lambda t, y: None if lossless and t < 4 else y.square().sum()
    learner = rtrl.BlockRTRL(cell, 2, block=8)
    for t, x in enumerate(xs):
        y = learner.step(x)
        value = loss(t, y)
        if value is not None:
            learner.backward(value)
    learner.sync()
    found = {name: p.grad for name, p in cell.named_parameters()}
    assert_gradients_equal(found, oracles.bptt(cell, xs, loss))


def test_a_wide_state_and_a_long_block() -> None:
    """Without a limit set low: B·H²·m is above what is linearised at a time."""
    cell = seeded(rtrl.cells.from_torch(nn.RNNCell(1, 128)), 0)
    xs = normal(0, 66, 8, 1)
    assert linearizer.Linearizer._span(taken(cell, xs[:1])[0][0]) < len(xs)
    loss = lambda t, y: y.square().sum() if t == len(xs) - 1 else None
    learner = rtrl.BlockRTRL(cell, 8, block=len(xs))
    for x in xs:
        y = learner.step(x)
    learner.backward(y.square().sum())
    learner.sync()
    found = {name: p.grad for name, p in cell.named_parameters()}
    assert_gradients_equal(found, oracles.bptt(cell, xs, loss))


@pytest.mark.parametrize("size", [1, 2])
def test_products_of_a_long_dense_block_do_not_linger_as_subnormal_numbers(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(reverse_sweep, "_LAUNCH_MACS", {"cpu": 0})
    dropped = reverse_sweep._FLUSH_EVERY
    cell = seeded(rtrl.cells.from_torch(nn.RNNCell(2, 6)), 0).float()
    xs = normal(0, 300, size, 2).float()
    counts = []
    for every in (dropped, 10**9):
        monkeypatch.setattr(reverse_sweep, "_FLUSH_EVERY", every)
        steps, state = taken(cell, xs)
        groups = linearizer.Linearizer(cell, dict(cell.named_parameters()))(steps, state)
        with torch.no_grad():
            (cotangents,) = reverse_sweep.reverse_sweep(groups, state, ReusableBuffer(0)).cotangents
        tiny = torch.finfo(torch.float32).tiny
        counts.append(int(((cotangents != 0) & (cotangents.abs() < tiny)).sum()))
    few, many = counts
    assert many > 100, "the control: without care they do"
    assert few < many / 20


def taken(cell: nn.Module, xs: torch.Tensor) -> tuple[list[RecordedStep], torch.Tensor]:
    """The steps of a stream, and the state after them."""
    steps, h = [], cell.init_state(xs.shape[1])
    for number, x in enumerate(xs):
        step, _, h = take(cell, x, h, None, number, number == 0, dict(cell.named_parameters()))
        steps.append(step)
    return steps, h
