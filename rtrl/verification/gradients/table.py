"""The results of a claim as a table for people."""

from rich.table import Table
from rich.text import Text

from rtrl.verification.gradients.equivalence import Result, Row
from rtrl.verification.harness.compare import Comparison


def table(result: Result) -> Table:
    """One line a row: what was compared, how far apart the two are, how the experts slept, and whether that passes."""
    out = Table(title="Gradient equivalence", caption=_caption(result), caption_justify="left")
    for name in ("oracle", "learning"):
        out.add_column(name)
    for name in (
        "block",
        "window",
        "steps",
        "gradient\nerror",
        "influence\nerror",
        "tolerance",
        "dormant slices\ncaught up",
        "longest\nsleep",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("verdict", no_wrap=True)
    for row in result.rows:
        out.add_row(
            row.oracle,
            row.learning,
            str(row.block),
            str(row.window),
            str(row.steps),
            _error(row.gradient),
            "" if row.influence is None else _error(row.influence),
            f"{row.gradient.tolerance:.0e}",
            f"{row.sleep.woken} + {row.sleep.asleep}",
            str(row.sleep.longest),
            _verdict(row),
            end_section=_last_of_its_kind(result.rows, row),
        )
    return out


def verdict(result: Result) -> str:
    """The one line that sums the claim up."""
    failed = sum(not row.passed for row in result.rows)
    if result.passed:
        worst = max(row.gradient.error for row in result.rows if row.oracle != "finite differences")
        return (
            f"PASS: all {len(result.rows)} rows agree; "
            f"the largest error of an algebraic oracle is {worst:.1e} ({result.duration_s:.0f} s)"
        )
    first = f"; first: {result.failures[0]}"
    return f"FAIL: {failed} of {len(result.rows)} rows disagree{first} ({result.duration_s:.0f} s)"


def _error(comparison: Comparison) -> Text:
    if comparison.problem is not None or comparison.compared == 0:
        return Text("void", style="bold red")
    return Text(f"{comparison.error:.1e}", style="" if comparison.passed else "bold red")


def _verdict(row: Row) -> Text:
    return Text("pass", style="green") if row.passed else Text("FAIL", style="bold red")


def _last_of_its_kind(rows: list[Row], row: Row) -> bool:
    place = next(i for i, other in enumerate(rows) if other is row)
    following = rows[place + 1] if place + 1 < len(rows) else row
    return (following.learning, following.block) != (row.learning, row.block)


def _caption(result: Result) -> str:
    broken = "" if result.settings.broken is None else f"\nThe learner is broken on purpose: {result.settings.broken}."
    return (
        f"Text: {result.stream['source']}, {result.settings.batch_size} samples, seed {result.settings.seed}. Errors "
        "are relative, "
        "in float64; finite differences are held to their own error estimate. Dormant slices caught up: (sample, "
        "expert) pairs woken "
        f"after a whole block asleep + those asleep at the moment of the comparison; sleep in steps.{broken}"
    )
