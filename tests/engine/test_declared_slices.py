"""Slices that a step declares active: of weights met in every way, of a weight and its bias apart, and used beyond
what was declared."""

from contextlib import suppress

import pytest
import torch
from helpers.plain_autograd import assert_exact, squares
from helpers.sliced_cells import Cell, MatmulSlices, WeightAndBias, turns
from helpers.strategies import normal
from helpers.toy_cells import seeded
from torch import Tensor, nn
from torch.nn import functional as F

import rtrl
from rtrl.errors import CellError, RTRLError, SparsityError

F64 = torch.float64


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("block", [1, 3])
def test_slices_met_by_a_matrix_product_are_exact(block: int, tokens: int) -> None:
    assert_exact(seeded(MatmulSlices(tokens), 2), turns(2, 4), 2, block=block, window=2)


@pytest.mark.parametrize("bias", ["all", "not declared", "computed"])
@pytest.mark.parametrize("block", [1, 3])
def test_weight_and_bias_that_are_declared_apart_are_exact(bias: str, block: int) -> None:
    assert_exact(seeded(WeightAndBias(bias), 2), turns(1, 3), 2, block=block, window=2)


class Undeclared(Cell):
    """Uses three slices and declares the first one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.w = nn.Parameter(normal(0, 3, 3) if how != "elementwise" else normal(0, 3))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        z = {"linear": F.linear, "matmul": torch.matmul, "elementwise": torch.mul}[self.how](x, self.w)
        h = torch.tanh(z + 0.5 * h)
        return h, h, rtrl.Sparsity(active={"w": torch.zeros(len(x), 1, dtype=torch.int64)})


@pytest.mark.parametrize("how", ["linear", "matmul", "elementwise"])
def test_slices_that_are_used_and_not_declared_are_refused(how: str) -> None:
    learner = rtrl.BlockRTRL(Undeclared(how), 2, block=2)
    learner.backward(squares(learner.step(normal(1, 2, 3))))
    with pytest.raises(SparsityError, match=r"was used that Sparsity\.active does not declare"):
        learner.sync()


class DisobedientAt(Cell):
    """Makes the choices of a replay, except where the second number of x is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 3, dtype=F64))

    def forward(
        self, x: Tensor, h: Tensor, replay: rtrl.Sparsity | None = None
    ) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        index = x[:, :1].long() if replay is None or float(x[0, 1]) > 0 else replay.active["w"]
        h = torch.tanh(h + F.embedding(index, self.w).squeeze(1))
        return h, h, rtrl.Sparsity(active={"w": index})


def test_a_replay_is_held_against_the_choices_at_every_step() -> None:
    learner, replay = rtrl.BlockRTRL(DisobedientAt(), 1), rtrl.Sparsity(active={"w": torch.tensor([[2]])})
    learner.step(torch.tensor([[0.0, 0.0]], dtype=F64), replay=replay)
    with pytest.raises(CellError, match="other choices"):
        learner.step(torch.tensor([[0.0, 1.0]], dtype=F64), replay=replay)


class HalfARow(nn.Module):
    """Writes the first row, and one entry of the second, which it does not declare."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(0, 2, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2, 2, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        other = h[:, 1] + torch.tensor([1.0, 0.0], dtype=F64)
        h = torch.stack([torch.tanh(x @ self.w), other], dim=1)
        return h[:, 0], h, rtrl.Sparsity(None, torch.zeros(len(x), 1, dtype=torch.int64))


def test_a_row_of_which_one_entry_changes_is_refused() -> None:
    with pytest.raises(SparsityError, match="row 1"):
        rtrl.BlockRTRL(HalfARow(), 2).step(normal(1, 2, 2))


def test_more_than_sixteen_pairs_of_slice_and_token_are_exact() -> None:
    """Beyond this number, output Jacobians are multiplied at once."""
    moe = rtrl.RecurrentMoE(
        2, 2, d_model=4, n_slots=5, n_experts=5, topk=4, read_slots=5, write_slots=2, expert_hidden=2, ffn_hidden=2
    )
    assert_exact(seeded(moe, 3), list(normal(1, 4, 2, 2)), 2, block=2)


class Embedded(Cell):
    """Three tokens per step; gradients of a row are divided by how often it occurs in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.recur = nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Linear(3, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.embedding(x).sum(1) + self.recur(h))
        return h, h


@pytest.mark.parametrize("block", [1, 2])
def test_an_embedding_that_scales_by_frequency_is_exact_or_refused(block: int) -> None:
    """Frequencies belong to one call of the cell; those of a block that is run as one batch are others."""
    xs = [torch.tensor([tokens]) for tokens in ([1, 1, 2], [2, 2, 2], [0, 1, 1])]
    with suppress(RTRLError):
        assert_exact(seeded(Embedded(), 0), xs, 1, block=block)
