"""What online gradients are compared with: learners with the interface of ``rtrl.BlockRTRL``, exact, truncated,
masked, random or local. They are written to be read, not to be fast."""

from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.learners.bptt import BPTT, TBPTT
from rtrl.learners.dense import DenseRTRL
from rtrl.learners.local import RFLO, DiagonalRTRL
from rtrl.learners.snap import SnAp
from rtrl.learners.uoro import UORO

__all__ = ["BPTT", "RFLO", "TBPTT", "UORO", "BlockRTRL", "DenseRTRL", "DiagonalRTRL", "SnAp"]
