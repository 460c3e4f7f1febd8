"""Lessons that claims about learning share: episodes, one update at the end of each, so that every gradient is exact
at the parameters it is used for."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtrl.learners import Learner
from rtrl.tasks.protocol import Task, TaskStep
from rtrl.training import evaluate

MakeLearner = Callable[[nn.Module, int], Learner]
Tell = Callable[[int], None]
"""Called with the number of rounds done, before each."""


@dataclass(frozen=True)
class Lesson:
    """How a cell is taught.

    Attributes:
        task: every round is one episode of the batch, from a fresh state, and ends with one update.
        batch_size: B. rate: of Adam. rounds: at most so many.
        clip: gradients are scaled down to at most this norm. seed: of the stream.
        check_every: the training score is taken over so many rounds; the lesson ends early when it reaches
            ``until`` (None: never).
    """

    task: Task
    batch_size: int
    rate: float
    rounds: int
    clip: float = 1.0
    seed: int = 0
    check_every: int = 25
    until: float | None = None


@dataclass
class Course:
    """What a lesson came to.

    Attributes:
        rounds, scores: the training score up to a round, since the one before. steps: how many were taken.
        solved: whether ``until`` was reached. most_bytes: the most that the learner held between two steps.
    """

    rounds: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    steps: int = 0
    solved: bool = False
    most_bytes: int = 0


class Pupil:
    """A cell, its learner and its optimizer, taught a round at a time."""

    def __init__(self, cell: nn.Module, lesson: Lesson, make: MakeLearner) -> None:
        self.cell, self._lesson = cell, lesson
        self._learner = make(cell, lesson.batch_size)
        self._parameters = list(cell.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=lesson.rate)
        self.most_bytes, self._looked = 0, 0

    def round(self, moments: Sequence[TaskStep]) -> tuple[float, int]:
        """Learn from one episode: the sum of the scores, and how many answers there were."""
        score, asked = 0.0, 0
        self._learner.reset()
        for moment in moments:
            y = self._learner.step(moment.x)
            loss = self._lesson.task.loss(y, moment)
            if loss is not None:
                self._learner.backward(loss)
                right, count = self._lesson.task.score(y.detach(), moment)
                score, asked = score + right, asked + count
            if self._looked < 200:  # the bytes held are those of a block or of a horizon, the same in every round
                self.most_bytes = max(self.most_bytes, sum(self._learner.retained_bytes().values()))
                self._looked += 1
        self.most_bytes = max(self.most_bytes, sum(self._learner.retained_bytes().values()))
        self._learner.sync()
        for p in self._parameters:  # Adam leaves alone what has no gradient, and moves what has one of zeros
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        nn.utils.clip_grad_norm_(self._parameters, self._lesson.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return score, asked


def rounds_of(lesson: Lesson, like: Tensor) -> Iterator[list[TaskStep]]:
    """The episodes of a lesson, without end."""
    stream = lesson.task.stream(lesson.batch_size, seed=lesson.seed, dtype=like.dtype, device=like.device)
    moments = [next(stream)]
    while True:
        moment = next(stream)
        if bool(moment.fresh.all()):
            yield moments
            moments = []
        moments.append(moment)


def teach(cell: nn.Module, lesson: Lesson, make: MakeLearner, tell: Tell) -> Course:
    """Give the whole lesson. The cell is trained in place."""
    pupil, course = Pupil(cell, lesson, make), Course()
    score, asked = 0.0, 0
    for n, moments in enumerate(rounds_of(lesson, next(cell.parameters()))):
        if n == lesson.rounds or course.solved:
            break
        tell(n)
        right, count = pupil.round(moments)
        score, asked, course.steps = score + right, asked + count, course.steps + len(moments)
        if (n + 1) % lesson.check_every == 0 or n + 1 == lesson.rounds:
            course.rounds.append(n + 1)
            course.scores.append(score / max(asked, 1))
            course.solved = lesson.until is not None and course.scores[-1] >= lesson.until
            score, asked = 0.0, 0
    course.most_bytes = pupil.most_bytes
    return course


def in_step(cell: nn.Module, lesson: Lesson, one: MakeLearner, other: MakeLearner, tell: Tell) -> list[float]:
    """Teach two copies of a cell the same lesson, each by its own learner.

    Returns:
        After every update the largest difference between two weights of the copies, relative to the largest weight of
        their parameter.
    """
    pupils = [Pupil(copy.deepcopy(cell), lesson, make) for make in (one, other)]
    apart: list[float] = []
    for n, moments in enumerate(rounds_of(lesson, next(cell.parameters()))):
        if n == lesson.rounds:
            break
        tell(n)
        for pupil in pupils:
            pupil.round(moments)
        apart.append(distance(*(pupil.cell for pupil in pupils)))
    return apart


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between two weights, relative to the largest weight of their parameter (or 1, if that is
    larger)."""
    found = 0.0
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        scale = max(float(a.detach().abs().max()), float(b.detach().abs().max()), 1.0)
        found = max(found, float((a.detach() - b.detach()).abs().max()) / scale)
    return found


def exam(cell: nn.Module, task: Task, *, held_out: bool = True, seed: int = 1, steps: int = 400) -> float:
    """The score of a cell on a stream that it was not taught with, over at least ``steps`` steps of 64 samples."""
    return evaluate(cell, task, batch_size=64, steps=steps, seed=10_000 + seed, held_out=held_out)


def percent(value: float) -> str:
    """0.9934 → "99.3 %"."""
    return f"{100 * value:.1f} %"


def plain(values: Any) -> Any:
    """A dataclass's fields as JSON values: tasks by their representation, tuples as lists."""
    if isinstance(values, dict):
        return {str(name): plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return values if isinstance(values, (str, int, float, bool, type(None))) else repr(values)
