"""What is timed and counted: a cell, a stream and a loss at every step, drawn from a seed."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rtrl

MODULES = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


@dataclass(frozen=True)
class Problem:
    """A cell with its stream, which starts again when it is over.

    Args:
        xs: (T, B, inputs). targets: (T, B, outputs) of the squared error at every step.
    """

    cell: nn.Module
    xs: Tensor
    targets: Tensor

    @property
    def hidden(self) -> int:
        """H, the numbers in the state of one sample."""
        return self.cell.init_state(1)[0].numel()  # type: ignore[operator]

    @property
    def parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.cell.parameters())

    def x(self, t: int) -> Tensor:
        return self.xs[t % len(self.xs)]

    def loss(self, t: int, y: Any) -> Tensor:
        return (y - self.targets[t % len(self.targets)]).square().sum()

    def own_cell(self) -> nn.Module:
        """A copy of the cell, for one side of a comparison."""
        return copy.deepcopy(self.cell)

    def sample(self, b: int) -> "Problem":
        """The stream of one sample alone, as a batch of 1."""
        return Problem(self.cell, self.xs[:, b : b + 1], self.targets[:, b : b + 1])


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(
    kind: str, hidden: int, inputs: int | None = None, *, steps: int = 64, dtype: torch.dtype = torch.float32
) -> Problem:
    """One of PyTorch's cells, y its new state; ``inputs = hidden`` by default."""
    inputs = hidden if inputs is None else inputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell = rtrl.cells.from_torch(MODULES[kind](inputs, hidden, dtype=dtype))
    return Problem(cell, drawn(1, steps, 1, inputs, dtype=dtype), drawn(2, steps, 1, hidden, dtype=dtype))


def mixture(
    d_model: int, n_slots: int, n_experts: int, *, batch: int = 1, steps: int = 64, dtype: torch.dtype = torch.float32
) -> Problem:
    """``RecurrentMoE`` with 8 inputs and 4 outputs, 2 of the slots read and written and 2 experts used a step."""
    generator = torch.Generator().manual_seed(0)
    cell = rtrl.RecurrentMoE(8, 4, d_model, n_slots, n_experts, topk=2, generator=generator, dtype=dtype)
    return Problem(cell, drawn(1, steps, batch, 8, dtype=dtype), drawn(2, steps, batch, 4, dtype=dtype))
