"""What a claim is, and what measuring it gives: a verdict, the figures behind it, tables and plots for people."""

from collections.abc import Callable
from dataclasses import dataclass

from rtrl.report.model import Finding, Plot, Series, Table, Verdict

__all__ = ["Claim", "Finding", "Plot", "Progress", "Series", "Settings", "Table", "Verdict"]

Progress = Callable[[str, int, int], None]
"""Called before every piece of work with its name, how many pieces are done and how many there are."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the claims are measured.

    Attributes:
        full: the long form: longer streams, more seeds, larger models. seed: of everything that is drawn.
        device: the torch device to measure on, where a claim leaves it open.
    """

    full: bool = False
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: its name, what was claimed, and the function that measures it.

    The docstring of the module that holds it says how it is measured, why that is a fair test, and what it leaves
    open.
    """

    id: str
    claimed: str
    measure: Callable[[Settings, Progress], Finding]
