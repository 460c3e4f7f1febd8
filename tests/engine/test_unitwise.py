"""Plain cells of users whose units interact in linear maps alone: found, exact, and held against every block."""

import math
from typing import Any

import pytest
import torch
from helpers.plain_autograd import assert_exact, squares
from helpers.running import run
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.unitwise_cells import INTERACTING, INTERACTING_LATER, UNITWISE, blocks_unit_by_unit, with_a_weight
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
import rtrl
from rtrl._engine.probe import probe_weights


def loss(t: int, y: Tensor) -> Tensor | None:
    return None if t == 2 else squares(y) / (1 + t)


def check(cell: nn.Module, xs: Tensor, **options: Tensor) -> list[bool]:
    """Hold blocks of 3 steps to both oracles, influences included; whether each of them was linearised unit by unit."""
    with blocks_unit_by_unit() as tried:
        found = run(cell, xs, loss, block=3, audit="off", **options)
    gradient, influences = oracles.dense_rtrl(cell, xs, loss, return_influence=True, **options)
    assert_gradients_equal(found.gradients, gradient)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss, **options))
    assert_influences_equal(found.influences, influences[-1])
    return tried


@pytest.mark.parametrize("name", UNITWISE)
def test_it_is_found_and_exact(name: str) -> None:
    torch.manual_seed(0)
    resets = torch.zeros(8, 2, dtype=torch.bool)
    resets[4, 1] = True
    assert check(UNITWISE[name](), normal(1, 8, 2, 3), resets=resets) in ([True] * 3, [True] * 4)


@pytest.mark.parametrize("name", INTERACTING_LATER)
def test_units_that_begin_to_interact_are_noticed_in_that_block(name: str) -> None:
    torch.manual_seed(0)
    xs = normal(1, 11, 2, 3).clamp(-1, 1)
    xs[4, 1, 0] = 2.1  # one sample, one step
    assert check(INTERACTING_LATER[name](), xs) == [True, False, True, True]


def test_units_that_a_growing_weight_couples_are_noticed() -> None:
    torch.manual_seed(0)
    offsets = [{"p": torch.tensor([0.0 if t < 6 else 1.0], dtype=torch.float64)} for t in range(9)]
    with blocks_unit_by_unit() as tried:
        cell, xs = with_a_weight(), normal(1, 9, 2, 3)
        found = run(cell, xs, loss, block=3, audit="off", offsets=offsets)
    assert tried == [True] * 6 + [False] * 3  # parameters change after a sync
    gradient, influences = oracles.dense_rtrl(cell, xs, loss, return_influence=True, offsets=offsets)
    assert_gradients_equal(found.gradients, gradient)
    assert_influences_equal(found.influences, influences[-1], may_be_zero=True)


@pytest.mark.parametrize("name", INTERACTING)
def test_other_cells_are_left_to_the_general_way(name: str) -> None:
    torch.manual_seed(0)
    assert check(INTERACTING[name](), normal(1, 7, 2, 3)) == []


class SometimesSliced(nn.Module):
    """Declares two of three slices of a weight active at steps whose x begins with a negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(normal(1, 3, 3)), nn.Parameter(normal(2, 3, 3))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 3), 0.2, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        z, recur = F.linear(x, self.w), F.linear(h, self.u)
        if not bool((x[:, 0] < 0).all()):
            h = torch.tanh(z + recur)
            return h, h
        h = torch.tanh(z * torch.tensor([1.0, 0.0, 1.0]) + recur)
        return h, h, rtrl.Sparsity(active={"w": torch.tensor([0, 2]).expand(len(x), 2)})


def test_slices_that_other_steps_declare() -> None:
    xs = list(normal(3, 8, 2, 3).abs())
    for t in (1, 2, 5):
        xs[t][:, 0] *= -1
    with blocks_unit_by_unit() as tried:
        assert_exact(SometimesSliced(), xs, 2, block=4, audit="off")
    assert tried == [True] * 2


def test_any_two_units_have_different_weights_in_one_pass() -> None:
    for units in (1, 2, 16, 17, 300):
        exact = torch.stack([weights.values for weights in probe_weights(units, torch.zeros(()), 5) if weights.exact])
        assert exact.unique(dim=1).shape[1] == units


def test_numbers_too_small_or_too_large_for_the_probe() -> None:
    weights = probe_weights(4, torch.zeros((), dtype=torch.float64), 1)[0]
    plain = torch.full((2, 4), torch.finfo(torch.float64).smallest_normal / 3, dtype=torch.float64)
    halved = plain / 8 * weights.values  # digits are lost on the way
    assert weights.agree(halved * 8, plain)
    assert not weights.agree(torch.full((2, 4), math.nan), plain)
