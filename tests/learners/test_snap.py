"""SnAp-n against its recursion, with Jacobians and masks written out from the equation of the cell."""

import pytest
import torch
from helpers.baseline_cells import F64, Ring, delivered, differ, normal, squares
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import PlainRNN, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
from rtrl.learners import DenseRTRL, SnAp

HIDDEN = 5


def ring_mask(order: int, hidden: int) -> Tensor:
    """(H, H, H): may entry i of the state keep the influence of weight (row, column)? Row drives i if i lies less than
    ``order`` places on along the ring; the column must be the row's own place or the one before."""
    mask = torch.zeros(hidden, hidden, hidden, dtype=torch.bool)
    for i in range(hidden):
        for row in range(hidden):
            for column in {row, (row - 1) % hidden}:
                mask[i, row, column] = (i - row) % hidden < order
    return mask.reshape(hidden, hidden * hidden)


@given(st.integers(1, HIDDEN + 1), st.integers(1, 8), st.integers(0, 99))
def test_the_influence_follows_the_masked_recursion_and_is_zero_outside(order: int, steps: int, seed: int) -> None:
    cell, xs = seeded(Ring(2, HIDDEN), seed), normal(seed, steps, 1, 2)
    mask = ring_mask(order, HIDDEN)
    learner, kept, h = SnAp(cell, 1, order), torch.zeros(HIDDEN, HIDDEN**2, dtype=F64), cell.init_state(1)
    for x in xs:
        learner.step(x)
        weight = (cell.recurrent * cell.ring).detach()
        slope = 1 - torch.tanh(x @ cell.inward.T + h @ weight.T).detach().square()[0]
        immediate = torch.einsum("i,ir,rc,c->irc", slope, torch.eye(HIDDEN).to(h), cell.ring, h[0])
        kept = mask * (slope[:, None] * weight @ kept + immediate.reshape(HIDDEN, -1))
        h = cell(x, h)[1].detach()
    assert torch.equal(learner.mask("recurrent"), mask)
    found = learner.influence("recurrent")[0]
    assert bool((found[~mask] == 0).all())
    assert_influences_equal({"recurrent": found[None]}, {"recurrent": kept[None]})


def test_one_step_is_exact_inside_the_mask_and_the_next_is_not() -> None:
    cell, xs = seeded(Ring(2, HIDDEN), 3), normal(3, 2, 2, 2)
    exact, learner = DenseRTRL(cell, 2), SnAp(cell, 2, 1)
    for taken, x in enumerate(xs):
        exact.step(x)
        learner.step(x)
        for name in ("inward", "recurrent"):
            whole, masked, mask = exact.influence(name), learner.influence(name), learner.mask(name)
            assert bool((masked[:, ~mask] == 0).all())
            assert bool((whole[:, ~mask] != 0).any()) == (taken > 0), "order 1 drops something from step 2 on"
            if not taken:
                assert_influences_equal({name: masked * mask}, {name: whole * mask})


@pytest.mark.parametrize("order", range(1, HIDDEN + 1))
def test_exact_from_the_order_at_which_all_of_the_ring_is_reached(order: int) -> None:
    cell, xs = seeded(Ring(2, HIDDEN), 4, scale=1.5), normal(4, 9, 2, 2)
    found, expected = delivered(SnAp(cell, 2, order), xs, squares), oracles.bptt(cell, xs, squares)
    if order < HIDDEN:
        assert differ(found, expected)
    else:
        assert_gradients_equal(found, expected)


def test_a_dense_cell_is_exact_from_order_two_on() -> None:
    cell, xs = seeded(PlainRNN(2, 4), 0), normal(0, 7, 2, 2)
    expected = oracles.bptt(cell, xs, squares)
    assert differ(delivered(SnAp(cell, 2, 1), xs, squares), expected)
    assert_gradients_equal(delivered(SnAp(cell, 2, 2), xs, squares), expected)


class Gated(nn.Module):
    """``h' = x₀ U h + W x``: where x is zero, both Jacobians are."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.inward = nn.Parameter(torch.eye(3).roll(1, 0).double()), nn.Parameter(normal(0, 3, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, 3, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = x[:, :1] * (h @ self.recurrent.T) + x @ self.inward.T
        return h, h


@pytest.mark.parametrize("silent", [0, 1])
def test_the_mask_is_that_of_all_samples(silent: int) -> None:
    """In one of two samples nothing drives and nothing reaches anything."""
    xs = normal(0, 2, 2, 2)
    xs[:, silent] = 0.0
    learner, alone = SnAp(Gated(), 2, 2), SnAp(Gated(), 1, 2)
    for x in xs:
        learner.step(x)
        alone.step(x[1 - silent : 2 - silent])
    for name in ("inward", "recurrent"):
        assert torch.equal(learner.mask(name), alone.mask(name)) and bool(learner.mask(name).any())
    assert int(learner.mask("inward").sum()) == 3 * 2 * 2  # a row of W drives its own entry and reaches another
