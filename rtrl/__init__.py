"""Exact real-time recurrent learning for sparse recurrent cells, in memory that does not grow with time."""

from rtrl import cells, errors
from rtrl._influence.segment_tree import CircularSegmentTree
from rtrl._utils import renamed_modules
from rtrl.cells import RecurrentMoE, Sparsity, Stack, from_torch
from rtrl.costs import Plan, plan
from rtrl.errors import RTRLError
from rtrl.learners import BlockRTRL

__version__ = "0.2.0"

renamed_modules.install()

__all__ = [
    "BlockRTRL",
    "CircularSegmentTree",
    "Plan",
    "RTRLError",
    "RecurrentMoE",
    "Sparsity",
    "Stack",
    "cells",
    "errors",
    "from_torch",
    "plan",
]
