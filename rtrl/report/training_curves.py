"""Curves of training runs: their logs as plots, and their settings and last figures as tables."""

import math
from collections.abc import Sequence
from statistics import fmean

from rtrl.report.model import Cell, Plot, Series, Table, VerticalLine
from rtrl.report.training_log import COLUMNS, TrainingLog

POINTS = 200  # of a curve, at most
WINDOW, LEAST = 20, 5  # one point stands for a twentieth of the rows, and for five at least
LABELS = {"loss": "loss", "score": "score", "bytes_held": "bytes held", "steps_per_s": "steps per second"}

Group = tuple[str, list[TrainingLog]]
"""Runs of equal settings but for the seed, and what to call them."""


def training_plots(logs: Sequence[TrainingLog]) -> list[Plot]:
    """Draw the logs: loss, score, bytes held and speed against steps.

    Runs whose settings differ in the seed alone become one curve: their median, and the spread from the lowest to the
    highest. A single run is smoothed: a point is the mean of a twentieth of the rows, five at least, with their spread.

    Args:
        logs: the logs.

    Returns:
        A plot for each column that has numbers.
    """
    groups = _groups(logs)
    plots = []
    for column in COLUMNS[1:]:
        series = [found for group in groups if (found := _series(group, column)).x]
        if not series:
            continue
        title, end = LABELS[column].capitalize(), max(log.columns["step"][-1] for log in logs if len(log))
        levels, lines = _levels(logs, end) if column == "score" else ([], [])
        label = logs[0].measure if column == "score" and len({log.measure for log in logs}) == 1 else LABELS[column]
        plots.append(Plot(title, "step", label, [*series, *levels], vertical_lines=lines))
    return plots


def training_tables(logs: Sequence[TrainingLog]) -> list[Table]:
    """Return the settings of the logs, and the figures of their last rows.

    Args:
        logs: the logs.

    Returns:
        Two tables: one row per setting and one column per log; one row per log.
    """
    names = list(dict.fromkeys(name for log in logs for name in log.settings))
    titles = [title for title, _ in _titled(logs)]
    settings: list[list[Cell]] = [[name, *(_shown(log.settings.get(name)) for log in logs)] for name in names]
    last: list[list[Cell]] = []
    for title, log in _titled(logs):
        figures: list[Cell] = [_last(log, column) for column in COLUMNS]
        solved = _first_solved(log)
        last.append([title, len(log), *figures, "not yet" if solved is None else solved])
    columns = ["run", "rows", "last step", "loss", "score", "bytes held", "steps per s", "solved at step"]
    return [Table("Last rows", columns, last), Table("Settings", ["setting", *titles], settings)]


def _shown(value: Cell) -> Cell:
    return "" if value is None else value


def _titled(logs: Sequence[TrainingLog]) -> list[tuple[str, TrainingLog]]:
    """The logs with their names, counted where two files have one name."""
    names = [log.name for log in logs]
    return [
        (name if names.count(name) == 1 else f"{name} ({i})", log)
        for i, (name, log) in enumerate(zip(names, logs, strict=True), 1)
    ]


def _groups(logs: Sequence[TrainingLog]) -> list[Group]:
    """Runs of equal settings but for the seed together; a name says in what groups differ."""
    found: dict[str, list[TrainingLog]] = {}
    for log in logs:
        found.setdefault(repr([item for item in sorted(log.settings.items()) if item[0] != "seed"]), []).append(log)
    first = [group[0].settings for group in found.values()]
    names = dict.fromkeys(name for settings in first for name in settings if name != "seed")
    differ = [name for name in names if len({repr(settings.get(name)) for settings in first}) > 1]
    titles = dict(zip(map(id, logs), (title for title, _ in _titled(logs)), strict=True))
    groups = []
    for group in found.values():
        words = ", ".join(f"{name} {group[0].settings.get(name)}" for name in differ)
        seeds = f"{len(group)} runs" if len(group) > 1 else titles[id(group[0])]
        groups.append((f"{words} ({seeds})" if words else seeds, group))
    return groups


def _series(group: Group, column: str) -> Series:
    name, logs = group
    if len(logs) == 1:
        return _smoothed(name, logs[0], column)
    values = [
        {step: value for step, value in zip(log.columns["step"], log.columns[column], strict=True) if value == value}
        for log in logs
    ]
    common = [step for step in values[0] if all(step in one for one in values[1:])]
    steps = common[:: -(-len(common) // POINTS)] if common else []
    return Series.of_runs(name, steps, [[one[step] for step in steps] for one in values])


def _smoothed(name: str, log: TrainingLog, column: str) -> Series:
    """The running mean of a column and its running spread."""
    pairs = zip(log.columns["step"], log.columns[column], strict=True)
    rows = [(step, value) for step, value in pairs if not math.isnan(value)]
    width, points = max(LEAST, len(rows) // WINDOW), min(POINTS, len(rows))
    ends = [(i + 1) * len(rows) // points for i in range(points)]
    parts = [[value for _, value in rows[max(0, end - width) : end]] for end in ends]
    steps = [rows[end - 1][0] for end in ends]
    low, high = ([float(pick(part)) for part in parts] for pick in (min, max))
    return Series(name, steps, [fmean(part) for part in parts], low=low, high=high)


def _levels(logs: Sequence[TrainingLog], end: float) -> tuple[list[Series], list[VerticalLine]]:
    """The scores of guessing and of a solved task; where the only run first solved it."""
    levels = [
        Series(f"{name} {value:.4g}", [0.0, end], [value, value], dashed=True)
        for name in ("chance", "solved")
        for value in dict.fromkeys(getattr(log, name) for log in logs)
    ]
    solved = _first_solved(logs[0]) if len(logs) == 1 else None
    return levels, [] if solved is None else [VerticalLine(solved, f"solved at step {solved:.0f}")]


def _first_solved(log: TrainingLog) -> float | None:
    """The step of the first row whose score is as good as the solved level."""
    upwards = log.solved >= log.chance
    for step, score in zip(log.columns["step"], log.columns["score"], strict=True):
        if score >= log.solved if upwards else score <= log.solved:
            return step
    return None


def _last(log: TrainingLog, column: str) -> Cell:
    """The last number of a column; None without one."""
    return next((value for value in reversed(log.columns[column]) if not math.isnan(value)), None)
