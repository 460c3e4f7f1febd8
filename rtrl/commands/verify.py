"""``rtrl verify``: measure the claims, all of them or some, and say what came of each."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rtrl.commands._console import make_console, progress, show, writable
from rtrl.errors import ConfigError

_GATE = "gradient-equivalence"
_PANEL = "Of gradient-equivalence alone (any of these implies --only gradient-equivalence)"
_STYLES = {"holds": "green", "holds when": "yellow", "does not hold": "red", "not measured": "magenta"}


def verify(
    full: Annotated[
        bool, typer.Option("--full", help="The long form of every claim: longer streams, larger models, more seeds.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ID", help="Measure this claim alone; may be repeated.", show_default=False),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the claims and exit.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="The torch device, which must know float64.")] = "cpu",
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="PATH", help="Write all results there; '-' for standard output, the rest then to stderr."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="The text to read. By default, the sources of Python's own standard library.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of every run.  [default: 300; with --quick 80]",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    block: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps a block; may be repeated.  [default: 1 7 16 32; with --quick 1 7]",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            help="Blocks remembered; may be repeated.  [default: 1 3 64; with --quick 1 3]",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Fewer steps, blocks and windows: seconds.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    break_: Annotated[
        str | None,
        typer.Option(
            "--break",
            metavar="NAME",
            help="Break the learner on purpose, to see the gate shut; 'help' lists the ways.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> None:
    """Measure what this project claims, here and now: one line a claim, with a verdict drawn from this run.

    Some minutes; much longer with --full. A claim holds, holds when a condition does, does not hold, or could not be
    measured. --only gradient-equivalence, alone, shows the whole table of the gate: gradients and influences on real
    text against BPTT, textbook RTRL and finite differences. Exit code 0: the code does what its documentation says,
    whatever came of the claims; 1: it does not; 2: the command cannot be carried out.
    """
    options = {
        "--file": file,
        "--steps": steps,
        "--block": block or None,
        "--window": window or None,
        "--break": break_,
    }
    given = ["--quick"] * quick + [name for name, value in options.items() if value is not None]
    try:
        if given and set(only or [_GATE]) != {_GATE}:
            raise ConfigError(f"{given[0]} is of {_GATE} alone; leave it or the other --only away")
        if quick and full:
            raise ConfigError("--quick and --full exclude each other")
        if list_:
            _list()
        elif given or set(only or []) == {_GATE}:
            changes: dict[str, Any] = {"file": file, "seed": seed, "device": device, "broken": break_}
            if steps is not None:
                changes["steps"] = steps
            for name, sizes in (("blocks", block), ("windows", window)):
                if sizes:
                    changes[name] = tuple(dict.fromkeys(sizes))
            _gate(changes, quick, json_path)
        else:
            _table(only or [], full, seed, device, json_path)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _list() -> None:
    from rtrl.claims.registry import claims

    listing = Table("claim", "what was claimed")
    for claim in claims():
        listing.add_row(claim.id, claim.claimed)
    show(listing)


def _table(only: list[str], full: bool, seed: int, device: str, json_path: str | None) -> None:
    """Measure the claims and print a line as each is done."""
    from rtrl.claims import run  # the oracles are needed here and nowhere else
    from rtrl.claims._model import usable_device
    from rtrl.claims.claim import Settings
    from rtrl.claims.registry import select

    chosen = select(only)
    usable_device(device)
    settings = Settings(full=full, seed=seed, device=device)
    stderr = json_path == "-"
    target = None if json_path is None or stderr else writable(Path(json_path))
    console = make_console(stderr)
    wide = max(len(claim.id) for claim in chosen)

    def say(outcome: run.Outcome) -> None:
        found = outcome.finding
        verdict = "holds when …" if found.verdict == "holds when" else found.verdict
        asked = f"  (asked: {found.threshold})" if found.threshold else ""
        style = _STYLES[found.verdict]
        console.print(
            f"[bold]{outcome.claim.id:{wide}}[/bold]  [{style}]{verdict:13}[/{style}]", end="  ", highlight=False
        )
        text = f"{found.figure}{asked}  {outcome.duration_s:.0f} s"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        for line in [found.condition] if found.condition else []:
            console.print(f"{'':{wide}}  {line}", highlight=False, markup=False, soft_wrap=True)
        for line in found.failures:
            console.print(f"{'':{wide}}  FAIL: {line}", highlight=False, markup=False, soft_wrap=True, style="bold red")
        console.file.flush()  # a file or a pipe is to show a claim as soon as it is measured

    began = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("reading", total=len(chosen))

        def report(piece: str, done: int, pieces: int) -> None:
            bar.update(task, description=piece, completed=done, total=pieces)

        outcomes = run.measure(chosen, settings, report, say)
    duration_s = time.perf_counter() - began
    _write(run.record(outcomes, settings, _command(), duration_s), target, stderr)
    counts = {name: sum(outcome.finding.verdict == name for outcome in outcomes) for name in _STYLES}
    counted = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    failed = run.failures(outcomes)
    opening = f"FAIL: {len(failed)} failures, first: {failed[0]}; " if failed else "PASS: "
    typer.echo(f"{opening}{len(outcomes)} claims: {counted} ({duration_s:.0f} s)", err=stderr)
    raise typer.Exit(1 if failed else 0)


def _gate(changes: dict[str, Any], quick: bool, json_path: str | None) -> None:
    """The gradient-equivalence gate, with its own sizes, table and results."""
    from rtrl.claims import _table, breaks, gradient_equivalence, run
    from rtrl.claims.claim import Settings

    if changes["broken"] == "help":
        listing = Table("--break", "what is wrong then")
        for name, fault in breaks.BREAKS.items():
            listing.add_row(name, fault.fault)
        show(listing)
        raise typer.Exit
    settings = gradient_equivalence.Settings.quick(**changes) if quick else gradient_equivalence.Settings(**changes)
    stderr = json_path == "-"
    target = None if json_path is None or stderr else writable(Path(json_path))
    with progress() as bar:
        task = bar.add_task("reading", total=None)

        def report(piece: str, done: int, pieces: int) -> None:
            bar.update(task, description=piece, completed=done, total=pieces)

        result = gradient_equivalence.measure(settings, report)
    show(_table.table(result), stderr=stderr)
    outcome = run.Outcome(gradient_equivalence.CLAIM, gradient_equivalence.finding(result), result.duration_s)
    common = Settings(full=not quick, seed=settings.seed, device=settings.device)
    whole = run.record([outcome], common, _command(), result.duration_s)
    _write({**whole, **result.record(), "versions": whole["versions"]}, target, stderr)
    typer.echo(_table.verdict(result), err=stderr)
    raise typer.Exit(0 if result.passed else 1)


def _write(record: dict[str, Any], target: Path | None, to_stdout: bool) -> None:
    text = json.dumps(record, indent=2, allow_nan=False)
    if target is not None:
        target.write_text(text + "\n", encoding="utf-8")
    elif to_stdout:
        typer.echo(text)


def _command() -> str:
    """The command as it was given, without the folder of the program."""
    return shlex.join(["rtrl", *sys.argv[1:]])
