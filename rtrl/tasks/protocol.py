"""What a task is: an endless stream of steps, a loss, a score, and the levels that say what a score is worth."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TaskStep:
    """One step of a stream for B samples.

    Attributes:
        x: (B, d_in), what the cell is given. target: (B,) LongTensor of classes, or (B, d_out) of numbers.
        asked: Boolean (B,): the samples that owe an answer at this step; the target of the others means nothing.
        fresh: Boolean (B,): the samples whose state starts anew before this step, since an episode begins.
    """

    x: Tensor
    target: Tensor
    asked: Tensor
    fresh: Tensor


class Stream(ABC):
    """The steps of a task, one after the other without end, which can be left and taken up again bit for bit."""

    @abstractmethod
    def __next__(self) -> TaskStep:
        """The next step."""

    def __iter__(self) -> "Stream":
        return self

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; small."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream of the same task stood."""


class Task(ABC):
    """Something to learn.

    Attributes:
        name: as the command line has it. d_in, d_out: widths of x and of what the cell must give.
        measure: what ``score`` is the mean of: "accuracy" (larger is better), "bits per symbol" or "squared error"
            (smaller is better).
        chance: the score of the best answer that looks at nothing of the past. solved: the score from which the task
            counts as learned.
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
    ) -> Stream:
        """An endless stream; the same seed gives the same one on every machine. ``held_out`` draws episodes that no
        training stream gives (or, where the task is finite, those set aside)."""

    @abstractmethod
    def loss(self, y: Tensor, moment: TaskStep) -> Tensor | None:
        """The sum of the losses of the samples asked, divided by B; None if no sample is asked."""

    @abstractmethod
    def score(self, y: Tensor, moment: TaskStep) -> tuple[float, int]:
        """The sum of the scores of the samples asked, and how many were."""
