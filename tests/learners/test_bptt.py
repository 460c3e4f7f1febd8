"""Truncated backpropagation against its definition, written out with detached states; and what each learner holds."""

from collections.abc import Callable

import pytest
import torch
from helpers.baseline_cells import F64, Loss, Ring, delivered, differ, normal, squares
from helpers.running import trainable
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
from rtrl.learners import BPTT, TBPTT, DenseRTRL


def truncated(cell: nn.Module, xs: Tensor, loss: Loss, first_of: Callable[[int], int]) -> dict[str, Tensor]:
    """Each loss alone, with the state that step ``first_of(t)`` receives detached."""
    parameters = trainable(cell)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for t in range(len(xs)):
        h = cell.init_state(xs.shape[1])
        for i in range(t + 1):
            if i == first_of(t):
                h = h.detach()
            y, h = cell(xs[i], h)
        value = loss(t, y)
        if value is not None:
            found = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
            total = {name: total[name] + g for name, g in zip(total, found, strict=True)}
    return total


def every_other(t: int, y: Tensor) -> Tensor | None:
    return squares(t, y) if t % 2 else None


@pytest.mark.parametrize("sliding", [True, False])
@given(
    horizon=st.integers(1, 9), steps=st.integers(1, 8), batch=st.integers(1, 3), seed=st.integers(0, 99),
    syncs=st.frozensets(st.integers(0, 7)), loss=st.sampled_from([squares, every_other]),
)  # fmt: skip
def test_equals_its_definition_whenever_it_delivers(
    sliding: bool, horizon: int, steps: int, batch: int, seed: int, syncs: frozenset[int], loss: Loss
) -> None:
    cell, xs = seeded(PlainRNN(2, 3), seed), normal(seed, steps, batch, 2)
    first_of = (lambda t: max(0, t - horizon + 1)) if sliding else (lambda t: t - t % horizon)
    found = delivered(TBPTT(cell, batch, horizon, sliding=sliding), xs, loss, syncs)
    assert_gradients_equal(found, truncated(cell, xs, loss, first_of), may_be_zero=True)


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
def test_a_short_horizon_differs_from_bptt_and_a_window_from_chunks(horizon: int) -> None:
    cell, xs = seeded(Ring(2, 4), 5, scale=1.5), normal(5, 6, 2, 2)
    exact = oracles.bptt(cell, xs, squares)
    sliding = delivered(TBPTT(cell, 2, horizon), xs, squares)
    chunked = delivered(TBPTT(cell, 2, horizon, sliding=False), xs, squares)
    assert differ(sliding, exact)
    assert differ(chunked, exact)
    assert differ(sliding, chunked) == (horizon > 1), "with one step there is no border to tell them apart"


def test_chunks_restart_after_a_reset_of_all_samples() -> None:
    cell, xs = seeded(PlainRNN(2, 3), 0), normal(0, 8, 2, 2)
    learner = TBPTT(cell, 2, 4, sliding=False)
    first = delivered(learner, xs[:2], squares)
    learner.reset()
    second = delivered(learner, xs[2:6], squares)
    assert learner.at_block_end is False, "sync has closed the last step"
    assert_gradients_equal(first, oracles.bptt(cell, xs[:2], squares))
    assert_gradients_equal(second, oracles.bptt(cell, xs[2:6], squares))


def test_a_block_ends_once_per_chunk() -> None:
    learner = TBPTT(seeded(PlainRNN(2, 3), 0), 1, 3, sliding=False)
    ends = []
    for x in normal(0, 9, 1, 2):
        learner.step(x)
        ends.append(learner.at_block_end)
    assert ends == [False, False, True] * 3


def test_what_is_held_grows_with_the_stream_for_bptt_alone() -> None:
    cell, xs = seeded(PlainRNN(2, 3), 0), normal(0, 24, 1, 2)

    def held(learner: BPTT | TBPTT | DenseRTRL, steps: int) -> int:
        delivered(learner, xs[:steps], squares)
        return sum(learner.retained_bytes().values())

    for make in (lambda: TBPTT(cell, 1, 4), lambda: TBPTT(cell, 1, 4, sliding=False), lambda: DenseRTRL(cell, 1)):
        assert held(make(), 24) == held(make(), 12)
    assert held(BPTT(cell, 1), 24) - held(BPTT(cell, 1), 12) == 12 * (2 + 3 + 2) * F64.itemsize
    learner = BPTT(cell, 1)
    delivered(learner, xs, squares)
    learner.reset()
    learner.step(xs[0])
    learner.sync()
    assert sum(learner.retained_bytes().values()) == held(BPTT(cell, 1), 1)
