"""``rtrl verify``: measure the claims, all of them or some, and say what came of each."""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rtrl.cli.console import make_console, progress, show, writable
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
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep what the file of --json holds of the same code, but failures; measure the rest."
        ),
    ] = False,
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
        if resume and json_path in {None, "-"}:
            raise ConfigError("--resume needs --json PATH, the file to go on with")
        if list_:
            _list()
        elif given or (set(only or []) == {_GATE} and not resume):
            changes: dict[str, Any] = {"file": file, "seed": seed, "device": device, "broken": break_}
            if steps is not None:
                changes["steps"] = steps
            for name, sizes in (("blocks", block), ("windows", window)):
                if sizes:
                    changes[name] = tuple(dict.fromkeys(sizes))
            _gate(changes, quick, json_path)
        else:
            table(only or [], full, seed, device, json_path, resume)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _list() -> None:
    from rtrl.verification.registry import claims

    listing = Table("claim", "what was claimed")
    for claim in claims():
        listing.add_row(claim.id, claim.claimed)
    show(listing)


def table(only: list[str], full: bool, seed: int, device: str, json_path: str | None, resume: bool) -> None:
    """Measure the claims; print a line and write the results as each is done."""
    from rtrl.verification import record, registry, runner  # the oracles are needed here and nowhere else
    from rtrl.verification.claim import Settings
    from rtrl.verification.harness.models import usable_device

    chosen = registry.select(only)
    usable_device(device)
    settings = Settings(full, seed, device)
    stderr = json_path == "-"
    target = None if json_path is None or stderr else writable(Path(json_path))
    order = [claim.id for claim in registry.claims()]
    earlier = record.kept(target, settings) if resume and target else []
    found = {entry["id"]: entry for entry in earlier if entry["id"] in order}
    chosen = [claim for claim in chosen if claim.id not in found or found[claim.id]["failures"]]
    console = make_console(stderr)
    wide = max(map(len, [*found, *(claim.id for claim in chosen)]))
    again = {claim.id for claim in chosen}
    for entry in (entry for entry in found.values() if entry["id"] not in again):
        _say(console, entry, wide)

    def entries() -> list[record.Entry]:
        return sorted(found.values(), key=lambda entry: order.index(entry["id"]))

    def each(outcome: runner.Outcome) -> None:
        found[outcome.claim.id] = record.entry(outcome)
        _say(console, found[outcome.claim.id], wide)
        if target is not None:  # a run that is cut off loses no claim that is measured
            _write(record.record(entries(), settings, _command()), target, stderr)

    began = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("reading", total=len(chosen))

        def report(piece: str, done: int, pieces: int) -> None:
            bar.update(task, description=piece, completed=done, total=pieces)

        runner.measure(chosen, settings, report, each)
    duration_s = time.perf_counter() - began
    whole = record.record(entries(), settings, _command())
    _write(whole, target, stderr)
    counts = {name: sum(entry["verdict"] == name for entry in whole["claims"]) for name in _STYLES}
    counted = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    failed = record.failures(whole["claims"])
    opening = f"FAIL: {len(failed)} failures, first: {failed[0]}; " if failed else "PASS: "
    typer.echo(f"{opening}{len(whole['claims'])} claims: {counted} ({duration_s:.0f} s)", err=stderr)
    raise typer.Exit(1 if failed else 0)


def _say(console: Console, found: dict[str, Any], wide: int) -> None:
    """One line for a claim, more for its condition and its failures."""
    verdict = "holds when …" if found["verdict"] == "holds when" else found["verdict"]
    asked = f"  (asked: {found['threshold']})" if found["threshold"] else ""
    style = _STYLES[found["verdict"]]
    console.print(f"[bold]{found['id']:{wide}}[/bold]  [{style}]{verdict:13}[/{style}]", end="  ", highlight=False)
    text = f"{found['result']}{asked}  {found['duration_s']:.0f} s"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    for line in [found["condition"]] if found["condition"] else []:
        console.print(f"{'':{wide}}  {line}", highlight=False, markup=False, soft_wrap=True)
    for line in found["failures"]:
        console.print(f"{'':{wide}}  FAIL: {line}", highlight=False, markup=False, soft_wrap=True, style="bold red")
    console.file.flush()  # a file or a pipe is to show a claim as soon as it is measured


def _gate(changes: dict[str, Any], quick: bool, json_path: str | None) -> None:
    """The gradient-equivalence gate, with its own sizes, table and results."""
    from rtrl.verification import record, runner
    from rtrl.verification.claim import Settings
    from rtrl.verification.gradients import broken_learners, equivalence, table

    if changes["broken"] == "help":
        listing = Table("--break", "what is wrong then")
        for name, fault in broken_learners.BREAKS.items():
            listing.add_row(name, fault.fault)
        show(listing)
        raise typer.Exit
    settings = equivalence.Settings.quick(**changes) if quick else equivalence.Settings(**changes)
    stderr = json_path == "-"
    target = None if json_path is None or stderr else writable(Path(json_path))
    with progress() as bar:
        task = bar.add_task("reading", total=None)

        def report(piece: str, done: int, pieces: int) -> None:
            bar.update(task, description=piece, completed=done, total=pieces)

        result = equivalence.measure(settings, report)
    show(table.table(result), stderr=stderr)
    outcome = runner.Outcome(equivalence.CLAIM, equivalence.finding(result), result.duration_s)
    common = Settings(full=not quick, seed=settings.seed, device=settings.device)
    whole = record.record([record.entry(outcome)], common, _command())
    _write({**whole, **result.record(), "versions": whole["versions"]}, target, stderr)
    typer.echo(table.verdict(result), err=stderr)
    raise typer.Exit(0 if result.passed else 1)


def _write(whole: dict[str, Any], target: Path | None, to_stdout: bool) -> None:
    text = json.dumps(whole, indent=2, allow_nan=False)
    if target is not None and target.is_file():
        target = target.resolve()
        half = target.with_name(f".{target.name}.{os.getpid()}")  # whoever cuts this off finds the old file
        half.write_text(text + "\n", encoding="utf-8")
        half.replace(target)
    elif target is not None:  # a device or a pipe
        target.write_text(text + "\n", encoding="utf-8")
    elif to_stdout:
        typer.echo(text)


def _command() -> str:
    """The command as it was given, without the folder of the program."""
    return shlex.join(["rtrl", *sys.argv[1:]])
