"""``rtrl verify``: measure the claims, all of them or some, alone or with faults planted on purpose."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rtrl.cli.console import show
from rtrl.errors import ConfigError

_MOVED = "--file", "--steps", "--block", "--window", "--quick"

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
    small: Annotated[
        bool,
        typer.Option("--small", help="The small form of every claim, a second or so, with which breaks are tried."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ID", help="Measure this claim alone; may be repeated.", show_default=False),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the claims and exit.")] = False,
    break_: Annotated[
        list[str] | None,
        typer.Option(
            "--break",
            metavar="NAME",
            help="Measure every claim alone and with this fault planted, to see which verdicts it changes; may be "
            "repeated; 'help' lists the faults.",
            show_default=False,
        ),
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Measure every claim alone and with every fault of --break help.")
    ] = False,
    matrix_from: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Add to the results which faults change verdicts, as --matrix --json PATH found with the same code.",
            show_default=False,
        ),
    ] = None,
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

    Some minutes; much longer with --full. A claim holds, holds when a condition does, does not hold, was not measured
    at the claimed size, or could not be measured. Exit code 0: the code does what its documentation says, independently
    of the verdicts; 1: it does not, or a claim does not notice a fault that it must notice; 2: the command cannot be
    carried out. rtrl verify-gradients shows the claim gradient-equivalence in detail.
    """
    from rtrl.cli import verify_breaks, verify_run

    try:
        if resume and json_path in {None, "-"}:
            raise ConfigError("--resume needs --json PATH, the file to continue")
        if full and small:
            raise ConfigError("--full and --small are two forms; choose one")
        if list_:
            _list()
        elif break_ and "help" in break_:
            verify_breaks.list_breaks()
        else:
            run = verify_run.Run(only or [], full, small, seed, device, json_path, resume, matrix_from)
            if break_ or matrix:
                verify_breaks.try_breaks(run, break_ or [], matrix)
            else:
                run.measure()
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _list() -> None:
    from rtrl.verification.registry import claims

    listing = Table("claim", "what was claimed")
    for claim in claims():
        listing.add_row(claim.id, claim.claimed)
    show(listing)
