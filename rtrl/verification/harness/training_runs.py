"""Train in episodes, with one update at the end of each, so that every gradient is exact at the parameters it is used
for."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rtrl.learners import Learner
from rtrl.tasks.protocol import Task, TaskStep
from rtrl.training import evaluate

MakeLearner = Callable[[nn.Module, int], Learner]
Progress = Callable[[int], None]
"""Called with the number of episodes done, before each."""

_METERED = 200
"""Steps after which the bytes held are looked at. They are those of a block or of a horizon, the same in every
episode."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a cell is trained."""

    task: Task  # every episode of the batch begins in the first state and ends with one update
    batch_size: int  # B
    rate: float  # the learning rate of Adam
    episodes: int  # the most episodes of the batch
    clip: float = 1.0  # gradients are scaled down to at most this norm
    seed: int = 0  # the seed of the stream
    check_every: int = 25  # the training score is averaged over this number of episodes
    until: float | None = None  # the training score at which training ends early; None for never


@dataclass
class History:
    """What training came to.

    Attributes:
        scores: number of episodes → the training score since the one before.
        steps: the number of steps taken.
        solved: whether ``until`` was reached.
        most_bytes: the most that the learner held between two steps.
    """

    scores: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    solved: bool = False
    most_bytes: int = 0

    @property
    def episodes(self) -> int:
        """The number of episodes of the batch."""
        return max(self.scores)


class EpisodeTrainer:
    """A cell, its learner and its optimizer, trained one episode at a time."""

    def __init__(self, cell: nn.Module, config: TrainingConfig, make: MakeLearner) -> None:
        self.cell, self._config = cell, config
        self._learner = make(cell, config.batch_size)
        self._parameters = list(cell.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.rate)
        self.most_bytes, self._metered = 0, 0

    def episode(self, steps: Sequence[TaskStep]) -> tuple[float, int]:
        """Learn from one episode; return the sum of the scores, and the number of targets."""
        total, n_targets = 0.0, 0
        self._learner.reset()
        start = 0
        while start < len(steps):
            part = steps[start : start + (1 if self._metered < _METERED else self._learner.room)]
            ys = self._learner.unroll(torch.stack([step.x for step in part]))
            losses = []
            for y, step in zip(ys, part, strict=True):
                loss = self._config.task.loss(y, step)
                if loss is not None:
                    losses.append(loss)
                    score, count = self._config.task.score(y.detach(), step)
                    total, n_targets = total + score, n_targets + count
            if losses:
                self._learner.backward(torch.stack(losses).sum())
            if self._metered < _METERED:
                self._meter()
                self._metered += 1
            start += len(part)
        self._meter()
        self._learner.sync()
        for p in self._parameters:  # Adam leaves alone what has no gradient, and moves what has one of zeros
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        nn.utils.clip_grad_norm_(self._parameters, self._config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total, n_targets

    def _meter(self) -> None:
        self.most_bytes = max(self.most_bytes, sum(self._learner.retained_bytes().values()))


def episodes(config: TrainingConfig, like: Tensor) -> Iterator[list[TaskStep]]:
    """Yield the episodes of the task, without end."""
    stream = config.task.stream(config.batch_size, seed=config.seed, dtype=like.dtype, device=like.device)
    steps = [next(stream)]
    while True:
        step = next(stream)
        if bool(step.is_first.all()):
            yield steps
            steps = []
        steps.append(step)


def train(cell: nn.Module, config: TrainingConfig, make: MakeLearner, progress: Progress) -> History:
    """Train a cell in place until the score is reached, or all episodes are done."""
    trainer, history = EpisodeTrainer(cell, config, make), History()
    total, n_targets = 0.0, 0
    for n, steps in enumerate(episodes(config, next(cell.parameters()))):
        if n == config.episodes or history.solved:
            break
        progress(n)
        score, count = trainer.episode(steps)
        total, n_targets, history.steps = total + score, n_targets + count, history.steps + len(steps)
        if (n + 1) % config.check_every == 0 or n + 1 == config.episodes:
            mean = total / max(n_targets, 1)
            history.scores[n + 1] = mean
            history.solved = config.until is not None and mean >= config.until
            total, n_targets = 0.0, 0
    history.most_bytes = trainer.most_bytes
    return history


def train_in_lockstep(
    cell: nn.Module, config: TrainingConfig, first: MakeLearner, second: MakeLearner, progress: Progress
) -> list[float]:
    """Train two copies of a cell on the same episodes, each by its own learner.

    Returns:
        After every update the largest difference between two weights of the copies, relative to the largest weight of
        their parameter.
    """
    trainers = [EpisodeTrainer(copy.deepcopy(cell), config, make) for make in (first, second)]
    apart: list[float] = []
    for n, steps in enumerate(episodes(config, next(cell.parameters()))):
        if n == config.episodes:
            break
        progress(n)
        for trainer in trainers:
            trainer.episode(steps)
        apart.append(distance(*(trainer.cell for trainer in trainers)))
    return apart


def held_bytes(cell: nn.Module, config: TrainingConfig, make: MakeLearner, n_episodes: int = 8) -> int:
    """Return the most bytes that a learner holds between two steps of the first episodes; the cell stays as it is."""
    trainer = EpisodeTrainer(copy.deepcopy(cell), config, make)
    for n, steps in enumerate(episodes(config, next(cell.parameters()))):
        if n == n_episodes:
            break
        trainer.episode(steps)
    return trainer.most_bytes


def distance(first: nn.Module, second: nn.Module) -> float:
    """Return the largest difference between two weights, relative to the largest weight of their parameter, or to 1 if
    that is larger."""
    found = 0.0
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        scale = max(float(a.detach().abs().max()), float(b.detach().abs().max()), 1.0)
        found = max(found, float((a.detach() - b.detach()).abs().max()) / scale)
    return found


def evaluate_held_out(cell: nn.Module, task: Task, *, held_out: bool = True, seed: int = 1, steps: int = 400) -> float:
    """Return the score on a stream that was not trained on, over at least ``steps`` steps of 64 samples."""
    return evaluate(cell, task, batch_size=64, steps=steps, seed=10_000 + seed, held_out=held_out)
