"""Exact real-time recurrent learning for sparse recurrent cells, in memory that does not grow with time."""

from rtrl import cells, errors
from rtrl.cells import RecurrentMoE, Sparsity
from rtrl.errors import RTRLError
from rtrl.learner import BlockRTRL
from rtrl.planning import Plan, plan
from rtrl.segment_tree import CircularSegmentTree

__version__ = "0.1.0"

__all__ = [
    "BlockRTRL",
    "CircularSegmentTree",
    "Plan",
    "RTRLError",
    "RecurrentMoE",
    "Sparsity",
    "cells",
    "errors",
    "plan",
]
