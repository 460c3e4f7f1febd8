"""What a training run leaves behind: one row for every so many steps."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rtrl.tasks.protocol import Task, TaskStep


@dataclass(frozen=True, slots=True)
class Row:
    """The steps since the last row, up to and with number ``step`` (counted from 1).

    Attributes:
        loss: the mean over all samples that were asked; score: likewise, in the task's measure. None if none was asked.
        bytes_held: by the learner, after this step.
    """

    step: int
    loss: float | None
    score: float | None
    bytes_held: int


@dataclass(frozen=True, slots=True)
class Curve:
    """The rows of a run, oldest first. Nothing in it depends on the time of day or the speed of the machine, so that
    the same seed gives an equal curve."""

    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last(self) -> Row:
        """The newest row; IndexError if there is none."""
        return self.rows[-1]

    def column(self, name: str) -> list[Any]:
        """One attribute of all rows: "step", "loss", "score" or "bytes_held"."""
        return [getattr(row, name) for row in self.rows]

    def first_solved(self, task: Task) -> int | None:
        """The step of the first row whose score reaches the task's solved level; None if no row does."""
        for row in self.rows:
            if row.score is not None and reaches(task, row.score):
                return row.step
        return None


def reaches(task: Task, score: float) -> bool:
    """Whether a score is at least as good as the task's solved level."""
    return score >= task.solved if task.measure == "accuracy" else score <= task.solved


@dataclass(frozen=True, slots=True)
class Progress:
    """What a watcher of a run is told after every row: the row, how many steps there will be in all, and the speed
    since the last row."""

    row: Row
    steps: int
    steps_per_s: float

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self.row.step


@dataclass(slots=True)
class Tally:
    """Sums over the samples asked since the last row."""

    loss: float = 0.0
    score: float = 0.0
    asked: int = 0

    def add(self, task: Task, y: Tensor, moment: TaskStep, loss: float) -> None:
        """Count one step whose loss, the sum over the samples asked divided by B, is given."""
        score, asked = task.score(y.detach(), moment)
        self.loss += loss * moment.x.shape[0]
        self.score += score
        self.asked += asked

    def row(self, step: int, bytes_held: int) -> Row:
        """The row that these sums make."""
        if not self.asked:
            return Row(step, None, None, bytes_held)
        return Row(step, self.loss / self.asked, self.score / self.asked, bytes_held)
