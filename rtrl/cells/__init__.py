"""Cells: the protocol, the recurrent mixture of experts, and ways to make cells of other modules."""

import warnings

from rtrl.cells.analytic import AnalyticStep, UnitTap
from rtrl.cells.grouped_linear import grouped_linear
from rtrl.cells.module_cell import ModuleCell
from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Cell, Sparsity
from rtrl.cells.routing import MoEOutput, RouterStatistics, load_balancing_loss, router_statistics
from rtrl.cells.stack import Stack
from rtrl.cells.torch_cells import TorchCell, TorchLayers, from_torch

__all__ = [
    "AnalyticStep",
    "Cell",
    "MoEOutput",
    "ModuleCell",
    "RecurrentMoE",
    "RouterStatistics",
    "Sparsity",
    "Stack",
    "TorchCell",
    "TorchLayers",
    "UnitTap",
    "from_torch",
    "grouped_linear",
    "load_balancing_loss",
    "router_statistics",
]


def __getattr__(name: str) -> type[AnalyticStep]:
    if name == "ClosedForm":
        warnings.warn(
            "rtrl.cells.ClosedForm is called AnalyticStep now; the old name works in this release only",
            DeprecationWarning,
            stacklevel=2,
        )
        return AnalyticStep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
