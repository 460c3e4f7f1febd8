"""Cells: the protocol, the recurrent mixture of experts, and ways to make cells of other modules."""

from rtrl._utils.renamed_names import renamed_names
from rtrl.cells.analytic import AnalyticStep, UnitTap
from rtrl.cells.columns import Columns
from rtrl.cells.complex_diagonal import LRU, RTU
from rtrl.cells.complex_state import RealState
from rtrl.cells.gated import ElementwiseLSTM, MinGRU
from rtrl.cells.grouped_linear import grouped_linear
from rtrl.cells.module_cell import ModuleCell
from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Cell, Sparsity
from rtrl.cells.routing import MoEOutput, RouterStatistics, load_balancing_loss, router_statistics
from rtrl.cells.sequences import HasUnroll
from rtrl.cells.stack import Stack
from rtrl.cells.torch_cells import TorchCell, TorchLayers, from_torch

__all__ = [
    "LRU",
    "RTU",
    "AnalyticStep",
    "Cell",
    "Columns",
    "ElementwiseLSTM",
    "HasUnroll",
    "MinGRU",
    "MoEOutput",
    "ModuleCell",
    "RealState",
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

__getattr__ = renamed_names(__name__, {"ClosedForm": "AnalyticStep"})
