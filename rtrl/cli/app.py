"""The app of the command line: ``check``, ``plan``, ``report``, ``train``, ``verify`` and ``verify-gradients``."""

import inspect
from collections.abc import Callable
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


def flowing(command: Callable[..., None]) -> str:
    """The docstring of a command with each paragraph on one line: the terminal's width breaks it, and nothing else."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


app.command(cls=MovedOptions, help=flowing(verify))(verify)
for command in (verify_gradients, check, train, plan, report):
    app.command(help=flowing(command))(command)
