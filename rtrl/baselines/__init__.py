"""What online gradients are compared with: learners with the interface of ``rtrl.BlockRTRL``, exact, truncated,
masked, random or local. They are written to be read, not to be fast."""

from rtrl.baselines.bptt import BPTT, TBPTT
from rtrl.baselines.dense import DenseRTRL
from rtrl.baselines.local import RFLO, DiagonalRTRL
from rtrl.baselines.snap import SnAp
from rtrl.baselines.uoro import UORO

__all__ = ["BPTT", "RFLO", "TBPTT", "UORO", "DenseRTRL", "DiagonalRTRL", "SnAp"]
