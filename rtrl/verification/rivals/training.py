"""Train copies of a cell on episodes, each with its own episodes and rate, until all of them have solved the task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.tasks.protocol import Task
from rtrl.training.curve import reaches
from rtrl.verification.rivals.equal_bytes import held
from rtrl.verification.rivals.rules import Rule

MEAN_OF = 8
"""The number of updates over which a score is averaged."""
CLIP = 1.0
"""The largest norm of a gradient; a longer one is scaled down."""
METERED = 3
"""The number of episodes in which bytes are looked at; they are the same in all."""

Progress = Callable[[int], None]
"""Called with the number of updates done, before each."""


class EpisodicTask(Protocol):
    """A task that draws whole episodes (symbols or inputs, targets, mask of targets), each (T, B, ...)."""

    d_in: int

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Episodes:
    """One episode of each of K copies with B samples.

    Attributes:
        xs: the inputs (T, K, B, d_in).
        targets: the targets (T, K, B), or (T, K, B, d_out) of numbers.
        has_target: Boolean (T, K, B).
    """

    xs: Tensor
    targets: Tensor
    has_target: Tensor

    @classmethod
    def draw(cls, task: EpisodicTask, batch_size: int, seeds: Sequence[int], number: int) -> "Episodes":
        """Draw the episode of this number, for each seed."""
        parts = [
            task.draw(batch_size, False, torch.Generator().manual_seed(1_000_003 * seed + number)) for seed in seeds
        ]
        symbols, targets, has_target = (torch.stack(list(part), dim=1) for part in zip(*parts, strict=True))
        xs = symbols if symbols.is_floating_point() else F.one_hot(symbols + 1, task.d_in + 1)[..., 1:]
        return cls(xs.float(), targets.float() if targets.is_floating_point() else targets, has_target)


def loss_of(task: Task, ys: Tensor, targets: Tensor, has_target: Tensor) -> Tensor:
    """Return the sum of all losses, divided by B, of outputs (..., B, d_out)."""
    y, target = ys[has_target], targets[has_target]
    if task.measure == "accuracy":
        return F.cross_entropy(y, target, reduction="sum") / ys.shape[-2]
    return (y - target).square().sum() / ys.shape[-2]


def scores_of(task: Task, ys: Tensor, episodes: Episodes) -> list[float]:
    """Return the mean score of each copy, for outputs (T, K, B, d_out)."""
    if task.measure == "accuracy":
        each = (ys.argmax(dim=3) == episodes.targets).float()
    else:
        each = (ys - episodes.targets).square().sum(dim=3)
    mask = episodes.has_target
    means: list[float] = ((each * mask).sum(dim=(0, 2)) / mask.sum(dim=(0, 2))).tolist()
    return means


@dataclass
class Run:
    """What one copy came to.

    Attributes:
        scores: its score at each update.
        solved: the number of updates after which its mean score reached the task's level; None if it did not.
        most_bytes: the most that the learner held between two steps, if that was metered.
    """

    scores: list[float] = field(default_factory=list)
    solved: int | None = None
    most_bytes: int = 0

    @property
    def recent(self) -> float:
        """The mean of the newest scores."""
        newest = self.scores[-MEAN_OF:]
        return sum(newest) / len(newest)

    def add(self, task: Task, score: float) -> None:
        """Note the score of an update; one that is solved stays so."""
        if self.solved is None:
            self.scores.append(score)
            if len(self.scores) >= MEAN_OF and reaches(task, self.recent):
                self.solved = len(self.scores)


class StackedAdam:
    """Adam for copies, each at its own rate and with its own gradient scaled down to ``CLIP``.

    Args:
        values: name → parameters (K, ...), changed in place.
        rates: (K,).
    """

    def __init__(self, values: dict[str, Tensor], rates: Tensor) -> None:
        self._values, self._rates, self._updates = values, rates, 0
        self._means = {name: torch.zeros_like(value) for name, value in values.items()}
        self._squares = {name: torch.zeros_like(value) for name, value in values.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor]) -> None:
        """Make one update."""
        self._updates += 1
        norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
        scale = (CLIP / (norms + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            wide = [-1] + [1] * (gradient.ndim - 1)
            clipped = (gradient * scale.view(wide)).nan_to_num(0.0)  # an estimate without bounds may overflow
            mean = self._means[name].lerp_(clipped, 0.1) / (1 - 0.9**self._updates)
            square = self._squares[name].lerp_(clipped.square(), 0.001) / (1 - 0.999**self._updates)
            self._values[name].sub_(self._rates.view(wide) * mean / (square.sqrt() + 1e-8))


def train_copies(
    rule: Rule, task: Task, batch_size: int, seeds: Sequence[int], rates: Sequence[float], updates: int,
    progress: Progress,
) -> list[Run]:  # fmt: skip
    """Train the copies of a rule, an update after every episode, until all have solved the task or no update is left.

    Args:
        rule: the rule, with K copies.
        task: a task that draws whole episodes.
        batch_size: B.
        seeds: of the episodes of each copy.
        rates: of Adam, for each copy.
        updates: the most updates.
        progress: called before every update.

    Returns:
        A run for each copy.
    """
    copies = rule.copies
    adam = StackedAdam(copies.values, torch.tensor(rates))
    runs = [Run() for _ in seeds]
    for n in range(updates):
        progress(n)
        episodes = Episodes.draw(task, batch_size, seeds, n)  # type: ignore[arg-type]
        recorded = copies.record(episodes.xs, copies.first_state(batch_size))
        ys = recorded.ys.requires_grad_()
        (dys,) = torch.autograd.grad(loss_of(task, ys, episodes.targets, episodes.has_target), ys)
        rule.reset()
        adam.step(rule.gradient(recorded, dys))
        for run, score in zip(runs, scores_of(task, ys.detach(), episodes), strict=True):
            run.add(task, score)
        if all(run.solved is not None for run in runs):
            break
    return runs


def learn_episode(learner: BlockRTRL, task: Task, episodes: Episodes) -> tuple[Tensor, int]:
    """Learn from one episode of one copy; return its outputs (T, 1, B, d_out), and the most bytes held meanwhile."""
    learner.reset()
    ys, start, most = [], 0, 0
    while start < len(episodes.xs):
        part = slice(start, start + learner.room)
        y = learner.unroll(episodes.xs[part, 0])
        mask = episodes.has_target[part, 0]
        if bool(mask.any()):
            learner.backward(loss_of(task, y, episodes.targets[part, 0], mask))
        ys.append(y.detach())
        start += len(y)
        most = max(most, held(learner))
    learner.sync()
    return torch.cat(ys).unsqueeze(1), most


def train_exactly(
    cell: nn.Module, block: int, task: Task, batch_size: int, seed: int, rate: float, updates: int, progress: Progress
) -> Run:
    """Train a cell by `BlockRTRL` as ``train_copies`` trains copies, on the same episodes."""
    learner = BlockRTRL(cell, batch_size, block=block)
    parameters = list(cell.parameters())
    adam, run = torch.optim.Adam(parameters, lr=rate), Run()
    for n in range(updates):
        progress(n)
        episodes = Episodes.draw(task, batch_size, [seed], n)  # type: ignore[arg-type]
        ys, most = learn_episode(learner, task, episodes)
        if n < METERED:
            run.most_bytes = max(run.most_bytes, most)
        nn.utils.clip_grad_norm_(parameters, CLIP)
        adam.step()
        adam.zero_grad()
        run.add(task, scores_of(task, ys, episodes)[0])
        if run.solved is not None:
            break
    return run
