"""What the commands share: tables, bars, and paths that can be written."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rtrl._utils.formatting import duration
from rtrl.errors import ConfigError

INTERVAL_S = 8.0  # between two lines of progress; no more than ten seconds pass without one
_WIDTH = 150  # of tables that go to a file or a pipe, which has no width of its own


def writable(path: Path) -> Path:
    """The path, if a file can be written there; asked before the work and not after it."""
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def make_console(stderr: bool) -> Console:
    """The terminal, or a page of fixed width where there is none."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_WIDTH)


def show(what: RenderableType, stderr: bool = False) -> None:
    """Print a table, or what else Rich prints."""
    make_console(stderr).print(what)


@contextmanager
def progress(*more: str) -> Iterator[Progress]:
    """A bar on stderr; where that is not a terminal, a line at least every ten seconds.

    The lines come from a thread, so that they also come while one piece of work takes long.

    Args:
        more: more columns, in Rich's notation.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    texts = [TextColumn(text) for text in more]
    bar = Progress(*columns, *texts, console=console, disable=not console.is_terminal, transient=True)
    with bar, nullcontext() if console.is_terminal else _lines(bar, more):
        yield bar


@contextmanager
def _lines(bar: Progress, more: Sequence[str]) -> Iterator[None]:
    """Print what is being done and how far it is, every few seconds, until the work is done."""
    done, began = Event(), time.monotonic()

    def report() -> None:
        while not done.wait(INTERVAL_S):
            for task in bar.tasks:
                count = "" if task.total is None else f" {max(task.completed, 0):.0f}/{task.total:.0f}"
                fields = " ".join(filter(None, (text.format(task=task) for text in more)))
                typer.echo(
                    f"{task.description}{count} {duration(time.monotonic() - began)} {fields}".rstrip(), err=True
                )

    thread = Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
