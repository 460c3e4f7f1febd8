"""A reset closes no block: inside it, nothing goes from a sample's new sequence back to the old one."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.exact_learners import EXACT, Make
from helpers.running import gradients
from helpers.sliced_cells import WeightAndBias
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ConfigError, LossError

F64 = torch.float64
FIRST = torch.tensor([True, False])
RESETS = torch.tensor([[t in (2, 7), t in (3, 5, 6, 7)] for t in range(11)])


def loss(t: int, y: Tensor) -> Tensor | None:
    return None if t % 4 == 1 else (y - 0.1 * t).square().sum()


def mixture() -> nn.Module:
    return seeded(rtrl.RecurrentMoE(2, 1, d_model=2, n_slots=4, n_experts=4, topk=1, read_slots=2, write_slots=1), 3)


CELLS: dict[str, Any] = {
    "dense": lambda: seeded(PlainRNN(2, 3), 1),
    "mixture": mixture,
    "rows": lambda: seeded(rtrl.cells.Stack([rtrl.cells.MinGRU(2, 2), rtrl.cells.MinGRU(2, 2)]), 1),
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("make", [*EXACT.values(), partial(rtrl.BlockRTRL, block=6, window=2, audit=1)])
def test_gradients_and_influences_are_those_of_an_unrolled_stream(make: Make, kind: str) -> None:
    cell, xs = CELLS[kind](), normal(2, 11, 2, 2)
    learner = make(cell, 2)
    for t, x in enumerate(xs):
        for mask in (RESETS[t] & FIRST, RESETS[t] & ~FIRST):  # one call each, twice before one step
            if bool(mask.any()):
                learner.reset(mask)
        value = loss(t, learner.step(x))
        if value is not None:
            learner.backward(value)
    learner.sync()
    exact, influences = oracles.dense_rtrl(cell, xs, loss, resets=RESETS, return_influence=True)
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, loss, resets=RESETS))
    assert_gradients_equal(gradients(cell), exact)
    if hasattr(learner, "influence"):
        assert_influences_equal({name: learner.influence(name) for name in exact}, influences[-1])


@pytest.mark.parametrize("size", [1, 2])
def test_a_sweep_product_by_product_stops_at_restarts_too(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large states, and for a batch of one."""
    monkeypatch.setattr("rtrl._engine.reverse_sweep._LAUNCH_MACS", {"cpu": 0})
    cell, xs, resets = seeded(PlainRNN(2, 3), 1), normal(2, 11, size, 2), RESETS[:, :size]
    learner = rtrl.BlockRTRL(cell, size, block=8, audit="off")
    for t, x in enumerate(xs):
        learner.reset(resets[t])
        value = loss(t, learner.step(x))
        if value is not None:
            learner.backward(value)
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, loss, resets=resets))


def test_a_rollout_with_its_losses_at_the_end() -> None:
    """Episodes end inside rollouts and at their last step; one loss over all steps, and one update for each rollout."""
    cell, xs = seeded(PlainRNN(2, 3), 1), normal(2, 3, 4, 2, 2)
    ends = {(0, 1): FIRST, (0, 3): ~FIRST, (1, 0): FIRST | ~FIRST, (1, 3): FIRST, (2, 2): ~FIRST}
    learner, h, total = rtrl.BlockRTRL(cell, 2, block=4), cell.init_state(2), torch.zeros((), dtype=F64)
    for i, rollout in enumerate(xs):
        ys, references = [], []
        for t, x in enumerate(rollout):
            ys.append(learner.step(x))
            y, h = cell(x, h)
            references.append(y)
            if (i, t) in ends:
                learner.reset(ends[i, t])
                h = torch.where(ends[i, t][:, None], cell.init_state(2), h)
        assert learner.at_block_end
        (torch.stack(ys).cumsum(0).tanh() - 0.1 * i).square().sum().backward()
        learner.sync()
        total = total + (torch.stack(references).cumsum(0).tanh() - 0.1 * i).square().sum()
    exact = torch.autograd.grad(total, list(cell.parameters()))
    names = [name for name, _ in cell.named_parameters()]
    assert_gradients_equal(gradients(cell), dict(zip(names, exact, strict=True)))


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_the_gradients_of_losses_apart(make: Make) -> None:
    cell, xs = seeded(PlainRNN(2, 3), 1), normal(2, 8, 2, 2)
    learner = make(cell, 2)
    for t, x in enumerate(xs):
        if t in (4, 7):
            learner.reset(FIRST)
        y = learner.step(x)
    learner.reset(~FIRST)  # after the step
    resets = torch.stack([FIRST & (t in (4, 7)) for t in range(8)])
    found = learner.gradients({"squares": y.square().sum(), "sum": y.sum()}, per_sample=True)
    for name, of in {"squares": lambda y: y.square().sum(), "sum": lambda y: y.sum()}.items():
        for b in range(2):
            own = {name: value[b] for name, value in found[name].items()}
            exact = oracles.bptt(cell, xs, lambda t, y, b=b, of=of: of(y[b]) if t == 7 else None, resets=resets)
            assert_gradients_equal(own, exact)


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_the_newest_step_takes_losses_after_a_reset(make: Make) -> None:
    cell, xs = seeded(PlainRNN(2, 3), 1), normal(2, 2, 2, 2)
    learner = make(cell, 2)
    learner.step(xs[0])
    y = learner.step(xs[1])
    learner.reset(FIRST)
    learner.backward(y.square().sum())
    y.sum().backward()
    learner.sync()
    exact = oracles.bptt(cell, xs, lambda t, y: y.square().sum() + y.sum() if t else None)
    assert_gradients_equal(gradients(cell), exact)
    with pytest.raises(LossError, match="whose block has closed"):
        y.sum().backward()


def test_other_states_inside_a_block() -> None:
    cell, xs, state = seeded(PlainRNN(2, 3), 1), normal(2, 5, 2, 2), normal(3, 2, 3)
    learner, h, total = rtrl.BlockRTRL(cell, 2, block=4), cell.init_state(2), torch.zeros((), dtype=F64)
    for t, x in enumerate(xs):
        if t == 2:
            learner.reset(state=state)
            learner.reset(FIRST, state=2 * state)
            h = torch.stack([2 * state[0], state[1]])
            assert torch.equal(learner.state, h)
        learner.backward(learner.step(x).square().sum())
        y, h = cell(x, h)
        total = total + y.square().sum()
    learner.sync()
    exact = torch.autograd.grad(total, list(cell.parameters()))
    names = [name for name, _ in cell.named_parameters()]
    assert_gradients_equal(gradients(cell), dict(zip(names, exact, strict=True)))


@pytest.mark.parametrize("lazy", [True, False])
def test_a_dormant_slice_of_a_sample_that_restarted_is_gone(lazy: bool) -> None:
    """Slice 0 is active in the first block alone; the first sample restarts in the second one."""
    cell = seeded(WeightAndBias("all"), 2)
    index = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1], [2, 1], [2, 1], [3, 3], [1, 0]], dtype=F64)
    xs, resets = torch.cat([index[:, :, None], normal(3, 8, 2, 3)], dim=2), torch.zeros(8, 2, dtype=torch.bool)
    resets[3, 0] = True
    learner = rtrl.BlockRTRL(cell, 2, block=2, window=8, lazy=lazy, audit=1)
    for t, x in enumerate(xs):
        if bool(resets[t].any()):
            learner.reset(resets[t])
        if t == 4:
            learner.sync(dormant=False)
            assert (learner.last_updates("w") < 0).tolist() == [[True, False, True, True], [False, False, True, True]]
            assert not bool(learner.influence("w")[0, :, :9].any())
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    exact, influences = oracles.dense_rtrl(
        cell, xs, lambda t, y: y.square().sum(), resets=resets, return_influence=True
    )
    assert_gradients_equal(gradients(cell), exact)
    assert_influences_equal({name: learner.influence(name) for name in exact}, influences[-1])


@pytest.mark.parametrize("after", [False, True], ids=["before the next step", "after it"])
@pytest.mark.parametrize("make", [EXACT["block-3"], EXACT["bptt"], EXACT["dense"]])
def test_saved_and_copied_with_samples_that_restarted(make: Make, after: bool) -> None:
    cell, xs, found = seeded(PlainRNN(2, 3), 1), normal(2, 6, 2, 2), []
    for way in ("straight", "saved", "copied"):
        mine = copy.deepcopy(cell)
        learner = make(mine, 2)
        for t, x in enumerate(xs):
            if t == 4:
                learner.reset(FIRST)
            if t == 4 + after:
                if way == "saved":
                    saved, learner = learner.state_dict(), make(mine, 2)
                    learner.load_state_dict(saved)
                elif way == "copied":
                    learner = copy.deepcopy(learner)
            learner.backward((learner.step(x) - 0.1 * t).square().sum())
        learner.sync()
        found.append(gradients(learner.cell))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)
    assert_gradients_equal(
        found[0], oracles.bptt(cell, xs, lambda t, y: (y - 0.1 * t).square().sum(), resets=_only(4, len(xs)))
    )


def _only(step: int, steps: int) -> Tensor:
    return (torch.arange(steps) == step)[:, None] & FIRST


def test_a_mask_without_a_step_is_refused() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2)
    saved = learner.state_dict()
    with pytest.raises(ConfigError, match="restarted after an open step, but it has none"):
        learner.load_state_dict({**saved, "restarting": FIRST})


def test_a_block_with_its_first_restart_is_audited() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=2, audit="first")
    for t, x in enumerate(normal(2, 9, 2, 2)):
        if t == 5:
            learner.reset(FIRST)
        learner.backward(learner.step(x).sum())
    learner.sync()
    assert learner.audits.count == 3  # the first of its kind, the first with a restart, the shorter one at the end
