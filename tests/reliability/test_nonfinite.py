"""NaN and infinity: named and refused, or skipped as if the step had not been taken; an influence that explodes."""

from typing import Any

import pytest
import torch
from helpers.baseline_cells import normal, squares
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import NonFiniteError

FIRST = torch.tensor([True, False])
XS = normal(1, 9, 2, 2)


def plain() -> nn.Module:
    return seeded(PlainRNN(2, 3), 0)


def rows() -> nn.Module:
    return seeded(rtrl.cells.MinGRU(2, 3).double(), 0)


def learner_of(cell: nn.Module, block: int = 4) -> rtrl.BlockRTRL:
    return rtrl.BlockRTRL(cell, 2, block=block, on_nonfinite="skip")


def without(cell: nn.Module, skipped: set[int], resets: Tensor | None = None) -> dict[str, Tensor]:
    """The gradient of the steps that were not skipped."""
    kept = [t for t in range(len(XS)) if t not in skipped]
    resets = None if resets is None else resets[kept]
    return oracles.bptt(cell, XS[kept], lambda t, y: squares(kept[t], y), resets=resets)


@pytest.mark.parametrize("make", [plain, rows])
@pytest.mark.parametrize(("what", "block"), [("x", 1), ("x", 4), ("loss", 4), ("plain backward", 1)])
def test_a_step_with_nan_is_as_if_it_had_not_been_taken(make: Any, what: str, block: int) -> None:
    cell, bad = make(), {2, 5}
    learner = learner_of(cell, block)
    for t, x in enumerate(XS):
        y = learner.step(torch.full_like(x, torch.nan) if what == "x" and t in bad else x)
        loss = squares(t, y)
        if what == "plain backward":
            (loss * (torch.inf if t in bad else 1.0)).backward()
        else:
            learner.backward(loss * torch.nan if what == "loss" and t in bad else loss)
    learner.sync()
    assert learner.skipped_steps == 2 and learner.steps_taken == 7
    assert_gradients_equal(gradients(cell), without(cell, bad))


def test_a_block_in_which_nan_is_found_is_skipped_as_a_whole_and_restarts_stay() -> None:
    cell, resets = plain(), torch.zeros(9, 2, dtype=torch.bool)
    learner = learner_of(cell, 3)
    for t, x in enumerate(XS):
        if t == 5:
            learner.reset(FIRST)
            resets[6] = FIRST  # the first step after it that is not skipped
        y = learner.step(x)
        (squares(t, y) * (torch.nan if t == 4 else 1.0)).backward()
    learner.sync()
    assert learner.skipped_steps == 3
    assert_gradients_equal(gradients(cell), without(cell, {3, 4, 5}, resets))


def test_a_sequence_with_a_loss_of_nan_is_skipped_between_restarts() -> None:
    cell, resets = plain(), torch.zeros(9, 2, dtype=torch.bool)
    learner = learner_of(cell, 9)
    for start in (0, 3, 6):
        if start:
            learner.reset(FIRST)
        ys = learner.unroll(XS[start : start + 3])
        losses = torch.stack([squares(start + k, y) for k, y in enumerate(ys)]).sum()
        learner.backward(losses * torch.nan if start == 3 else losses)
    resets[6] = FIRST
    assert learner.skipped_steps == 3
    assert learner.unroll(XS[:2] * torch.nan).isnan().all() and learner.skipped_steps == 5
    learner.sync()
    assert_gradients_equal(gradients(cell), without(cell, {3, 4, 5}, resets))


def test_skipped_steps_are_counted_in_a_saved_learner() -> None:
    learner, other = learner_of(plain()), learner_of(plain())
    learner.backward(learner.step(XS[0]).sum() * torch.nan)
    other.load_state_dict(learner.state_dict())
    assert other.skipped_steps == 1 and other.steps_taken == 0
    learner.step(XS[0])
    learner.backward(learner.step(XS[1]).sum() * torch.nan)
    other.load_state_dict(learner.state_dict())
    assert other.skipped_steps == 2 and other.steps_taken == 1


class _Unstable(nn.Module):
    """The influence grows eightfold at every step; the state does not, for what enters sums to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("mix", torch.tensor([[0.0, 8.0], [8.0, 0.0]]))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h @ self.mix + x @ self.weight - x.sum(dim=1, keepdim=True)
        return h, h


def test_an_influence_that_explodes_is_named_before_it_overflows() -> None:
    learner = rtrl.BlockRTRL(_Unstable(), 1, block=2, structure="off")

    def take_many() -> None:
        for _ in range(60):
            learner.step(torch.ones(1, 2))

    with pytest.raises(NonFiniteError, match=r"the influence of parameter 'weight' explodes: its entries are up to"):
        take_many()
    assert 36 < learner.steps_taken < 45  # 8 ** 43 is too large for a float32
    learner.reset(discard=True)
    learner.step(torch.ones(1, 2))
    assert bool(torch.isfinite(learner.influence("weight")).all())


def test_influences_of_stable_dynamics_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    norms = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda values, *order: looks.append(1) or norms(values, *order))
    learner = rtrl.BlockRTRL(rtrl.cells.from_torch(nn.RNNCell(2, 3)), 1, block=2)
    for _ in range(2 * 100):
        learner.step(torch.ones(1, 2))
    assert 3 <= len(looks) <= 5


@pytest.mark.parametrize("steep", [1.5, 2.0**11, 2.0**30])
def test_an_explosion_is_named_however_steep_and_late_it_is(steep: float) -> None:
    cell = _Unstable()
    learner = rtrl.BlockRTRL(cell, 1, block=2, structure="off")
    cell.mix.mul_(0.1)
    for _ in range(2 * 70):
        learner.step(torch.ones(1, 2))
    learner.sync()
    cell.mix.mul_(steep / float(cell.mix.max()))

    def take_many() -> None:
        for _ in range(500):
            learner.step(torch.zeros(1, 2))

    with pytest.raises(NonFiniteError, match="explodes"):
        take_many()
    learner.reset(discard=True)
    learner.step(torch.ones(1, 2))
