"""The protocol of a task: an endless stream of steps, a loss, and a score with two reference levels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rtrl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TaskStep:
    """One step of a stream for B samples.

    Attributes:
        x: the input of the cell, (B, d_in).
        target: (B,) LongTensor of classes, or (B, d_out) of numbers.
        has_target: Boolean (B,), the mask of samples that have a target at this step; other targets are ignored.
        is_first: Boolean (B,), the mask of samples that begin an episode: their state is reset before this step.
    """

    x: Tensor
    target: Tensor
    has_target: Tensor
    is_first: Tensor


class TaskStream(ABC):
    """The steps of a task, without end; a saved stream continues bit for bit."""

    @abstractmethod
    def __next__(self) -> TaskStep:
        """Return the next step."""

    def __iter__(self) -> "TaskStream":
        """Return the stream itself."""
        return self

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, which takes little memory."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position of another stream of the same task, as ``state`` has it."""


def check_same_stream(identity: Mapping[str, Any], state: Mapping[str, Any], *position: str) -> None:
    """Check that a saved state belongs to a stream of this identity and has a position.

    Raises:
        ConfigError: it does not.
    """
    missing = [name for name in (*identity, *position) if name not in state]
    if missing:
        raise ConfigError(f"this is not the state of a {identity['task']} stream: {', '.join(missing)} is missing")
    for name, value in identity.items():
        if state[name] != value:
            raise ConfigError(f"the state is of a stream with {name} {state[name]!r}; this one has {value!r}")


class Task(ABC):
    """Something to learn.

    Attributes:
        name: of the task on the command line.
        d_in: the width of x.
        d_out: the width of the y that the cell must return.
        measure: the quantity whose mean is the score: "accuracy" (larger is better), "bits per symbol" or "squared
            error" (smaller is better).
        chance: the score of the best answer that ignores the past.
        solved: the score from which the task counts as learned.
    """

    name: str
    d_in: int
    d_out: int
    measure: Literal["accuracy", "bits per symbol", "squared error"]
    chance: float
    solved: float

    @abstractmethod
    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        held_out: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> TaskStream:
        """Return an endless stream; the same seed gives the same stream on every machine.

        Args:
            batch_size: B.
            seed: of the episodes.
            held_out: draw episodes that are in no training stream.
            dtype: of x and of numerical targets; PyTorch's default by default.
            device: of all tensors; the CPU by default.
        """

    @abstractmethod
    def loss(self, y: Tensor, step: TaskStep) -> Tensor | None:
        """Return the sum of the losses of the samples with a target, divided by B; None if there are none.

        Args:
            y: the output of the cell at this step, (B, d_out).
            step: the step of the stream, with its targets.
        """

    @abstractmethod
    def score(self, y: Tensor, step: TaskStep) -> tuple[float, int]:
        """Return the sum of the scores of the samples with a target, and the number of these samples.

        Args:
            y: the output of the cell at this step, (B, d_out).
            step: the step of the stream, with its targets.
        """
