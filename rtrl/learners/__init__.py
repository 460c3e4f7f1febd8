"""Learners: exact RTRL in blocks, and what it is compared with, exact, truncated, masked, random or local.

Those beside ``BlockRTRL`` are written to be read, not to be fast.
"""

from rtrl.learners.audit import Audits, audits_in_this_process
from rtrl.learners.base import Learner
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.learners.bptt import BPTT, TBPTT
from rtrl.learners.influence_learner import DenseRTRL
from rtrl.learners.layer_local import LayerLocal
from rtrl.learners.local import RFLO, DiagonalRTRL
from rtrl.learners.snap import SnAp
from rtrl.learners.uoro import UORO

__all__ = [
    "BPTT",
    "RFLO",
    "TBPTT",
    "UORO",
    "Audits",
    "BlockRTRL",
    "DenseRTRL",
    "DiagonalRTRL",
    "LayerLocal",
    "Learner",
    "SnAp",
    "audits_in_this_process",
]
