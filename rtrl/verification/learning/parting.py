"""Two copies of a mixture learn the same episodes by two learners: how far their weights part, and where their routing
does."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from rtrl.cells.protocol import Sparsity
from rtrl.report.model import Plot, VerticalLine
from rtrl.verification.harness.routing_watch import WatchRouting
from rtrl.verification.harness.training_runs import EpisodeTrainer, MakeLearner, TrainingConfig, distance, episodes
from rtrl.verification.show import plot

ROUNDING = 1e-15
"""A relative distance that is rounding, for any learner."""


@dataclass
class Parting:
    """What two copies of a cell came to, update by update.

    Attributes:
        apart: the distance of the weights after every update.
        flips: how many choices of slots and experts differed during the episode before every update.
    """

    apart: list[float] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)

    @property
    def first_flip(self) -> int | None:
        """The number of the first update before which a choice differed, counted from 1; None for none."""
        return next((n for n, count in enumerate(self.flips, 1) if count), None)

    @property
    def before_flip(self) -> float:
        """The largest distance after an update before that one: what rounding alone has grown to; NaN if one is."""
        distances = self._before()
        return math.nan if any(map(math.isnan, distances)) else max(distances, default=0.0)

    @property
    def steepest(self) -> float:
        """The largest factor by which the distance grew in one update before that one; NaN if a distance is.

        Distances below ``ROUNDING`` count as that, the distance before the first update too.
        """
        distances = [ROUNDING, *(max(distance, ROUNDING) for distance in self._before())]
        factors = [after / before for before, after in pairwise(distances)]
        return math.nan if math.isnan(self.before_flip) else max(factors, default=1.0)

    def _before(self) -> list[float]:
        return self.apart if self.first_flip is None else self.apart[: self.first_flip - 1]


def part(
    cell: nn.Module, config: TrainingConfig, first: MakeLearner, second: MakeLearner, progress: Callable[[int], None]
) -> Parting:
    """Train two copies of a mixture on the same episodes, each by its own learner, and watch their choices."""
    trainers = [EpisodeTrainer(copy.deepcopy(cell), config, make) for make in (first, second)]
    found = Parting()
    for n, steps in enumerate(episodes(config, next(cell.parameters()))):
        if n == config.episodes:
            break
        progress(n)
        chosen = []
        for trainer in trainers:
            with WatchRouting(trainer.cell) as watch:
                trainer.episode(steps)
            chosen.append(watch.steps)
        found.apart.append(distance(*(trainer.cell for trainer in trainers)))
        found.flips.append(sum(_differing(a, b) for a, b in zip(*chosen, strict=True)))
    return found


def _differing(first: Sparsity, second: Sparsity) -> int:
    """Return how many choices of two steps differ, over the samples."""
    pairs = [(first.reads, second.reads), (first.writes, second.writes)]
    pairs += [(first.active[name], second.active[name]) for name in ("expert_up",)]
    return sum(int((a.sort().values != b.sort().values).sum()) for a, b in pairs if a is not None and b is not None)


def parting_plot(title: str, partings: dict[str, Parting]) -> Plot:
    """Draw the distances over the updates on a logarithmic axis, each first differing choice as a vertical line."""
    lines = {name: {n: max(d, 1e-18) for n, d in enumerate(p.apart, 1)} for name, p in partings.items()}
    drawn = plot(title, "updates", "largest relative difference of weights", lines, log="y")
    for name, p in partings.items():
        if p.first_flip is not None:
            drawn.vertical_lines.append(VerticalLine(p.first_flip, f"a choice differs ({name})"))
    return drawn
