"""Logs of the rows of a run: a file of JSON lines, and TensorBoard."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from rtrl._utils.whole_files import reason, replace_file
from rtrl.errors import ConfigError, FileError
from rtrl.training.curve import Row

_LONGEST = 2**20  # bytes of a line


class JsonLines:
    """A file with one JSON object per line, of which the first says whose it is.

    Args:
        path: the file; a symbolic link is followed.
        start: the first line, with the name of the run as "run".
        after: the step from which the run continues; later rows of the file are dropped. None begins a new file.

    Attributes:
        last_step: that of the last row.

    Raises:
        FileError: the file cannot be read or written, or its first line is not that of this run. It is as it was.
    """

    def __init__(self, path: Path, start: Mapping[str, Any], after: int | None = None) -> None:
        self._path, self.last_step = path, 0
        target = Path(os.path.realpath(path))
        try:
            if after is None or not target.exists():
                kept: Iterator[bytes] = iter([_line(start)])
            else:
                _check_first_line(target, path, start["run"])
                kept = self._until(target, after)
            replace_file(target, target.with_name(f".{target.name}.half"), lambda file: file.writelines(kept))
            self._file: BinaryIO = target.open("ab", buffering=0)
        except OSError as error:
            raise FileError(f"{path} cannot be used as a log: {reason(error)}") from error

    def _until(self, target: Path, after: int) -> Iterator[bytes]:
        """The first line, and the rows up to a step, without an incomplete line."""
        with target.open("rb") as file:
            yield file.readline(_LONGEST)
            while line := file.readline(_LONGEST):
                step = _step_of(line)
                if step is not None and step <= after:
                    self.last_step = step
                    yield line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            FileError: it cannot be written. The lines before it are whole.
        """
        left = memoryview(_line(record))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise FileError(f"the log {self._path} cannot be written: {reason(error)}") from error

    def flush(self) -> None:
        """Bring all lines to the disk.

        Raises:
            FileError: they cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise FileError(f"the log {self._path} cannot be written: {reason(error)}") from error

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # all that was written was reported
            self._file.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _record(line: bytes) -> dict[str, Any]:
    """The object of a whole line; an empty one for any other."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else {}


def _step_of(line: bytes) -> int | None:
    step = _record(line).get("step")
    return step if type(step) is int else None


def _check_first_line(target: Path, path: Path, run: str) -> None:
    """Refuse a file that is not the log of a run.

    Raises:
        FileError: its first line does not say that it is.
    """
    with target.open("rb") as file:
        first = _record(file.readline(_LONGEST))
    if first.get("event") != "start" or first.get("run") != run:
        raise FileError(
            f"{path} is not the log of this run: its first line is not the one that the run began with. It was left as "
            "it is; choose another by --log"
        )


class TensorBoard:
    """Rows as scalars of a TensorBoard run.

    Args:
        folder: of the event files.
        after: the step from which the run continues.

    Raises:
        ConfigError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        self._folder = folder
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--tensorboard needs the package tensorboard ({error}); pip install 'rtrl[tensorboard]'"
            ) from error
        try:
            self._writer: Any = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)
        except OSError as error:
            raise FileError(f"{folder} cannot be written: {reason(error)}") from error

    def write(self, row: Row, steps_per_s: float) -> None:
        """Add one row.

        Raises:
            FileError: it cannot be written.
        """
        values = {"loss": row.loss, "score": row.score, "bytes_held": row.bytes_held, "steps_per_s": steps_per_s}
        try:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, row.step)
        except OSError as error:
            raise FileError(f"{self._folder} cannot be written: {reason(error)}") from error

    def close(self) -> None:
        """Flush and close the event file."""
        with suppress(OSError):
            self._writer.close()
