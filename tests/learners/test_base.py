"""What all learners share, whatever their rule: arguments of ``reset``, forced choices, deliveries, changed cells."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES, normal, squares
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ConfigError, LossError, ParameterChangedError
from rtrl.learners import BPTT, UORO, DenseRTRL, Learner

Make = Callable[..., Any]
ALL = [*BASELINES, pytest.param(lambda *a: rtrl.BlockRTRL(*a, block=4, window=3), id="block")]
FIRST = torch.tensor([True, False])


def after_three_steps(make: Make) -> Any:
    learner = make(seeded(PlainRNN(2, 3), 0), 2)
    for t, x in enumerate(normal(1, 3, 2, 2)):
        learner.backward(squares(t, learner.step(x)))
    return learner


@pytest.mark.parametrize("make", ALL)
def test_every_learner_is_a_learner(make: Make) -> None:
    learner = after_three_steps(make)
    assert isinstance(learner, Learner)
    assert (learner.steps_taken, learner.batch_size) == (3, 2)
    assert learner.block == (4 if isinstance(learner, rtrl.BlockRTRL) else 1)


@pytest.mark.parametrize("make", ALL)
def test_the_former_name_of_the_samples_of_a_reset_still_works_with_a_warning(make: Make) -> None:
    today, former = after_three_steps(make), after_three_steps(make)
    today.reset(samples=FIRST)
    with pytest.warns(DeprecationWarning, match=r"reset\(samples=\.\.\.\)") as caught:
        former.reset(rows=FIRST)
    assert caught[0].filename == __file__
    assert torch.equal(today.state, former.state) and not bool(today.state[0].count_nonzero())
    with pytest.raises(ConfigError, match="rows is the former name of samples"):
        today.reset(FIRST, rows=FIRST)
    found = []
    for learner in (today, former):
        learner.backward(squares(3, learner.step(torch.ones(2, 2).double())))
        learner.sync()
        found.append(gradients(learner.cell))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("make", ALL)
def test_a_discarded_run_leaves_no_gradient_and_a_fresh_learner(make: Make) -> None:
    learner = after_three_steps(make)
    y = learner.step(torch.ones(2, 2).double())
    learner.backward(y.sum())
    with pytest.raises(ConfigError, match="of all samples"):
        learner.reset(FIRST, discard=True)
    learner.reset(discard=True)
    with pytest.raises(LossError):
        y.sum().backward()
    learner.sync()
    assert all(p.grad is None or not bool(p.grad.count_nonzero()) for p in learner.cell.parameters())
    fresh = make(seeded(PlainRNN(2, 3), 0), 2)
    for run in (learner, fresh):
        for t, x in enumerate(normal(2, 5, 2, 2)):
            run.backward(squares(t, run.step(x)))
        run.sync()
    if not isinstance(learner, UORO):  # its generator has moved on
        assert_gradients_equal(gradients(learner.cell), gradients(fresh.cell))


@pytest.mark.parametrize("make", [BPTT, DenseRTRL, lambda *a: rtrl.BlockRTRL(*a, block=3)])
def test_choices_may_be_forced_on_every_learner(make: Make) -> None:
    moe = rtrl.RecurrentMoE(2, 2, 4, 3, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learner, xs = make(moe, 2), normal(3, 5, 2, 2)
    reads = [torch.tensor([[t % 3, (t + 1) % 3], [(t + 1) % 3, t % 3]]) for t in range(5)]
    choices = [moe.choices(read, read[:, :1], torch.tensor([[t % 4], [1]])) for t, read in enumerate(reads)]
    h, losses = moe.init_state(2), []
    for t, x in enumerate(xs):
        y = learner.step(x, replay=choices[t])
        learner.backward(squares(t, y))
        expected, h, _ = moe(x, h, replay=choices[t])
        assert_gradients_equal({"y": y.detach()}, {"y": expected.detach()})
        losses.append(squares(t, expected))
    learner.sync()
    found = gradients(moe)
    moe.zero_grad()
    torch.stack(losses).sum().backward()
    assert_gradients_equal(found, gradients(moe), may_be_zero=True)


@pytest.mark.parametrize("make", ALL)
def test_a_delivery_is_the_same_where_the_user_has_switched_gradients_off(make: Make) -> None:
    """The steps that are run again build their own graph, across resets of some samples, too."""
    found = []
    for switched_off in (False, True):
        learner = after_three_steps(make)
        learner.reset(FIRST)
        for t, x in enumerate(normal(4, 3, 2, 2)):
            learner.backward(squares(t, learner.step(x)))
        with torch.set_grad_enabled(not switched_off):
            learner.sync()
        found.append(gradients(learner.cell))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    if isinstance(learner, BPTT):
        xs, resets = torch.cat([normal(1, 3, 2, 2), normal(4, 3, 2, 2)]), torch.zeros(6, 2, dtype=torch.bool)
        resets[3] = FIRST
        exact = oracles.bptt(learner.cell, xs, lambda t, y: squares(t % 3, y), resets=resets)
        assert_gradients_equal(found[1], exact)


class Restarting(PlainRNN):
    """Its next state is a parameter, the same for all samples."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.origin = nn.Parameter(torch.ones(1, 3))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, h)[0], self.origin.expand_as(h)


@pytest.mark.parametrize("make", ALL)
def test_a_state_that_is_a_view_of_a_parameter_does_not_change_with_it(make: Make) -> None:
    learner = make(seeded(Restarting(), 0), 2)
    learner.backward(squares(0, learner.step(normal(0, 2, 2))))
    learner.sync()
    before = learner.state
    with torch.no_grad():
        learner.cell.origin.add_(1.0)
    assert torch.equal(learner.state, before)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("do", [lambda learner: learner.sync(), lambda learner: learner.reset()], ids=["sync", "reset"])
def test_no_gradient_goes_to_a_parameter_that_the_cell_has_lost(make: Make, do: Callable[[Any], None]) -> None:
    learner = after_three_steps(make)
    lost = learner.cell.recurrent
    learner.cell.recurrent = nn.Parameter(lost.detach().clone())
    with pytest.raises(ParameterChangedError, match="make a new learner"):
        do(learner)
    assert lost.grad is None
    learner.cell.recurrent = lost
    learner.sync()
    assert lost.grad is not None
