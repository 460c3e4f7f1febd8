"""Predict the bytes of a file, each from the bytes before it."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.tasks.bytes import ByteStream
from rtrl.tasks.protocol import Task, TaskStep, TaskStream, check_same_stream

_SAMPLE = 2**24  # the number of bytes from which the levels are computed


class ByteModel(Task):
    """Read a file, one byte per step, and answer at every step with the logits of the next byte.

    Each sample reads its own section of the file, and begins it again, with a reset of its state, at the end. The seed
    chooses the byte of the sections at which all samples begin. The last tenth of the file is held out.

    Args:
        path: the file to read; None for the sources of Python's standard library (see ``ByteStream``).

    Attributes:
        chance: the bits per byte of the best answer to the present byte only, from the counts of all pairs of bytes in
            the training text.
        solved: the bits per byte of the best answer to the last two bytes, from the counts of all triples; a better
            model uses more of the past. Both levels are those of the first 16 MiB of the file.
        digest: SHA-256 of the file.

    Raises:
        ConfigError: the file is missing, unreadable or too short.

    Cost:
        The file is held in memory once for each stream.

    Example:
        >>> task = ByteModel()
        >>> next(task.stream(batch_size=2)).x.shape
        torch.Size([2, 256])
    """

    name = "bytes"
    d_in, d_out = 256, 256
    measure = "bits per symbol"

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = path
        text = ByteStream(path, span=_span(False), steps=3)
        self.digest, self.source = text.digest, text.source
        ByteStream(path, span=_span(True))  # long enough, too
        sample = text.text()[:_SAMPLE]
        self.chance, self.solved = (conditional_entropy(sample, order) for order in (1, 2))

    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        held_out: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ByteModelStream":
        """Return an endless stream; the same seed gives the same stream on every machine that has the file.

        Raises:
            ConfigError: ``batch_size`` or ``seed`` is out of range, the text is too short for this batch size, or the
                file has changed.
        """
        validation.integer("seed", seed, least=0)
        stream = ByteStream(self.path, batch_size, span=_span(held_out), dtype=dtype, device=device)
        if stream.digest != self.digest:
            raise ConfigError(f"{self.source} has changed since this task was made; make the task again")
        return ByteModelStream(stream, seed, held_out)

    def loss(self, y: Tensor, step: TaskStep) -> Tensor | None:
        """Return the cross-entropy in nats, the mean over samples."""
        return F.cross_entropy(y, step.target)

    def score(self, y: Tensor, step: TaskStep) -> tuple[float, int]:
        """Return the bits of the next byte, summed over samples, and the number of samples."""
        return float(F.cross_entropy(y.detach(), step.target, reduction="sum")) / math.log(2), len(y)

    def __repr__(self) -> str:
        return f"ByteModel({self.source!r}, sha256={self.digest[:12]})"


class ByteModelStream(TaskStream):
    """The sections of a text, repeated without end."""

    def __init__(self, text: ByteStream, seed: int, held_out: bool) -> None:
        self._text, self._seed, self._held_out = text, seed, held_out
        draws = torch.Generator("cpu").manual_seed(seed)
        self._place = int(torch.randint(len(text), (), generator=draws, device="cpu"))  # of the next byte
        self._begun = False

    def __next__(self) -> TaskStep:
        x, target = self._text[self._place]
        is_first = not self._begun or self._place == 0
        self._place, self._begun = (self._place + 1) % len(self._text), True
        return TaskStep(x, target, torch.ones_like(target, dtype=torch.bool), torch.full_like(target, is_first).bool())

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream."""
        return {**self._identity(), "place": self._place, "begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of another stream of the same task.

        Raises:
            ConfigError: it was a stream of another text, seed, batch size or part; this stream is unchanged.
        """
        check_same_stream(self._identity(), state, "place", "begun")
        place = state["place"]
        if type(place) is not int or not 0 <= place < len(self._text):
            raise ConfigError(f"'place' must lie in 0 … {len(self._text) - 1}, got {place!r}")
        if type(state["begun"]) is not bool:
            raise ConfigError(f"'begun' must be True or False, got {state['begun']!r}")
        self._place, self._begun = place, state["begun"]

    def _identity(self) -> dict[str, Any]:
        return {
            "task": "bytes",
            "digest": self._text.digest,
            "batch_size": self._text.batch_size,
            "seed": self._seed,
            "held_out": self._held_out,
        }


def _span(held_out: bool) -> tuple[float, float]:
    return (0.9, 1.0) if held_out else (0.0, 0.9)


def conditional_entropy(text: bytes, order: int) -> float:
    """The average bits of a byte given the ``order`` bytes before it, from the counts in this text."""
    symbols = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    runs = len(symbols) - order
    contexts = np.zeros(runs, dtype=np.int64)
    for place in range(order):
        contexts = contexts * 256 + symbols[place : place + runs]
    return _entropy(contexts * 256 + symbols[order:]) - _entropy(contexts)


def _entropy(keys: "np.ndarray[Any, np.dtype[np.int64]]") -> float:
    shares = np.unique(keys, return_counts=True)[1] / len(keys)
    return float(-(shares * np.log2(shares)).sum())
