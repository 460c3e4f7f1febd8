"""Faults of training: the optimizer, full backpropagation through time, and the cells themselves."""

from typing import Any

import torch
from torch import Tensor

from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.cells.torch_cells import TorchCell
from rtrl.learners.bptt import BPTT, TBPTT
from rtrl.learners.replayed_step import ReplayedStep
from rtrl.verification.broken.fault import Patch, break_, original

KEPT = 5
"""How many steps ``short-bptt`` reaches back through."""


@break_("lost-updates")
def lost_updates(patch: Patch) -> None:
    """The updates of the optimizer are lost: no parameter changes."""
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        patch(kind, "step", lambda self, closure=None: None)


@break_("short-bptt")
def short_bptt(patch: Patch) -> None:
    """Full backpropagation through time reaches back through five steps alone."""
    process = original(BPTT, "_process_step")

    def short(self: BPTT, step: ReplayedStep) -> None:
        process(self, step)
        if len(self._kept_steps) > KEPT:
            self._flush(dormant=True)
            self._kept_steps = self._kept_steps[-KEPT:]

    patch(BPTT, "_process_step", short)


@break_("long-tbptt")
def long_tbptt(patch: Patch) -> None:
    """Truncated backpropagation through time reaches back through four times the steps that were asked for."""
    init = original(TBPTT, "__init__")

    def make(self: TBPTT, cell: Any, batch_size: int, horizon: int, **options: Any) -> None:
        init(self, cell, batch_size, 4 * horizon, **options)

    patch(TBPTT, "__init__", make)


def _steps_of_mixtures(patch: Patch, step: Any) -> None:
    """Let every mixture take its steps by ``step(forward, cell, x, h, replay)``."""
    forward = original(RecurrentMoE, "forward")

    def taken(self: RecurrentMoE, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> Any:
        return step(forward, self, x, h, replay)

    patch(RecurrentMoE, "forward", taken)


@break_("forgetful-cell")
def forgetful_cell(patch: Patch) -> None:
    """Cells do not read their state: every step begins as if from zeros."""
    forward = original(TorchCell, "forward")

    def mixture(forward: Any, cell: RecurrentMoE, x: Tensor, h: Tensor, replay: Sparsity | None) -> Any:
        y, written, used = forward(cell, x, torch.zeros_like(h), replay)
        index = used.writes.unsqueeze(-1).expand(*used.writes.shape, h.shape[2])
        return y, h.scatter(1, index, written.gather(1, index)), used

    _steps_of_mixtures(patch, mixture)
    patch(TorchCell, "forward", lambda self, x, h: forward(self, x, torch.zeros_like(h)))
    patch(TorchCell, "unroll", lambda self, xs, h: None)
    patch(TorchCell, "analytic_step", lambda self, x, h: None)


@break_("collapsed-router")
def collapsed_router(patch: Patch) -> None:
    """Every mixture uses its first experts at every step, instead of those that the router chooses."""

    def step(forward: Any, cell: RecurrentMoE, x: Tensor, h: Tensor, replay: Sparsity | None) -> Any:
        if replay is None:
            with torch.no_grad():
                used = forward(cell, x, h)[2]
            experts = torch.arange(cell.topk, device=h.device).expand(h.shape[0], -1)
            replay = cell.choices(used.reads, used.writes, experts)
        return forward(cell, x, h, replay)

    _steps_of_mixtures(patch, step)


@break_("frozen-router")
def frozen_router(patch: Patch) -> None:
    """The router of every mixture is not trained."""
    init = original(RecurrentMoE, "__init__")

    def make(self: RecurrentMoE, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.router.weight.requires_grad_(False)

    patch(RecurrentMoE, "__init__", make)


@break_("hidden-expert")
def hidden_expert(patch: Patch) -> None:
    """Every mixture also uses its last expert, which it does not declare."""

    def step(forward: Any, cell: RecurrentMoE, x: Tensor, h: Tensor, replay: Sparsity | None) -> Any:
        y, h_next, used = forward(cell, x, h, replay)
        index = used.writes.unsqueeze(-1).expand(*used.writes.shape, h.shape[2])
        return y, h_next.scatter_add(1, index, 1e-3 * cell.expert_up[-1].sum().expand(index.shape)), used

    _steps_of_mixtures(patch, step)


@break_("hidden-write")
def hidden_write(patch: Patch) -> None:
    """Every mixture also writes one slot more than it declares."""

    def step(forward: Any, cell: RecurrentMoE, x: Tensor, h: Tensor, replay: Sparsity | None) -> Any:
        y, h_next, used = forward(cell, x, h, replay)
        more = torch.zeros_like(h_next)
        unwritten = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device).scatter(1, used.writes, False)
        more[torch.arange(len(h)), unwritten.int().argmax(dim=1)] = 1e-3
        return y, h_next + more, used

    _steps_of_mixtures(patch, step)
