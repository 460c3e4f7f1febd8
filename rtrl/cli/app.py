"""The app of the command line: a command for each of ``check``, ``plan``, ``report``, ``train`` and ``verify``."""

from typing import Annotated

import typer

import rtrl
from rtrl.cli.check import check
from rtrl.cli.plan import plan
from rtrl.cli.report import report
from rtrl.cli.train import train
from rtrl.cli.verify import verify

app = typer.Typer(name="rtrl", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rtrl {rtrl.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Exact real-time recurrent learning: verify it, check your own cell, plan, train, report."""


app.command()(verify)
app.command()(check)
app.command()(train)
app.command()(plan)
app.command()(report)
