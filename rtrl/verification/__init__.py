"""The project's claims, and the run that measures them.

A claim is data and functions (``claim.Claim``): how it is measured, judged and shown. Threads, seeds, time, voided
verdicts and the record belong to ``runner`` and ``record``. This package may import the oracles, as ``rtrl.testing``
may; nothing else in ``rtrl`` does.
"""

from rtrl.verification.claim import Claim, Measurements, NotMeasured
from rtrl.verification.registry import claims, select

__all__ = ["Claim", "Measurements", "NotMeasured", "claims", "select"]
