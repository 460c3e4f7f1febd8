"""Where the results of a command go, and which command that was."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rtrl.cli.console import writable

if TYPE_CHECKING:
    from rtrl.report import Record


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
            try:
                half.write_text(text, encoding="utf-8")
                half.replace(target)
            finally:
                half.unlink(missing_ok=True)
        elif self.path is not None:  # a device or a pipe
            self.path.write_text(text, encoding="utf-8")
        elif self.to_stdout:
            typer.echo(text, nl=False)


def command() -> str:
    """Return the command line of this process, without the folders of the program and of absolute paths."""
    return shlex.join(["rtrl", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])])
