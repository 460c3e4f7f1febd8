"""Real text as a stream of bytes, each with the next byte as its target."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl._utils import validation
from rtrl.errors import ConfigError

_MOST = 2**20  # the number of bytes of the standard library's sources that are read by default
_NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


class ByteStream:
    """The bytes of a text as (input, target) pairs, in which each sample of the batch reads its own section.

    The text is cut into ``batch_size`` sections of equal length; the input of step t is byte ``offset + t`` of every
    section, and the target the byte after it. The default text is the sources of Python's standard library, in the
    order of their paths, up to one mebibyte: every machine has it, without a network.

    Args:
        path: the file to read; None for the standard library's sources.
        batch_size: B.
        offset: the place in its section at which every sample begins.
        steps: the smallest number of steps that there must be.
        span: the part of the text that is cut into sections, as fractions of its length.
        dtype: of the inputs.
        device: of the inputs and of the targets, which are LongTensors.

    Attributes:
        source: of the text, in words.
        digest: SHA-256 of the whole text, independent of the span.

    Raises:
        ConfigError: a number is out of range, the file is missing, unreadable, empty or too short, or the standard
            library is not found.

    Cost:
        One byte per byte of text; a step makes B·256 numbers.

    Example:
        >>> stream = ByteStream(batch_size=2)
        >>> x, target = stream[0]
        >>> x.shape, target.shape
        (torch.Size([2, 256]), torch.Size([2]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        batch_size: int = 1,
        *,
        offset: int = 0,
        steps: int = 1,
        span: tuple[float, float] = (0.0, 1.0),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("offset", offset, 0), ("steps", steps, 1)):
            validation.integer(name, value, least)
        text = _standard_library() if path is None else _read(Path(path))
        self.source = "the Python standard library" if path is None else str(path)
        self.digest = hashlib.sha256(text).hexdigest()
        if not 0 <= span[0] < span[1] <= 1:
            raise ConfigError(f"span must be (start, stop) with 0 ≤ start < stop ≤ 1, got {span}")
        text = text[int(span[0] * len(text)) : int(span[1] * len(text))]
        self.batch_size, self.offset = batch_size, offset
        section = max(len(text) - 1, 0) // batch_size
        self._length = section - offset
        if self._length < steps:
            raise ConfigError(
                f"{self.source} is too short: {len(text)} bytes give {max(self._length, 0)} steps to each of "
                f"{batch_size} samples that begin at offset {offset}, but at least {steps} are needed"
            )
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.device = torch.device("cpu" if device is None else device)
        with torch.device("cpu"):  # also if the default device is another
            self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._starts = torch.arange(batch_size) * section + offset

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the input (B, 256), one-hot, and the target (B,) of a step; a negative step counts from the end."""
        t = step + self._length if step < 0 else step
        if not 0 <= t < self._length:
            raise IndexError(f"step {step} of a stream of {self._length} steps")
        places = self._starts + t
        current, following = (self._text[p].long().to(self.device) for p in (places, places + 1))
        return F.one_hot(current, 256).to(self.dtype), following

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[t] for t in range(self._length))

    def text(self) -> bytes:
        """Return the part of the text that is read."""
        return self._text.numpy().tobytes()

    def first(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return the first ``steps`` steps together: inputs (steps, B, 256) and targets (steps, B)."""
        inputs, targets = zip(*(self[t] for t in range(steps)), strict=True)
        return torch.stack(inputs), torch.stack(targets)


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a file, whose text could be read to its end")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"the file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text:
        raise ConfigError(f"{path} is empty")
    return text


def _standard_library() -> bytes:
    """The standard library's .py files, sorted by path, one after the other, up to the size limit."""
    root = sysconfig.get_paths()["stdlib"]
    parts: list[bytes] = []
    missing = _MOST
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if name not in _NOT_STANDARD)
        for name in sorted(files):
            if name.endswith(".py") and missing > 0:
                parts.append(_read_some(Path(folder, name), missing))
                missing -= len(parts[-1])
        if missing <= 0:
            break
    if not any(parts):
        raise ConfigError(f"the sources of the standard library are not under {root}; pass the path of a text file")
    return b"".join(parts)


def _read_some(path: Path, most: int) -> bytes:
    try:
        return path.read_bytes()[:most]
    except OSError:
        return b""  # an unreadable module is skipped
