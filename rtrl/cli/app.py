"""The app of the command line: ``check``, ``plan``, ``report``, ``train``, ``verify`` and ``verify-gradients``."""

from typing import Annotated

import typer

import rtrl
from rtrl.cli.check import check
from rtrl.cli.plan import plan
from rtrl.cli.report import report
from rtrl.cli.train import train
from rtrl.cli.verify import MovedOptions, verify
from rtrl.cli.verify_gradients import verify_gradients

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


app.command(cls=MovedOptions)(verify)
app.command()(verify_gradients)
app.command()(check)
app.command()(train)
app.command()(plan)
app.command()(report)
