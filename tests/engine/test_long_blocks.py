"""Long blocks: Jacobians whose rows are pulled back some at a time, and products that would become subnormal."""

import pytest
import torch
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import seeded
from torch import nn

import oracles
import rtrl
from rtrl._engine import linearizer, reverse_sweep, unitwise, untapped
from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.step import take

KINDS = [nn.RNNCell, nn.GRUCell, nn.LSTMCell]


def readout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("lossless", [False, True], ids=["losses everywhere", "none in the first steps"])
@pytest.mark.parametrize("analytic", [False, True], ids=["autograd", "analytic"])
def test_rows_of_jacobians_are_pulled_back_some_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: type, lossless: bool, analytic: bool
) -> None:
    monkeypatch.setattr(untapped, "_ROWS_CHUNK", 3 * 8 * 2 * 4)  # three rows of a block of 8 steps, and then one
    cell, xs = seeded(rtrl.cells.from_torch(kind(3, 4), readout()), 0), normal(0, 11, 2, 3)
    if not analytic:
        monkeypatch.setattr(type(cell), "analytic_step", lambda self, x, h: None)
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


def test_a_wide_state_and_a_long_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit set low: B·H²·m is above what is pulled back at a time."""
    cell = seeded(rtrl.cells.from_torch(nn.RNNCell(1, 128)), 0)
    monkeypatch.setattr(type(cell), "analytic_step", lambda self, x, h: None)
    monkeypatch.setattr(unitwise, "_LEAST_NUMBERS", 10**9)
    xs = normal(0, 18, 4, 1)
    assert xs.numel() * 128**2 > untapped._ROWS_CHUNK
    loss = lambda t, y: y.square().sum() if t == len(xs) - 1 else None
    learner = rtrl.BlockRTRL(cell, 4, block=len(xs))
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


def test_a_scan_leaves_no_subnormal_numbers() -> None:
    cell = seeded(rtrl.cells.from_torch(nn.RNNCell(2, 6)), 0).float()
    with torch.no_grad():
        cell.cell.weight_hh.mul_(0.2)
    steps, state = taken(cell, normal(0, 100, 1, 2).float())
    groups = linearizer.Linearizer(cell, dict(cell.named_parameters()))(steps, state)
    with torch.no_grad():
        (cotangents,) = reverse_sweep.reverse_sweep(groups, state, ReusableBuffer(0)).cotangents
    products = cotangents[..., :-1, :]
    assert not bool(products[:, 0].any()), "the control: they sink to zero on the way"
    assert not bool(((products != 0) & (products.abs() < torch.finfo(torch.float32).tiny)).any())


def taken(cell: nn.Module, xs: torch.Tensor) -> tuple[list[RecordedStep], torch.Tensor]:
    """The steps of a stream, and the state after them."""
    steps, h = [], cell.init_state(xs.shape[1])
    for number, x in enumerate(xs):
        step, _, h = take(cell, x, h, None, number, number == 0, dict(cell.named_parameters()))
        steps.append(step)
    return steps, h
