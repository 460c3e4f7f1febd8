"""A plot of the record as a figure of matplotlib, without a window and without the user's own settings of it."""

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rtrl._utils.formatting import number
from rtrl.errors import ConfigError
from rtrl.report.model import Plot, Series
from rtrl.report.style import MARKS, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 5.0  # inches; at 10 points a letter, a phone still shows it large enough to read
MARKED = 40  # points of a line that all have their marks
PARTS = 8  # marks of a line that has more points
LETTERS = 40  # of names that stand beside one another below the axis
SMALLEST_LOG = 1e-250  # on a logarithmic axis, whose margins must be numbers too; its inverse is the largest


def drawn(plot: Plot, series: Series) -> list[tuple[float, float]]:
    """The points that the axes have room for: both numbers are there, and above 0 where an axis is logarithmic."""
    return [
        (x, y)
        for x, y in zip(series.x, series.y, strict=True)
        if x is not None and y is not None and _fits(x, plot.log_x) and _fits(y, plot.log_y)
    ]


def axis_text(value: float, names: Sequence[str]) -> str:
    """A coordinate for people: the name of a category, or a number."""
    return names[int(value)] if _whole(value) and 0 <= value < len(names) else number(value)


def left_out(plot: Plot) -> int:
    """The number of measured points that a logarithmic axis has no room for."""
    present = sum(x is not None and y is not None for s in plot.series for x, y in zip(s.x, s.y, strict=True))
    return present - sum(len(drawn(plot, series)) for series in plot.series)


def _fits(value: float, log: bool) -> bool:
    return not log or SMALLEST_LOG <= value <= 1 / SMALLEST_LOG


def picture(plot: Plot, style: Style, form: str, salt: str) -> bytes:
    """The plot as a file of the form "svg", "pdf" or "png"; the same plot and salt give the same bytes.

    ``salt`` goes into the names inside an SVG, and is found as text in a file of any form.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with _matplotlib(style, salt):
        out = BytesIO()
        figure = _figure(plot, style)
        figure.savefig(out, format=form, transparent=True, dpi=200, metadata=_metadata(form, plot, salt))
    return out.getvalue()


def _metadata(form: str, plot: Plot, salt: str) -> dict[str, Any]:
    metadata: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"Title": plot.title, "Keywords": salt, "CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Title": plot.title, "Comment": salt, "Software": None},
    }
    return metadata[form]


@contextmanager
def _matplotlib(style: Style, salt: str) -> Iterator[None]:
    try:
        import matplotlib.style
    except ImportError as error:
        raise ConfigError(
            "pictures are drawn by matplotlib, which is not installed: pip install 'rtrl[report]'"
        ) from error
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "pdf.fonttype": 42,
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.linewidth": 0.8,
        "path.simplify_threshold": 0.25,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), style.ink),
    }
    with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
        # The font that widths are measured with lacks a letter; the text stays text, and a reader has others.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        yield


def _figure(plot: Plot, style: Style) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = sorted({y for series in plot.series for _, y in drawn(plot, series)}) if plot.kind == "raster" else []
    bars = bool(levels) and len(levels) <= 256 and all(_whole(y) for y in levels)
    row = 0.3 if plot.y_names else 0.14
    height = min(9.0, max(1.6, 0.9 + row * (levels[-1] - levels[0] + 1))) if bars else 3.1
    height += 0.085 * max(len(line) for name in plot.x_names for line in _name(name)) if _turned(plot.x_names) else 0.0
    names = [textwrap.fill(series.name, 56) for series in plot.series]
    columns, lines = _legend_size(names)
    figure = Figure(figsize=(WIDTH, height + 0.19 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    handles = (_bars if bars else _lines if plot.kind == "line" else _points)(axes, plot, style)
    if not any(drawn(plot, series) for series in plot.series):
        axes.text(0.5, 0.5, "no points", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        xs, ys = _extent(plot)
        _scale(axes.xaxis, plot.log_x, xs, plot.x_names)
        _scale(axes.yaxis, plot.log_y, ys, plot.y_names, whole=bars)
        _mark(axes, plot, style)
    axes.set_xlabel(textwrap.fill(plot.x_label, 62))
    axes.set_ylabel(textwrap.fill(plot.y_label, 40))
    axes.grid(True, color=style.ink, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if style.titled and plot.title.strip():
        figure.suptitle(textwrap.fill(plot.title, 56), fontsize=10)
    if lines:
        # A name that begins with _ would be left out, and one in front of it takes no room.
        shown = ["\u2060" + name if name.startswith("_") else name for name in names]
        figure.legend(
            handles, shown, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=2.4
        )
    return figure


def _legend_size(names: Sequence[str]) -> tuple[int, int]:
    """Columns and lines of the legend; none where no series has a name."""
    if not any(name.strip() for name in names):
        return 1, 0
    longest = max(len(line) for name in names for line in name.splitlines() or [""])
    columns = max(1, min(len(names), int(WIDTH / (0.075 * longest + 0.6))))
    rows = [names[i : i + columns] for i in range(0, len(names), columns)]
    return columns, sum(max(len(name.splitlines()) or 1 for name in row) for row in rows)


def _lines(axes: "Axes", plot: Plot, style: Style) -> list[Any]:
    handles = []
    for i, series in enumerate(plot.series):
        kept = set(drawn(plot, series))
        points = [
            pair if pair in kept else (math.nan, math.nan) for pair in zip(series.x, series.y, strict=True)
        ]  # what cannot be drawn is a gap
        count = len(points)
        every = 1 if count <= MARKED else max(1, count // PARTS)
        (line,) = axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=style.colours[i % len(style.colours)],
            marker="" if series.dashed else MARKS[i % len(MARKS)],
            markersize=4,
            markevery=(i * every // max(1, len(plot.series)), every),
            linewidth=1.6,
            linestyle=(0, (4, 2.4)) if series.dashed else "-",
            label=f"\u2060{series.name}",
        )
        handles.append(line)
        low, high = zip(*_spread(plot, series), strict=True) if series.low else ((), ())
        if series.low:
            axes.fill_between(
                [math.nan if x is None else x for x in series.x], low, high,
                color=style.colours[i % len(style.colours)], alpha=0.22, linewidth=0,
            )  # fmt: skip
    return handles


def _points(axes: "Axes", plot: Plot, style: Style) -> list[Any]:
    """Points with their error bars; those of several series in one category stand side by side."""
    apart = 0.5 / max(1, len(plot.series)) if plot.x_names else 0.0
    shifts = [apart * (i - (len(plot.series) - 1) / 2) for i in range(len(plot.series))]
    for i, series in enumerate(plot.series):
        for x, (low, high) in zip(series.x, _spread(plot, series), strict=True) if series.low else ():
            if x is not None:
                at = [x + shifts[i]] * 2
                axes.plot(at, [low, high], color=style.colours[i % len(style.colours)], linewidth=1.2)
    return [
        axes.plot(
            [x + shifts[i] for x, _ in drawn(plot, series)],
            [y for _, y in drawn(plot, series)],
            color=style.colours[i % len(style.colours)],
            marker=MARKS[i % len(MARKS)],
            markersize=2.5 if plot.kind == "raster" else 5,
            markerfacecolor="none" if series.dashed else None,
            linestyle="",
        )[0]
        for i, series in enumerate(plot.series)
    ]


def _spread(plot: Plot, series: Series) -> list[tuple[float, float]]:
    """The ends of the spread; on a logarithmic axis what is too low ends at the lowest point of the picture."""
    floor = min(_extent(plot)[1], default=SMALLEST_LOG)

    def at(end: float | None) -> float:
        if end is None:
            return math.nan
        return end if _fits(end, plot.log_y) else floor

    return [(at(low), at(high)) for low, high in zip(series.low, series.high, strict=True)]


def _extent(plot: Plot) -> tuple[list[float], list[float]]:
    """All x and all y that the axes reach over."""
    points = [point for series in plot.series for point in drawn(plot, series)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    xs += [mark.x for mark in plot.vertical_lines if mark.x is not None and _fits(mark.x, plot.log_x)]
    ends = [end for series in plot.series for end in (*series.low, *series.high)]
    return xs, ys + [end for end in ends if end is not None and _fits(end, plot.log_y)]


def _mark(axes: "Axes", plot: Plot, style: Style) -> None:
    """Vertical lines, each with its label above the axes."""
    placed = [mark for mark in plot.vertical_lines if mark.x is not None and _fits(mark.x, plot.log_x)]
    for i, mark in enumerate(placed):
        axes.axvline(mark.x or 0.0, color=style.ink, linewidth=1.2, linestyle=(0, (1, 1.5)))
        across = axes.transAxes.inverted().transform(axes.transData.transform((mark.x or 0.0, 1.0)))[0]
        side = "left" if across < 1 / 3 else "right" if across > 2 / 3 else "center"
        axes.annotate(
            textwrap.fill(mark.label, 40), (mark.x or 0.0, 1.0), (0, 2 + 12 * (len(placed) - 1 - i)),
            xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha=side, va="bottom", fontsize=9,
        )  # fmt: skip


def _bars(axes: "Axes", plot: Plot, style: Style) -> list[Any]:
    """Marks at whole y as bars of one step, neighbours joined into one: a picture of thousands of steps stays small."""
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path

    handles: list[Any] = []
    share = 0.8 / max(1, len(plot.series))
    step = spacing(plot)
    for i, series in enumerate(plot.series):
        colour = style.colours[i % len(style.colours)]
        vertices, codes = [], []
        for y, begin, end in runs(plot, i):
            low = y - 0.4 + share * i
            left, right, high = begin - step / 2, end + step / 2, low + share
            vertices += [(left, low), (right, low), (right, high), (left, high), (left, low)]
            codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
        if vertices:
            axes.add_patch(
                PathPatch(Path(vertices, codes), facecolor=colour, linewidth=0, alpha=0.55 if series.dashed else None)
            )
        handles.append(Patch(facecolor=colour, linewidth=0, alpha=0.55 if series.dashed else None))
    axes.autoscale_view()
    return handles


def spacing(plot: Plot) -> float:
    """The smallest distance between two x of a plot; 1 where there is one x alone."""
    xs = sorted({x for series in plot.series for x, _ in drawn(plot, series)})
    return min((after - before for before, after in pairwise(xs)), default=1.0)


def runs(plot: Plot, index: int) -> list[tuple[float, float, float]]:
    """(y, first x, last x) of every unbroken run of marks of a raster's series, by y and then by x."""
    step = spacing(plot)
    found: list[tuple[float, float, float]] = []
    for y, x in sorted({(y, x) for x, y in drawn(plot, plot.series[index])}):
        if found and found[-1][0] == y and x - found[-1][2] <= step * 1.001:
            found[-1] = (y, found[-1][1], x)
        else:
            found.append((y, x, x))
    return found


def _scale(axis: "Axis", log: bool, values: Sequence[float], names: Sequence[str], whole: bool = False) -> None:
    """Ticks: the values themselves where they are few and apart on a logarithmic axis; numbers a person can read."""
    from matplotlib import ticker

    if names:
        axis.set_ticks(range(len(names)), ["\n".join(_name(name)) for name in names])
        if axis is axis.axes.xaxis:
            axis.axes.set_xlim(-0.5, len(names) - 0.5)
            axis.set_tick_params(rotation=90 if _turned(names) else 0)
        else:
            axis.axes.set_ylim(-0.5, len(names) - 0.5)
        return
    name = "x" if axis is axis.axes.xaxis else "y"
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value, 5)))
    if not log:
        axis.set_major_locator(ticker.MaxNLocator(16 if whole else 6, integer=whole))
        return
    lowest, highest = min(values), max(values)
    set_scale, set_limits = (getattr(axis.axes, f"set_{name}{what}") for what in ("scale", "lim"))
    set_scale("log")
    if highest < 1.5 * lowest:  # a flat line in less than a power of ten has no tick
        lowest, highest = lowest / 3, highest * 3
    margin = (highest / lowest) ** 0.05
    set_limits(lowest / margin, highest * margin)
    decades = math.log10(highest / lowest)
    few = sorted(set(values))
    if len(few) <= 7 and all(b / a > (highest / lowest) ** 0.08 for a, b in pairwise(few)):
        axis.set_major_locator(ticker.FixedLocator(few))
    else:
        steps = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
        axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=7 if decades > 3 else 12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value, 3, whole=1e5)))
    axis.set_minor_locator(ticker.NullLocator())


def _name(name: str) -> list[str]:
    """A name of a category in lines; an empty one is a line, too."""
    return textwrap.wrap(name, 24, break_on_hyphens=False) or [""]


def _turned(names: Sequence[str]) -> bool:
    """Whether names below the axis are set upright, for want of room."""
    return sum(map(len, names)) > LETTERS


def _whole(value: float) -> bool:
    return value == int(value)
