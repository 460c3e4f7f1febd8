"""Bytes really held: constant once everything has been active, for any length of the stream."""

import pytest
import torch
from helpers.running import live_tensor_bytes
from helpers.strategies import normal
from helpers.toy_cells import ForcedMoE, PlainRNN, seeded
from torch import Tensor

import rtrl
from rtrl._engine import buffers


def sparse_learner(block: int) -> tuple[rtrl.BlockRTRL, Tensor]:
    moe = rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=6, topk=1, expert_hidden=2, ffn_hidden=2)
    cell = seeded(ForcedMoE(moe, (2, 1, 1)), 5)
    cycle = 60
    first = torch.tensor(
        [[[t // 4 % 3, (t // 4 + 1) % 3, t // 4 % 3, t // 10 % 6]] for t in range(cycle)], dtype=torch.float64
    )
    return rtrl.BlockRTRL(cell, 1, block=block, window=3), torch.cat([normal(0, cycle, 1, 2), first], dim=-1)


def dense_learner(block: int) -> tuple[rtrl.BlockRTRL, Tensor]:
    return rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 5), 1, block=block), normal(0, 60, 1, 2)


@pytest.mark.parametrize(("few", "many"), [(300, 900), pytest.param(2_000, 20_000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("make", [sparse_learner, dense_learner])
def test_many_steps_hold_what_few_held(make: object, few: int, many: int) -> None:
    """Exactly, at the same point of a block, with experts dormant for longer than the window all the time."""
    learner, xs = make(block=20)  # type: ignore[operator]
    held, reached = {}, {}
    for t in range(many):
        y = learner.step(xs[t % len(xs)])
        learner.backward(y.square().sum())
        del y
        if learner.at_block_end and t // 20 % 3 == 0:
            learner.sync(dormant=t // 20 % 2 == 0)
            for p in learner.cell.parameters():
                p.grad = None
        if t + 1 in (few, many):
            learner.sync()
            held[t + 1] = learner.retained_bytes()
            for p in learner.cell.parameters():
                p.grad = None
            reached[t + 1] = live_tensor_bytes()
    assert held[few] == held[many]
    assert held[few]["influence"] > 0
    assert reached[few] == reached[many]


def test_retained_bytes_counts_what_is_really_held() -> None:
    """Against the tensors that the garbage collector can see: nothing of any size is left out."""
    before = live_tensor_bytes()
    learner, xs = sparse_learner(block=7)
    model = live_tensor_bytes()
    for t in range(200):
        y = learner.step(xs[t % len(xs)])
        learner.backward(y.square().sum())
    del y
    counted = sum(learner.retained_bytes().values())
    real = live_tensor_bytes() - model
    assert model > before
    assert 0.9 * counted <= real <= 1.1 * counted + 4096


def test_a_growing_history_is_noticed() -> None:
    """The control: a learner that keeps what each step returned fails the same comparison."""
    learner, xs = dense_learner(block=4)
    kept, reached = [], []
    for t in range(400):
        kept.append(learner.step(xs[t % len(xs)]))
        if t in (199, 399):
            reached.append(live_tensor_bytes())
    assert reached[1] > reached[0]


def test_memory_that_large_blocks_use_again_is_counted_and_kept() -> None:
    """Lent from block to block above a size, never larger than the influence; shorter blocks take less of it."""
    learner, xs = dense_learner(block=4)
    lent = 4 * 4 * 3 * 8  # (B, block, H + 1, H) numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "_LEAST_BYTES", lent)
        held, places = [], set()
        empty = buffers.ReusableBuffer.empty

        def recorded(buffer: buffers.ReusableBuffer, like: Tensor, *shape: int) -> Tensor:
            out = empty(buffer, like, *shape)
            if out.numel() * out.element_size() >= lent:
                places.add(out.data_ptr())
            return out

        patch.setattr(buffers.ReusableBuffer, "empty", recorded)
        for t in range(11):
            learner.backward(learner.step(xs[t]).square().sum())
            if t in (2, 4, 8):
                held.append(learner.retained_bytes()["scratch"])
        learner.sync()
        assert held == [0, lent, lent]
        assert len(places) == 1
        assert learner.retained_bytes()["scratch"] == lent
        patch.setattr(buffers, "_LEAST_BYTES", 1)
        learner, xs = dense_learner(block=4)
        for t in range(10):
            learner.backward(learner.step(xs[t]).square().sum())
            if t in (4, 5):
                learner.sync()  # a block of one step takes a part of the same buffer
                assert learner.retained_bytes()["scratch"] == lent
        learner, xs = dense_learner(block=64)  # whose buffer would be larger than the influence
        for t in range(66):
            learner.backward(learner.step(xs[t % len(xs)]).square().sum())
        assert learner.retained_bytes()["scratch"] == 0
        patch.setattr(buffers, "_LEAST_BYTES", lent + 1)
        learner, xs = dense_learner(block=4)
        for t in range(5):
            learner.backward(learner.step(xs[t]).square().sum())
        assert learner.retained_bytes()["scratch"] == 0


def test_retained_bytes_of_every_part() -> None:
    """Counted by hand, part by part, in the middle of a block with a loss at one of its two steps."""
    moe = rtrl.RecurrentMoE(2, 3, d_model=4, n_slots=3, n_experts=6, topk=1, expert_hidden=2, ffn_hidden=2)
    cell = seeded(ForcedMoE(moe, (2, 1, 1)), 5)
    learner = rtrl.BlockRTRL(cell, 1, block=2, window=1)
    state = 1 * 3 * 4 * 8
    nothing = {"influence": 0, "tree": 0, "block": 0, "gradient": 0, "state": state, "scratch": 0}
    assert learner.retained_bytes() == nothing

    x = torch.cat([normal(0, 4, 1, 2), torch.tensor([[[0.0, 1.0, 0.0, 5.0]]] * 4).double()], dim=-1)
    for t in range(4):
        y = learner.step(x[t])
        if t != 3:
            learner.backward(y.square().sum())
    held = learner.retained_bytes()
    sparsity = cell(x[0], cell.init_state(1))[2]
    index = sum(t.numel() for t in (sparsity.reads, sparsity.writes, *sparsity.active.values()) if t is not None)
    # Two open steps: what went in, the state each began at, what it used, y; and the gradient of the one loss.
    assert held["block"] == 2 * (6 * 8 + state + index * 8 + 3 * 8) + 3 * 8
    assert held["state"] == state
    assert held["gradient"] == sum(p.numel() * 8 for p in cell.parameters())
    # One row (H, p) of every parameter, one expert of six; its sample, slice and clock; where the row of each slice is.
    expected = 0
    for name, p in cell.named_parameters():
        slices = p.shape[0] if name in sparsity.active else 1
        used = sparsity.active[name].shape[1] if name in sparsity.active else 1
        expected += 8 * (used * (12 * p.numel() // slices + 3) + slices)
    assert held["influence"] == expected
    # One leaf: the two steps write at most two rows and touch at most all three.
    assert held["tree"] == 8 * (2 * 4 * 3 * 4 + 3 * 4 + 2 + 3)
    learner.sync()
    assert learner.retained_bytes() == {**held, "block": 0, "gradient": 0}
