"""The exact baselines, and those that are exact in some limit, against unrolled autograd."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import Leaky, Ring, delivered, differ, normal, squares
from helpers.running import run
from helpers.strategies import Case, cases, dense, forced_moe, resets, scheduled
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import PlainRNN, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from rtrl.learners import BPTT, RFLO, TBPTT, DenseRTRL, DiagonalRTRL, SnAp

LONG = 1000
Make = Callable[..., Any]
EXACT = [
    pytest.param(BPTT, id="bptt"),
    pytest.param(functools.partial(TBPTT, horizon=LONG), id="sliding"),
    pytest.param(functools.partial(TBPTT, horizon=LONG, sliding=False), id="chunked"),
    pytest.param(DenseRTRL, id="dense"),
    pytest.param(functools.partial(SnAp, order=LONG), id="snap"),
]


def happenings(data: st.DataObject, case: Case) -> tuple[dict[int, bool], dict[str, Any]]:
    """Deliveries, resets of some samples, and one change of the parameters, drawn."""
    steps = range(len(case.xs))
    shift = {n: 0.05 * normal(7, *p.shape) for n, p in case.cell.named_parameters() if p.requires_grad}
    change = data.draw(st.integers(0, len(case.xs)), label="parameters change at")
    none: dict[str, Tensor] = {}
    syncs = {t: True for t in steps if data.draw(st.booleans(), label=f"sync after {t}")}
    return syncs, {"resets": data.draw(resets(case)), "offsets": [none if t < change else shift for t in steps]}


@pytest.mark.parametrize("make", EXACT[:3])
@given(data=st.data())
def test_unrolled_learners_are_exact_on_any_cell(make: Make, data: st.DataObject) -> None:
    case = data.draw(cases())
    syncs, extra = happenings(data, case)
    found = run(case.cell, case.xs, case.loss, syncs=syncs, influences=False, make=make, **extra)
    assert_gradients_equal(found.gradients, oracles.bptt(case.cell, case.xs, case.loss, **extra), may_be_zero=True)


@pytest.mark.parametrize("make", EXACT[3:])
@given(data=st.data())
def test_carried_influence_is_exact_on_any_cell(make: Make, data: st.DataObject) -> None:
    case = data.draw(st.one_of(scheduled(max_steps=4), forced_moe(max_steps=3), dense(max_steps=4)))
    syncs, extra = happenings(data, case)
    expected, influences = oracles.dense_rtrl(case.cell, case.xs, case.loss, return_influence=True, **extra)
    found = run(case.cell, case.xs, case.loss, syncs=syncs, make=make, **extra)
    assert_gradients_equal(found.gradients, expected, may_be_zero=True)
    assert_influences_equal(found.influences, influences[-1], may_be_zero=True)


@pytest.mark.parametrize("make", EXACT)
@given(case=dense(max_steps=6))
def test_exact_on_dense_cells_with_a_reference_that_is_not_zero(make: Make, case: Case) -> None:
    found = run(case.cell, case.xs, case.loss, influences=False, make=make)
    assert_gradients_equal(found.gradients, oracles.bptt(case.cell, case.xs, case.loss))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_horizon_of_exactly_the_stream_is_enough(batch: int, steps: int, seed: int) -> None:
    cell, xs = seeded(Ring(2, 4), seed), normal(seed, steps, batch, 2)
    expected = oracles.bptt(cell, xs, squares)
    assert_gradients_equal(delivered(TBPTT(cell, batch, steps), xs, squares), expected)
    assert_gradients_equal(delivered(TBPTT(cell, batch, steps, sliding=False), xs, squares), expected)
    assert_gradients_equal(delivered(SnAp(cell, batch, steps), xs, squares), expected)


@given(st.integers(1, 5), st.integers(3, 6), st.integers(0, 99))
def test_diagonal_and_leak_are_exact_where_the_jacobian_is_so(hidden: int, steps: int, seed: int) -> None:
    xs = normal(seed, steps, 2, 3)
    cell = seeded(Leaky(3, hidden, None), seed)
    assert_gradients_equal(delivered(DiagonalRTRL(cell, 2), xs, squares), oracles.bptt(cell, xs, squares))
    cell = seeded(Leaky(3, hidden, 0.3), seed)
    expected = oracles.bptt(cell, xs, squares)
    assert_gradients_equal(delivered(RFLO(cell, 2, 0.3), xs, squares), expected)
    assert differ(delivered(RFLO(cell, 2, 0.4), xs, squares), expected)


def test_diagonal_and_leak_are_not_exact_elsewhere() -> None:
    """A control; and what they keep, for J that is not diagonal, by its own recursion."""
    cell, xs = seeded(Ring(2, 3), 1), normal(1, 5, 1, 2)
    expected = oracles.bptt(cell, xs, squares)
    h, s_diagonal, s_leak = cell.init_state(1), torch.zeros(3, 9), torch.zeros(3, 9)
    for x in xs:
        dynamics, immediate = _by_hand(cell, x, h)
        s_diagonal = torch.diag(dynamics.diagonal()) @ s_diagonal.double() + immediate
        s_leak = 0.7 * s_leak.double() + immediate
        h = cell(x, h)[1].detach()
    for learner, kept in ((DiagonalRTRL(cell, 1), s_diagonal), (RFLO(cell, 1, 0.3), s_leak)):
        assert differ(delivered(learner, xs, squares), expected)
        assert_influences_equal({"recurrent": learner.influence("recurrent")}, {"recurrent": kept.unsqueeze(0)})


def _by_hand(cell: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """J (H, H) and B (H, H·H) of a ``Ring`` by ``recurrent``, from its equation."""
    weight = (cell.recurrent * cell.ring).detach()
    slope = 1 - torch.tanh(x @ cell.inward.T + h @ weight.T).detach().square()[0]
    size = len(slope)
    immediate = torch.zeros(size, size, size, dtype=h.dtype)
    for i in range(size):
        immediate[i, i] = slope[i] * cell.ring[i] * h[0]
    return slope[:, None] * weight, immediate.reshape(size, -1)


class TwoOutputs(PlainRNN):
    """The squares of the next state beside the output."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:  # type: ignore[override]
        y, h_next = super().forward(x, h)
        return (y, h_next.square()), h_next


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("make", EXACT)
def test_a_loss_of_one_of_two_outputs_counts(make: Make, output: int) -> None:
    cell, xs = seeded(TwoOutputs(2, 3), 1), normal(2, 4, 2, 2)
    loss = lambda t, y: y[output].square().sum() if t % 2 else None
    found = run(cell, xs, loss, influences=False, make=make)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss), may_be_zero=True)
