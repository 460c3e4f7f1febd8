"""``rtrl verify-gradients``: the claim gradient-equivalence in detail, with its own sizes and broken learners."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from rtrl.cli.console import progress, show
from rtrl.cli.results_file import ResultsFile, command
from rtrl.cli.verify import Device, JsonPath, Seed
from rtrl.errors import ConfigError

if TYPE_CHECKING:
    from rtrl.report import model as report
    from rtrl.verification.gradients.equivalence import OracleRows


def verify_gradients(
    file: Annotated[
        Path | None,
        typer.Option(
            help="The text to read. By default, the sources of Python's own standard library.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of every run.  [default: 300; with --quick 80]", show_default=False)
    ] = None,
    block: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps per block; may be repeated.  [default: 1 7 16 32; with --quick 1 7]", show_default=False
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            help="Blocks remembered; may be repeated.  [default: 1 3 64; with --quick 1 3]", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, blocks and windows: seconds.")] = False,
    break_: Annotated[
        str | None,
        typer.Option(
            "--break",
            metavar="NAME",
            help="Use a deliberately broken learner, to see the check fail; 'help' lists them.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json_path: JsonPath = None,
) -> None:
    """Compare gradients and influences on real text with BPTT, textbook RTRL and finite differences.

    About a minute, some seconds with --quick. Exit code 0: all agree; 1: they do not; 2: the command cannot be carried
    out.
    """
    changes: dict[str, Any] = {"file": None if file is None else str(file)}
    if steps is not None:
        changes["steps"] = steps
    for name, sizes in (("blocks", block), ("windows", window)):
        if sizes:
            changes[name] = tuple(dict.fromkeys(sizes))
    try:
        if break_ == "help":
            _list_broken()
        else:
            _compare(changes, quick, break_, seed, device, ResultsFile(json_path))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _list_broken() -> None:
    from rtrl.verification import breaks

    listing = Table("--break", "what is wrong then")
    for name in breaks.OF_GRADIENTS:
        listing.add_row(name, breaks.find(name).fault)
    show(listing)


def _compare(
    changes: dict[str, Any], quick: bool, broken: str | None, seed: int, device: str, results: ResultsFile
) -> None:
    from rtrl.verification import breaks, record, runner
    from rtrl.verification.claim import Settings
    from rtrl.verification.gradients import equivalence

    if broken is not None:
        breaks.find(broken)
    config = replace(equivalence.QUICK if quick else equivalence.FULL, **changes)
    with progress() as bar:
        task = bar.add_task("reading", total=config.pieces, completed=-1)
        settings = Settings(not quick, seed, device, lambda piece: bar.update(task, description=piece, advance=1))
        outcome = runner.measure_one(equivalence.measure, settings, config, broken=broken)
    finding, rows = outcome.finding, outcome.measurements
    assert isinstance(rows, equivalence.OracleRows)
    show(_table(finding.tables[0], _caption(rows, seed, broken)), stderr=results.to_stdout)
    results.write(record.record([record.entry(outcome)], settings, command()))
    summary = f"PASS: {finding.result}" if rows.passed else f"FAIL: {finding.condition}; first: {rows.failures[0]}"
    typer.echo(f"{summary} ({outcome.duration_s:.0f} s)", err=results.to_stdout)
    raise typer.Exit(0 if rows.passed else 1)


def _table(found: "report.Table", caption: str) -> Table:
    """Draw the rows; a line divides those of different runs."""
    out = Table(title="Gradient equivalence", caption=caption, caption_justify="left")
    for name in found.columns:
        out.add_column(name.replace(" ", "\n"), no_wrap=True)
    for row, following in pairwise([*found.rows, None]):
        assert row is not None
        out.add_row(*map(_cell, row), end_section=following is not None and following[1:3] != row[1:3])
    return out


def _cell(value: object) -> Text:
    if isinstance(value, float):
        return Text("void", style="bold red") if math.isnan(value) else Text(f"{value:.1e}", justify="right")
    style = {"pass": "green", "FAIL": "bold red"}.get(str(value), "")
    return Text("" if value is None else str(value), style=style, justify="right" if isinstance(value, int) else None)


def _caption(rows: "OracleRows", seed: int, broken: str | None) -> str:
    fault = "" if broken is None else f"\nThe learner is broken on purpose: {broken}."
    return (
        f"Text: {rows.stream['source']}, {rows.config.batch_size} samples, seed {seed}. Errors are relative, in "
        "float64; finite differences are held to their own error estimate. Dormant slices caught up: (sample, expert) "
        "pairs reactivated after a whole dormant block + those dormant at the time of the comparison; dormancy in "
        f"steps.{fault}"
    )
