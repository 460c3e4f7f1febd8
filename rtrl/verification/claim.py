"""What a claim is, and what measuring it gives: a verdict, the figures behind it, tables and plots for people."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "holds when", "does not hold", "not measured"]

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
class Grid:
    """A table of plain values: one row a list as long as ``columns``; numbers stay numbers, None is an empty cell."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float | None]]


@dataclass(frozen=True, slots=True)
class Series:
    """One line or set of marks of a plot. ``dashed`` is for what was predicted rather than measured."""

    name: str
    x: list[float]
    y: list[float]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of numbers: lines through ``series``, or for ``kind="raster"`` marks at (x, y), such as the experts
    used at each step. Units stand in the labels."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    kind: Literal["line", "raster"] = "line"
    log_x: bool = False
    log_y: bool = False


@dataclass(slots=True)
class Finding:
    """What one claim came to in this run.

    Attributes:
        figure: what was measured, in a few words with its unit: "3.1 × (2.4 × against lazy=False)".
        threshold: what the claim asks of it: "≥ 2.72 ×".
        verdict: drawn from the measurement, never stored.
        condition: of "holds when" the condition and where it crosses over; of "does not hold" what is true instead;
            of "not measured" the reason.
        failures: ways in which the code does not behave as its documentation says, a line each. They shut the gate;
            a claim that does not hold is a finding, not a failure.
        grids, plots: the measurements for people. data: for programs; plain JSON values.
    """

    figure: str
    threshold: str
    verdict: Verdict
    condition: str = ""
    failures: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: its name, what was claimed, and the function that measures it.

    The docstring of the module that holds it says how it is measured, why that is a fair test, and what it leaves
    open.
    """

    id: str
    claimed: str
    measure: Callable[[Settings, Progress], Finding]
