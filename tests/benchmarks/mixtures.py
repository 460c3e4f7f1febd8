"""Mixtures that declare otherwise than they should, or whose choices are prescribed: for controls and comparisons."""

from typing import Any

import torch
from helpers.toy_cells import ForcedMoE
from problems import Problem
from torch import Tensor, nn

from rtrl import Sparsity


class Undeclared(nn.Module):
    """A mixture that does not declare what it touches: the learner takes it for a dense cell."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def init_state(self, batch_size: int) -> Tensor:
        return self.cell.init_state(batch_size)  # type: ignore[operator]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(x, h)[:2]  # type: ignore[no-any-return]


class Union(ForcedMoE):
    """Each sample chooses for itself and declares what any of the batch chose: right, and wasteful."""

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        y, h_next, used = super().forward(x, h)
        if replay is not None:
            return y, h_next, replay

        def union(index: Tensor) -> Tensor:
            return index.unique().expand(len(index), -1)

        assert used.reads is not None and used.writes is not None
        active = {name: union(index) for name, index in used.active.items()}
        return y, h_next, Sparsity(union(used.reads), union(used.writes), active)


def forced(problem: Problem, union: bool = False) -> Problem:
    """The choices that the mixture makes on its stream, written into the stream."""
    cell: Any = problem.cell
    h, rows = cell.init_state(problem.xs.shape[1]), []
    with torch.no_grad():
        for x in problem.xs:
            _, h, used = cell(x, h)
            rows.append(torch.cat([x, used.reads, used.writes, used.active["expert_up"]], dim=-1))
    widths = (cell.read_slots, cell.write_slots, cell.topk)
    return Problem((Union if union else ForcedMoE)(cell, widths), torch.stack(rows), problem.targets)
