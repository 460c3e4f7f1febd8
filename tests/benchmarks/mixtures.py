"""Mixtures that declare otherwise than they should, or whose choices are prescribed: for controls and comparisons."""

from dataclasses import replace
from typing import Any

import torch
from helpers.toy_cells import ForcedMoE
from problems import Problem
from torch import Tensor

from rtrl import Sparsity
from rtrl.verification.harness.problems import DECLARE_NOTHING, HideSparsity


def undeclared(problem: Problem) -> Problem:
    """The mixture without any declaration: the learner takes it for a dense cell."""
    return replace(problem, cell=HideSparsity(problem.cell, **DECLARE_NOTHING))


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
