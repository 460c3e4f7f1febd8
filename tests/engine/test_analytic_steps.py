"""Analytic steps beyond PyTorch's cells: several kinds in a block, several maps of one part, several readouts."""

import pytest
import torch
from helpers.analytic_cells import TwoMaps
from helpers.plain_autograd import assert_exact
from helpers.strategies import normal
from helpers.toy_cells import seeded
from torch import Tensor, nn

import rtrl


@pytest.mark.parametrize("block", [1, 3, 7])
def test_two_maps_of_one_part_of_the_state_are_exact(block: int) -> None:
    assert_exact(seeded(TwoMaps(), 3), list(normal(1, 7, 2, 3)), 2, block=block)


def test_analytic_steps_of_several_kinds_in_a_block_are_exact() -> None:
    """Losses reach the next state: what they leave there joins the adjoint between groups."""
    xs = [x if t % 3 else (3 * x).round().long() for t, x in enumerate(normal(1, 8, 2, 3))]
    assert_exact(seeded(TwoMaps(), 3), xs, 2, block=4)


class TwoHeads(nn.Module):
    """Two linear readouts of equal shape."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        return {"one": self.one(h), "two": 3 * self.two(h)}


@pytest.mark.parametrize("block", [1, 4])
def test_each_of_two_readouts_is_given_the_weights_of_its_own_loss(block: int) -> None:
    cell = seeded(rtrl.cells.from_torch(nn.GRUCell(2, 3), TwoHeads()), 1)
    loss = lambda y: y["one"].square().sum() + y["two"].sin().sum()
    assert_exact(cell, list(normal(2, 6, 2, 2)), 2, block=block, loss=loss)


def test_the_slope_of_relu_at_zero_is_that_of_autograd() -> None:
    cell = rtrl.cells.from_torch(nn.RNNCell(2, 3, nonlinearity="relu")).double()
    with torch.no_grad():
        for name, p in cell.named_parameters():
            p.copy_(normal(1, *p.shape) if name == "cell.weight_ih" else torch.zeros_like(p))
        cell.cell.weight_ih[1] = 0.0
    assert_exact(cell, list(normal(2, 6, 2, 2)), 2, block=3)
