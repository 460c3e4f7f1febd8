"""The command line: ``rtrl verify``, ``rtrl check``, ``rtrl train``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import rtrl
from rtrl.commands._console import make_console as _console
from rtrl.commands._console import progress as _progress
from rtrl.commands._console import show as _show
from rtrl.commands._console import writable as _writable
from rtrl.commands.train import train
from rtrl.errors import ConfigError

__all__ = ["_console", "_progress", "_show", "_writable", "app"]

app = typer.Typer(name="rtrl", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(train)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rtrl {rtrl.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Exact real-time recurrent learning for sparse recurrent cells."""


@app.command()
def verify(
    file: Annotated[
        Path | None,
        typer.Option(
            help="The text to read. By default, the sources of Python's own standard library.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the model's weights and of the directions of differences.", min=0)] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of every run.  [default: 300; with --quick 80]", show_default=False)
    ] = None,
    block: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps a block; may be repeated.  [default: 1 7 16 32; with --quick 1 7]", show_default=False
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            help="Blocks remembered; may be repeated.  [default: 1 3 64; with --quick 1 3]", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, blocks and windows: seconds.")] = False,
    device: Annotated[str, typer.Option(help="The torch device, which must know float64.")] = "cpu",
    break_: Annotated[
        str | None,
        typer.Option(
            "--break", metavar="NAME", help="Break the learner on purpose, to see the gate shut; 'help' lists the ways."
        ),
    ] = None,
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="PATH", help="Write all results there; '-' for standard output, the table then to stderr."
        ),
    ] = None,
) -> None:
    """Prove on real text that gradients and influences are exact, against BPTT, textbook RTRL and finite differences.

    A small mixture of experts reads bytes; its experts fall asleep and wake as the text has it. Exit code 0: all agree;
    1: something does not; 2: the command cannot be carried out.
    """
    from rtrl.claims import _table, breaks, gradient_equivalence  # the oracles are needed here and nowhere else

    if break_ == "help":
        _list_breaks({name: fault.fault for name, fault in breaks.BREAKS.items()})
        raise typer.Exit
    changes: dict[str, Any] = {"file": file, "seed": seed, "device": device, "broken": break_}
    if steps is not None:
        changes["steps"] = steps
    for name, sizes in (("blocks", block), ("windows", window)):
        if sizes:
            changes[name] = tuple(dict.fromkeys(sizes))
    try:
        settings = gradient_equivalence.Settings.quick(**changes) if quick else gradient_equivalence.Settings(**changes)
        target = None if json_path in (None, "-") else _writable(Path(str(json_path)))
        with _progress() as bar:
            task = bar.add_task("reading", total=None)

            def report(piece: str, done: int, pieces: int) -> None:
                bar.update(task, description=piece, completed=done, total=pieces)

            result = gradient_equivalence.measure(settings, report)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error

    _show(_table.table(result), stderr=json_path == "-")
    text = json.dumps(result.record(), indent=2, allow_nan=False)
    if json_path == "-":
        typer.echo(text)
    elif target is not None:
        target.write_text(text + "\n", encoding="utf-8")
    typer.echo(_table.verdict(result), err=json_path == "-")
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:NAME",
            help="A function that makes a cell, make_learner(cell, batch_size), gradients(cell, xs, loss_fn), or a "
            "CellSpec, a LearnerSpec or a list of them. The present folder is looked in, too.",
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CHECK", help="Run this check alone; may be repeated.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", min=0, max=2**32 - 1)] = 0,
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="PATH",
            help="Write all verdicts there; '-' for standard output, the table to stderr.",
        ),
    ] = None,
) -> None:
    """Check a cell, or an online learner, of your own: does it keep the contract, are its gradients what it promises?

    Exit code 0: all that could be judged passed; 1: something failed, or nothing could be judged; 2: the command cannot
    be carried out.
    """
    from rtrl.testing import bound_checks, render  # the oracles are needed here and in verify alone
    from rtrl.testing.targets import load, specs_of

    try:
        checks = bound_checks(specs_of(load(target), target), seed)
        strangers = sorted(set(only or ()) - {check.name for check in checks})
        if strangers:
            known = ", ".join(dict.fromkeys(check.name for check in checks))
            raise ConfigError(f"there is no check {strangers[0]!r}; there are: {known}")
        path = None if json_path in (None, "-") else _writable(Path(str(json_path)))
        chosen = [check for check in checks if not only or check.name in only]
        verdicts = []
        with _progress() as bar:
            task = bar.add_task("checking", total=len(chosen))
            for bound in chosen:
                bar.update(task, description=f"{bound.spec.name}: {bound.name}")
                verdicts.append(render.Verdict(bound, bound.report()))
                bar.advance(task)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error

    stderr = json_path == "-"
    _show(render.table(verdicts), stderr=stderr)
    text = json.dumps([verdict.record() for verdict in verdicts], indent=2, allow_nan=False)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    elif stderr:
        typer.echo(text)
    failed = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    judged = [verdict for verdict in verdicts if verdict.outcome != "not judged"]
    for line in filter(None, (render.failures(verdicts), render.summary(verdicts))):
        typer.echo(line, err=stderr)
    if failed:
        again = " ".join(f"--only '{name}'" for name in dict.fromkeys(verdict.check for verdict in failed))
        typer.echo(f"To see it again: rtrl check {target} {again} --seed {seed}", err=stderr)
    if not judged:
        typer.echo("Nothing was judged.", err=stderr)
    raise typer.Exit(1 if failed or not judged else 0)


def _list_breaks(faults: dict[str, str]) -> None:
    listing = Table("--break", "what is wrong then")
    for name, fault in faults.items():
        listing.add_row(name, fault)
    _show(listing)
