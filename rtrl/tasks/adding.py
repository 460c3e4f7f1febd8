"""The adding problem: add the two marked numbers of a sequence."""

import torch
from torch import Tensor

from rtrl._utils import validation
from rtrl.tasks._episodes import Episode, EpisodeTask, draw_integers
from rtrl.tasks.protocol import TaskStep

_GRID = 2**20  # numbers are multiples of 1 / _GRID, so that they are the same in every dtype from float32 on


class Adding(EpisodeTask):
    """Read ``length`` pairs (number, mark), and answer at the last step with the sum of the two marked numbers.

    x is (number in 0 … 1, mark 0 or 1); one mark is in the first half of the episode and one in the second half, but
    not at the last step. The target (B, 1) is the sum. Every sample has its own numbers and marks, which do not depend
    on the batch size.

    Numbers are multiples of 2⁻²⁰, even ones in training and odd ones in held-out episodes.

    Args:
        length: the number of steps of an episode, at least 4.

    Attributes:
        chance: 1/6, the squared error of the constant answer 1, which is the variance of the sum of two uniform
            numbers.
        solved: 0.01.

    Raises:
        ConfigError: ``length`` is out of range.

    Source:
        Hochreiter and Schmidhuber (1997), Neural Computation 9(8), experiment 4; in this form Le, Jaitly and Hinton
        (2015), "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units", section 4.1.

    Example:
        >>> step = next(Adding(length=10).stream(batch_size=5))
        >>> step.x.shape, step.target.shape
        (torch.Size([5, 2]), torch.Size([5, 1]))
    """

    name = "adding"
    measure = "squared error"
    d_in, d_out = 2, 1
    chance, solved = 1 / 6, 0.01

    def __init__(self, length: int = 20) -> None:
        self.length = validation.integer("length", length, least=4)

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Episode:
        length, half = self.length, self.length // 2
        drawn = draw_integers(0, 2**31 - 1, (batch_size, length + 2), generator).T  # one row per sample, in one draw
        numbers = (drawn[:length] % (_GRID // 2) * 2 + int(held_out)).double() / _GRID
        places = torch.stack([drawn[length] % half, half + drawn[length + 1] % (length - 1 - half)])
        marks = torch.zeros_like(numbers).scatter_(0, places, 1.0)
        targets = numbers.gather(0, places).sum(dim=0).expand_as(numbers).unsqueeze(2)
        has_target = torch.zeros(length, batch_size, dtype=torch.bool)
        has_target[-1] = True
        return Episode(torch.stack([numbers, marks], dim=2), targets, has_target)

    def loss(self, y: Tensor, step: TaskStep) -> Tensor | None:
        """Return the sum of the squared errors of the samples with a target, divided by B; None without a target."""
        if not bool(step.has_target.any()):
            return None
        return (y - step.target)[step.has_target].square().sum() / len(y)

    def score(self, y: Tensor, step: TaskStep) -> tuple[float, int]:
        """Return the sum of the squared errors of the samples with a target, and their number."""
        return float((y.detach() - step.target)[step.has_target].square().sum()), int(step.has_target.sum())

    def __repr__(self) -> str:
        return f"Adding(length={self.length})"
