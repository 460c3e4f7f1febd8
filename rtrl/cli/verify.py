"""``rtrl verify``: measure the claims, all of them or some, and report what came of each."""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rtrl.cli.console import make_console, progress, show, writable
from rtrl.errors import ConfigError

if TYPE_CHECKING:
    from rtrl.report import ClaimResult, Record
    from rtrl.verification.runner import Outcome

_STYLES = {
    "holds": "green",
    "holds when": "yellow",
    "does not hold": "red",
    "not measured at the claimed size": "magenta",
    "not measured": "magenta",
}
_SHORT = {"holds when": "holds when …", "not measured at the claimed size": "smaller size"}
_MOVED = "--file", "--steps", "--block", "--window", "--quick", "--break"

Seed = Annotated[int, typer.Option(help="The seed of everything that is drawn.", min=0)]
Device = Annotated[str, typer.Option(help="The torch device; it must support float64.")]
JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="PATH", help="Write all results there; '-' for standard output, the rest then to stderr."
    ),
]


class MovedOptions(typer.core.TyperCommand):
    """``rtrl verify``, which says of options that it no longer has which command has them now."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        moved = next((name for name in (arg.split("=")[0] for arg in args) if name in _MOVED), None)
        if moved is not None:
            raise typer.BadParameter(f"{moved} is an option of rtrl verify-gradients now; use that command for it")
        return super().parse_args(ctx, args)


def verify(
    full: Annotated[
        bool, typer.Option("--full", help="The long form of every claim: longer streams, larger models, more seeds.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ID", help="Measure this claim alone; may be repeated.", show_default=False),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the claims and exit.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json_path: JsonPath = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what the file of --json holds of the same code, except failures, and measure the rest.",
        ),
    ] = False,
) -> None:
    """Measure what this project claims: one line per claim, with a verdict from this run.

    Some minutes; much longer with --full. A claim holds, holds when a condition does, does not hold, or could not be
    measured. Exit code 0: the code does what its documentation says, independently of the verdicts; 1: it does not;
    2: the command cannot be carried out. rtrl verify-gradients shows the claim gradient-equivalence in detail.
    """
    try:
        if resume and json_path in {None, "-"}:
            raise ConfigError("--resume needs --json PATH, the file to continue")
        if list_:
            _list()
        else:
            _measure(only or [], full, seed, device, json_path, resume)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _list() -> None:
    from rtrl.verification.registry import claims

    listing = Table("claim", "what was claimed")
    for claim in claims():
        listing.add_row(claim.id, claim.claimed)
    show(listing)


def _measure(only: list[str], full: bool, seed: int, device: str, json_path: str | None, resume: bool) -> None:
    """Measure the claims; print a line and write the results as each is done."""
    from rtrl.learners import audits_in_this_process
    from rtrl.verification import record, registry, runner  # the oracles are needed here and nowhere else
    from rtrl.verification.claim import Settings
    from rtrl.verification.harness.problems import usable_device

    chosen = registry.select(only)
    usable_device(device)
    settings = Settings(full, seed, device)
    results = ResultsFile(json_path)
    order = [claim.id for claim in registry.claims()]
    earlier = record.kept(results.path, settings) if resume and results.path else []
    found = {entry.id: entry for entry in earlier if entry.id in order}
    chosen = [claim for claim in chosen if claim.id not in found or found[claim.id].failures]
    console = make_console(results.to_stdout)
    width = max(map(len, [*found, *(claim.id for claim in chosen)]))
    repeated = {claim.id for claim in chosen}
    for entry in (entry for entry in found.values() if entry.id not in repeated):
        _print(console, entry, width)

    def whole() -> "Record":
        entries = sorted(found.values(), key=lambda entry: order.index(entry.id))
        return record.record(entries, settings, command())

    def each(outcome: "Outcome") -> None:
        found[outcome.claim.id] = record.entry(outcome)
        _print(console, found[outcome.claim.id], width)
        if results.path is not None:  # a run that is interrupted keeps every claim that is measured
            results.write(whole())

    began = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("reading", total=len(chosen))
        runner.measure(chosen, settings, lambda piece, done: bar.update(task, description=piece, completed=done), each)
    duration_s = time.perf_counter() - began
    final = whole()
    results.write(final)
    counts = {name: sum(entry.verdict == name for entry in final.claims) for name in _STYLES}
    counted = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    failed = record.failures(final.claims)
    typer.echo(f"audits: {audits_in_this_process()}", err=results.to_stdout)
    opening = f"FAIL: {len(failed)} failures, first: {failed[0]}; " if failed else "PASS: "
    typer.echo(f"{opening}{len(final.claims)} claims: {counted} ({duration_s:.0f} s)", err=results.to_stdout)
    raise typer.Exit(1 if failed else 0)


def _print(console: Console, found: "ClaimResult", width: int) -> None:
    """Print one line for a claim, and more for its condition and its failures."""
    verdict = _SHORT.get(found.verdict, found.verdict)
    threshold = f"  (required: {found.threshold})" if found.threshold else ""
    style = _STYLES[found.verdict]
    console.print(f"[bold]{found.id:{width}}[/bold]  [{style}]{verdict:13}[/{style}]", end="  ", highlight=False)
    text = f"{found.result}{threshold}  {found.duration_s or 0.0:.0f} s"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if found.condition:
        console.print(f"{'':{width}}  {found.condition}", highlight=False, markup=False, soft_wrap=True)
    for line in found.failures:
        console.print(f"{'':{width}}  FAIL: {line}", highlight=False, markup=False, soft_wrap=True, style="bold red")
    console.file.flush()  # a file or a pipe shows a claim as soon as it is measured


class ResultsFile:
    """Where the results of a command go: a file, standard output, or nowhere.

    Attributes:
        path: the file; None for standard output or nowhere.
        to_stdout: whether standard output takes the results, and stderr everything else.
    """

    def __init__(self, json_path: str | None) -> None:
        self.to_stdout = json_path == "-"
        self.path = None if json_path is None or self.to_stdout else writable(Path(json_path))

    def write(self, record: "Record") -> None:
        """Write the results; an interrupted write leaves the old file as it was."""
        from rtrl.report import to_json

        text = to_json(record)
        if self.path is not None and self.path.is_file():
            target = self.path.resolve()
            half = target.with_name(f".{target.name}.{os.getpid()}")
            half.write_text(text, encoding="utf-8")
            half.replace(target)
        elif self.path is not None:  # a device or a pipe
            self.path.write_text(text, encoding="utf-8")
        elif self.to_stdout:
            typer.echo(text, nl=False)


def command() -> str:
    """Return the command line of this process, without the folder of the program."""
    return shlex.join(["rtrl", *sys.argv[1:]])
