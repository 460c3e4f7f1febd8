"""What is timed and counted: a cell, a stream and a loss at every step, drawn from a seed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import structured_cells
from helpers.unlasting_cells import Feedback
from torch import Tensor, nn

import rtrl

MODULES = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
ROWS: dict[str, Callable[[int, int], structured_cells.Layer]] = {
    "minGRU": structured_cells.MinGRU,
    "eLSTM": structured_cells.ElementwiseLSTM,
    "LRU": structured_cells.ComplexDiagonal,
    "RTU": lambda d, n: structured_cells.ComplexDiagonal(d, n, nonlinear=True),
}
"""Plain modules with independent rows, which declare nothing."""
DECLARED: dict[str, Callable[[int, int], nn.Module]] = {
    "rtrl.cells.MinGRU": rtrl.cells.MinGRU,
    "rtrl.cells.ElementwiseLSTM": rtrl.cells.ElementwiseLSTM,
    "rtrl.cells.LRU": rtrl.cells.LRU,
    "rtrl.cells.RTU": rtrl.cells.RTU,
}
PLAIN: dict[str, Callable[[int, int], nn.Module]] = {**ROWS, **DECLARED, "tanh": structured_cells.Dense}
""""tanh" is what a user writes in the place of ``nn.RNNCell``."""


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


def plain(
    kind: str, hidden: int, inputs: int | None = None, *, steps: int = 64, dtype: torch.dtype = torch.float32
) -> Problem:
    """A cell of ``PLAIN``; ``inputs = hidden`` by default."""
    inputs = hidden if inputs is None else inputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell = PLAIN[kind](inputs, hidden).to(dtype)
    xs = drawn(1, steps, 1, inputs, dtype=dtype)
    with torch.no_grad():
        y = cell(xs[0], cell.init_state(1))[0]  # type: ignore[operator]
    return Problem(cell, xs, drawn(2, steps, *y.shape, dtype=dtype))


def layers(kind: str, hidden: int, inputs: int, *, steps: int = 64, dtype: torch.dtype = torch.float32) -> Problem:
    """Two of ``ROWS`` above one another, as a plain module ("minGRU + minGRU"), or with "feedback" from the upper."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "feedback":
            cell: nn.Module = Feedback(inputs, hidden)
        else:
            below, above = kind.split(" + ")
            cell = structured_cells.Layers([ROWS[below](inputs, hidden), ROWS[above](hidden, hidden)], inputs)
    xs = drawn(1, steps, 1, inputs, dtype=dtype)
    return Problem(cell.to(dtype), xs, drawn(2, steps, 1, hidden, dtype=dtype))


def mixture(
    d_model: int, n_slots: int, n_experts: int, *, batch: int = 1, steps: int = 64, dtype: torch.dtype = torch.float32
) -> Problem:
    """``RecurrentMoE`` with 8 inputs and 4 outputs, 2 of the slots read and written and 2 experts used a step."""
    generator = torch.Generator().manual_seed(0)
    cell = rtrl.RecurrentMoE(8, 4, d_model, n_slots, n_experts, topk=2, generator=generator, dtype=dtype)
    return Problem(cell, drawn(1, steps, batch, 8, dtype=dtype), drawn(2, steps, batch, 4, dtype=dtype))
