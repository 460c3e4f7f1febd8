"""The command line: one app, its commands in ``rtrl.commands``."""

from typing import Annotated

import typer

import rtrl
from rtrl.commands._console import _console, _progress, _show, _writable
from rtrl.commands.check import check
from rtrl.commands.verify import verify

__all__ = ["_console", "_progress", "_show", "_writable", "app"]

app = typer.Typer(name="rtrl", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


app.command()(verify)
app.command()(check)
