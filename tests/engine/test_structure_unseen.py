"""Parameters that are used by code that PyTorch does not dispatch from Python: no structure is taken for granted."""

import pytest
import torch
from helpers.running import run
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import seeded
from torch import Tensor, nn

import oracles


class Columns(nn.Module):
    """Units of one form side by side by ``torch.func.vmap``, which takes the parameters out of reach."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.enter, self.decay = nn.Parameter(torch.empty(n, 2)), nn.Parameter(torch.empty(n))

    def init_state(self, batch_size: int) -> Tensor:
        return self.decay.new_full((batch_size, len(self.decay)), 0.1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        unit = lambda weight, decay, state: torch.tanh(x @ weight + decay * state)
        h = torch.func.vmap(unit, in_dims=(0, 0, 1), out_dims=1)(self.enter, self.decay, h)
        return h, h


@pytest.mark.filterwarnings("ignore:.*linearised sample by sample")
def test_what_such_parameters_reach_is_not_taken_for_nothing() -> None:
    cell, xs = seeded(Columns(), 0), torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 2, 2)
    loss = lambda t, y: y.square().sum()
    found = run(cell, xs, loss, block=2, audit="off")
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss))
