"""A T-maze: a sign at the entrance says which way to turn at the far end of a corridor."""

import torch

from rtrl._utils import validation
from rtrl.tasks._episodes import Episode, EpisodeTask, draw_integers

_GRID = 2**20  # numbers are multiples of 1 / _GRID, so that they are the same in every dtype from float32 on


class TMaze(EpisodeTask):
    """See a sign, walk along a corridor, and say at the junction which way the sign pointed.

    An episode has ``corridor + 2`` steps. x is (sign up, sign down, in the corridor, at the junction): a one-hot, but
    for the corridor, where its place is taken by a new number at every step. The target is the sign, at the last
    step alone. Every sample has its own sign and numbers, which do not depend on the batch size.

    Numbers are multiples of 2⁻²⁰, even ones in training and odd ones in held-out episodes.

    Args:
        corridor: the number of steps between the sign and the junction, at least 1.

    Attributes:
        chance: 0.5.
        solved: 0.99.

    Raises:
        ConfigError: ``corridor`` is out of range.

    Source:
        Bakker (2001), "Reinforcement Learning with Long Short-Term Memory", NeurIPS, section 4, with noise in the
        corridor; here the right turn is taught, not rewarded.

    Example:
        >>> stream = TMaze(corridor=3).stream(batch_size=5)
        >>> tuple(int(next(stream).has_target.sum()) for _ in range(5))
        (0, 0, 0, 0, 5)
    """

    name = "tmaze"
    d_in, d_out = 4, 2
    chance, solved = 0.5, 0.99

    def __init__(self, corridor: int = 10) -> None:
        self.corridor = validation.integer("corridor", corridor)

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Episode:
        length = self.corridor
        drawn = draw_integers(0, 2**31 - 1, (batch_size, length + 1), generator).T  # one row per sample, in one draw
        sign = drawn[length] % 2
        x = torch.zeros(length + 2, batch_size, self.d_in, dtype=torch.float64)
        x[0].scatter_(1, sign[:, None], 1.0)
        x[1:-1, :, 2] = (drawn[:length] % (_GRID // 2) * 2 + int(held_out)).double() / _GRID
        x[-1, :, 3] = 1.0
        has_target = torch.zeros(length + 2, batch_size, dtype=torch.bool)
        has_target[-1] = True
        return Episode(x, sign.expand(length + 2, -1), has_target)

    def __repr__(self) -> str:
        return f"TMaze(corridor={self.corridor})"
