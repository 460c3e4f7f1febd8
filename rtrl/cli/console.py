"""What the commands share: tables, bars, and paths that can be written."""

from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rtrl.errors import ConfigError

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


def progress(*more: str) -> Progress:
    """A bar on stderr, with more columns in Rich's notation; nothing where that is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    texts = [TextColumn(text) for text in more]
    return Progress(*columns, *texts, console=console, disable=not console.is_terminal, transient=True)
