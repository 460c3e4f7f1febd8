"""The model of results: what a measurement writes, and what a page, a picture or a table is made from.

Plain values alone: a record can be written to a file and read back without any claim being imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

SCHEMA = 2
"""The form of a results file; it changes whenever a reader of the old form would misread the new one."""

Cell = str | bool | int | float | None
"""A value of a table; None is an empty cell."""

Verdict = Literal["holds", "holds when", "does not hold", "not measured"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain values.

    Attributes:
        title: what the table shows; may be empty.
        columns: the heading of every column, with its unit.
        rows: lists as long as ``columns``; numbers stay numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one set of marks, of a plot.

    Attributes:
        name: its name in the legend.
        x: the horizontal coordinates; None is a gap.
        y: the vertical coordinates, as many as ``x``.
        dashed: whether the numbers were predicted rather than measured.
    """

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of numbers.

    Attributes:
        title: what the picture shows.
        x_label: the name and unit of the horizontal axis.
        y_label: the name and unit of the vertical axis.
        series: the lines or marks.
        kind: "line", or "raster" for marks at (x, y), such as the experts used at each step.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    kind: Literal["line", "raster"] = "line"
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What measuring one claim came to.

    Attributes:
        result: what was measured, in a few words with its unit: "3.1 × (2.4 × against lazy=False)".
        threshold: what the claim asks of the result: "≥ 2.72 ×".
        verdict: whether the claim holds; computed from the measurement, never stored in the code.
        condition: of "holds when" the condition and where it crosses over; of "does not hold" what is true instead;
            of "not measured" the reason.
        failures: ways in which the code does not behave as its documentation says, one line each. A claim that does
            not hold is a finding, not a failure.
        tables: the measurements as tables.
        plots: the measurements as pictures.
        data: the measurements for programs; plain JSON values.
    """

    result: str
    threshold: str
    verdict: Verdict
    condition: str = ""
    failures: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimResult(Finding):
    """The finding of a claim, together with the claim's name and words.

    Attributes:
        result: what was measured, as in the finding.
        threshold: what the claim asks of the result.
        verdict: whether the claim holds.
        condition: when it holds, what is true instead, or why it was not measured.
        failures: ways in which the code does not behave as documented.
        tables: the measurements as tables.
        plots: the measurements as pictures.
        data: the measurements for programs.
        id: the name of the claim: letters, digits, "_" and "-".
        claimed: what was claimed, in one sentence.
        explanation: how the claim is measured, why that is fair and what it leaves open; may be empty.
        duration_s: seconds that the measurement took; None if unknown.
    """

    id: str
    claimed: str
    explanation: str = ""
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One run: how, where and when it was measured, and the results of all its claims.

    Attributes:
        created: when the record was written, in ISO 8601.
        command: the command that wrote it.
        mode: the form of the run: "quick" or "full".
        seed: the seed of everything that was drawn.
        machine: properties of the machine by name; those ending in "_bytes" are numbers of bytes.
        versions: versions of software by name.
        duration_s: seconds that all claims took together; None if unknown.
        claims: the results, in the order in which they are shown.
        device: the device that was measured.
    """

    created: str
    command: str
    mode: str
    seed: int
    machine: dict[str, Cell]
    versions: dict[str, Cell]
    duration_s: float | None
    claims: list[ClaimResult]
    device: str = "cpu"
