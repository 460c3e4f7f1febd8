"""The curve of a training run: one row for every ``log_every`` steps."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rtrl.tasks.protocol import Task, TaskStep


@dataclass(frozen=True, slots=True)
class Row:
    """The steps since the last row.

    Attributes:
        step: the number of steps taken, from the beginning of the run.
        loss: the mean over all samples with a target; None if there are none.
        score: the mean over all samples with a target, in the measure of the task; None if there are none.
        bytes_held: the bytes that the learner holds after the last of these steps.
    """

    step: int
    loss: float | None
    score: float | None
    bytes_held: int


@dataclass(frozen=True, slots=True)
class Curve:
    """The rows of a run, oldest first.

    They do not depend on the time or the speed of the machine: the same seed gives an equal curve.

    Attributes:
        rows: one ``Row`` for every ``log_every`` steps.
    """

    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last(self) -> Row:
        """The newest row."""
        return self.rows[-1]

    def column(self, name: str) -> list[Any]:
        """Return the attribute ``name`` of all rows: "step", "loss", "score" or "bytes_held"."""
        return [getattr(row, name) for row in self.rows]

    def first_solved(self, task: Task) -> int | None:
        """Return the step of the first row whose score reaches ``task.solved``; None without such a row."""
        for row in self.rows:
            if row.score is not None and reaches(task, row.score):
                return row.step
        return None


def reaches(task: Task, score: float) -> bool:
    """Whether a score is at least as good as the task's solved level."""
    return score >= task.solved if task.measure == "accuracy" else score <= task.solved


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run after a row.

    Attributes:
        row: the new row.
        steps: the number of steps of the whole run.
        steps_per_s: the speed since the last row.
    """

    row: Row
    steps: int
    steps_per_s: float

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return self.row.step


@dataclass(slots=True)
class Tally:
    """Sums over the samples with a target since the last row."""

    loss: float = 0.0
    score: float = 0.0
    n_targets: int = 0

    def add(self, task: Task, y: Tensor, step: TaskStep, loss: float) -> None:
        """Count one step; its loss is the sum over the samples with a target, divided by B."""
        score, n_targets = task.score(y.detach(), step)
        self.loss += loss * step.x.shape[0]
        self.score += score
        self.n_targets += n_targets

    def row(self, step: int, bytes_held: int) -> Row:
        """Make a row of these sums."""
        if not self.n_targets:
            return Row(step, None, None, bytes_held)
        return Row(step, self.loss / self.n_targets, self.score / self.n_targets, bytes_held)
