"""The model of results: what a measurement writes, and what a page, a picture or a table is made from.

Plain values alone: a record can be written to a file and read back without any claim being imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, get_args

SCHEMA = 2
"""The form of a results file; it changes whenever a reader of the old form would misread the new one."""

Cell = str | bool | int | float | None
"""A value of a table; None is an empty cell."""

Verdict = Literal["holds", "holds when", "does not hold", "not measured at the claimed size", "not measured"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

Question = Literal["", "exact", "learns", "memory", "clock", "rivals"]
"""What the results page asks first: are gradients exact, does it learn, does it need less memory, is it faster by the
clock, is it better than its rivals; "" for none of them."""


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
        low: the lower ends of the spread around ``y``, as many as ``x``; empty for no spread.
        high: the upper ends of the spread.
    """

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    dashed: bool = False
    low: Sequence[float | None] = field(default_factory=list)
    high: Sequence[float | None] = field(default_factory=list)

    @classmethod
    def of_runs(cls, name: str, x: Sequence[float], runs: Sequence[Sequence[float]]) -> "Series":
        """Make the median of several runs, and the spread from the lowest to the highest.

        Args:
            name: the name in the legend.
            x: the horizontal coordinates of all runs.
            runs: the vertical coordinates of each run, as many as ``x``.

        Returns:
            A series with a spread.
        """
        columns = list(zip(*runs, strict=True))
        values = [[float(pick(column)) for column in columns] for pick in (median, min, max)]
        return cls(name, [float(value) for value in x], values[0], low=values[1], high=values[2])


@dataclass(frozen=True, slots=True)
class VerticalLine:
    """A vertical line in a plot, such as the place of a crossover.

    Attributes:
        x: where it stands.
        label: what it marks, in a few words.
    """

    x: float | None
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of numbers.

    Attributes:
        title: what the picture shows.
        x_label: the name and unit of the horizontal axis.
        y_label: the name and unit of the vertical axis.
        series: the lines or marks.
        kind: "line"; "points" for points without a line, whose spread is an error bar; or "raster" for points at whole
            y, such as the experts used at each step.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is logarithmic.
        vertical_lines: lines such as the place of a crossover, each with its label.
        x_names: the names of x = 0, 1, …, where x is a category and not a number; empty where it is a number.
        y_names: the names of y = 0, 1, …, likewise.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    kind: Literal["line", "points", "raster"] = "line"
    log_x: bool = False
    log_y: bool = False
    vertical_lines: list[VerticalLine] = field(default_factory=list)
    x_names: list[str] = field(default_factory=list)
    y_names: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Finding:
    """What measuring one claim came to.

    Attributes:
        result: what was measured, in a few words with its unit: "3.1 × (2.4 × against lazy=False)".
        threshold: what the claim asks of the result: "≥ 2.72 ×".
        verdict: whether the claim holds; computed from the measurement, never stored in the code.
        condition: of "holds when" the condition and where it crosses over; of "does not hold" what is true instead;
            of "not measured at the claimed size" what was found at the measured one; of "not measured" the reason.
        failures: ways in which the code does not behave as its documentation says, one line each. A claim that does
            not hold is a finding, not a failure.
        tables: the measurements as tables.
        plots: the measurements as pictures.
        data: the measurements for programs; plain JSON values.
        headline: the result as one plain sentence for the top of the results page, made from the measurements; may be
            empty.
        model: what the verdict was measured on: "GRU, P = 3.2 k, H = 32, T = 500, seeds 0–4"; may be empty.
    """

    result: str
    threshold: str
    verdict: Verdict
    condition: str = ""
    failures: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    headline: str = ""
    model: str = ""


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
        headline: the result as one plain sentence.
        model: what the verdict was measured on.
        id: the name of the claim: letters, digits, "_" and "-".
        claimed: what was claimed, in one sentence.
        explanation: how the claim is measured, why that is fair and what it leaves open; may be empty.
        duration_s: seconds that the measurement took; None if unknown.
        question: the question of the results page that the claim belongs to.
        tried: the breaks with which the claim was measured, each a fault planted in the code.
        noticed: those of them that changed the verdict.
        no_break: why no break can change the verdict; may be empty.
        kept: whether the result was taken from an earlier file and not measured in this run.
        measured: when it was measured, in ISO 8601; empty if unknown.
    """

    id: str
    claimed: str
    explanation: str = ""
    duration_s: float | None = None
    question: Question = ""
    tried: list[str] = field(default_factory=list)
    noticed: list[str] = field(default_factory=list)
    no_break: str = ""
    kept: bool = False
    measured: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One run: how, where and when it was measured, and the results of all its claims.

    Attributes:
        created: when the record was written, in ISO 8601.
        command: the command that wrote it.
        mode: the form of the run: "quick", "full", or "small" of the matrix of breaks.
        seed: the seed of everything that was drawn.
        machine: properties of the machine by name; those ending in "_bytes" are numbers of bytes.
        versions: versions of software by name.
        duration_s: seconds that all claims took together; None if unknown.
        claims: the results, in the order in which they are shown.
        device: the device that was measured.
        code: the digest of the code that was measured; empty if unknown.
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
    code: str = ""
