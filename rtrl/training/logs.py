"""Logs of the rows of a run: a file of JSON lines, and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtrl.errors import ConfigError
from rtrl.training.curve import Row


class JsonLines:
    """A file with one JSON object per line.

    Args:
        path: the file.
        after: the step from which the run continues; later rows of the file are dropped. None begins an empty file.

    Raises:
        ConfigError: the file cannot be read or written.
    """

    def __init__(self, path: Path, after: int | None = None) -> None:
        try:
            kept = [] if after is None or not path.exists() else _until(path.read_text(encoding="utf-8"), after)
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be used as a log: {error}") from error
        self.empty = not kept

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object, and flush the file."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _until(text: str, after: int) -> list[str]:
    """The lines up to a step, without an incomplete last line."""
    kept = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and (record.get("event") == "start" or record.get("step", after + 1) <= after):
            kept.append(line)
    return kept


class TensorBoard:
    """Rows as scalars of a TensorBoard run.

    Args:
        folder: of the event files.
        after: the step from which the run continues.

    Raises:
        ConfigError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--tensorboard needs the package tensorboard ({error}); pip install 'rtrl[tensorboard]'"
            ) from error
        try:
            self._writer: Any = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error

    def write(self, row: Row, steps_per_s: float) -> None:
        """Add one row."""
        values = {"loss": row.loss, "score": row.score, "bytes_held": row.bytes_held, "steps_per_s": steps_per_s}
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
