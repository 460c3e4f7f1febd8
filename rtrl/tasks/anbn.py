"""The language aⁿbⁿ: accept strings with as many b as a, reject the others."""

from collections.abc import Sequence

import torch

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.tasks._episodes import Episode, EpisodeTask, draw_integers


class AnBn(EpisodeTask):
    """Read a string aⁿbᵐ, one symbol per step, and answer at the last symbol whether m = n.

    x is the one-hot of a (0) or b (1). A string begins with the reset of the state and ends at the step with a target.
    Half of the strings are accepted (class 1); in the others (class 0) m differs from n by 1 to ``slack``. Samples with
    a shorter string than the longest of their batch end with x = 0.

    Args:
        train_n: the n of training.
        held_out_n: the n of held-out strings, none of them in ``train_n``.
        slack: the largest difference of a rejected string; at most n if n < slack.

    Attributes:
        chance: the score of the best answer to the last symbol only: 0.5, because half of the strings are accepted,
            plus the share of training strings that end in a (m = 0), which are rejected; 0.571 with the defaults.
        solved: 0.99.

    Raises:
        ConfigError: a number is out of range, or an n is in both lists.

    Source:
        Gers and Schmidhuber (2001), "LSTM recurrent networks learn simple context-free and context-sensitive
        languages", IEEE Transactions on Neural Networks 12(6); there as prediction, here as acceptance.

    Example:
        >>> stream = AnBn(train_n=[2], held_out_n=[3], slack=1).stream(batch_size=4)
        >>> next(stream).x.shape
        torch.Size([4, 2])
    """

    name = "anbn"
    d_in, d_out = 2, 2
    solved = 0.99

    def __init__(
        self,
        train_n: Sequence[int] = (1, 2, 3, 4, 6, 7, 8),
        held_out_n: Sequence[int] = (5, 9, 10),
        slack: int = 3,
    ) -> None:
        self.train_n, self.held_out_n, self.slack = tuple(train_n), tuple(held_out_n), slack
        for what, numbers in (("train_n", self.train_n), ("held_out_n", self.held_out_n), ("slack", (slack,))):
            if not numbers:
                raise ConfigError(f"{what} must hold at least one positive integer, got none")
            for n in numbers:
                validation.integer(what, n)
        both = sorted(set(self.train_n) & set(self.held_out_n))
        if both:
            raise ConfigError(f"n = {both} is both in train_n and in held_out_n; a held-out n must not be in train_n")
        without_b = [max(self.slack - n + 1, 0) / self.slack / 4 for n in self.train_n]
        self.chance = 0.5 + sum(without_b) / len(without_b)

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Episode:
        choices = torch.tensor(self.held_out_n if held_out else self.train_n)
        n = choices[draw_integers(0, len(choices) - 1, (batch_size,), generator)]
        accepted = draw_integers(0, 1, (batch_size,), generator)
        sign = 2 * draw_integers(0, 1, (batch_size,), generator) - 1
        least = draw_integers(1, self.slack, (batch_size,), generator)
        m = n + (1 - accepted) * sign * least.minimum(n)
        t = torch.arange(int((n + m).max()))[:, None]
        symbols = torch.where(t < n + m, (t >= n).long(), -1)
        return Episode(symbols, accepted.expand_as(symbols), t == n + m - 1)

    def __repr__(self) -> str:
        return f"AnBn(train_n={self.train_n}, held_out_n={self.held_out_n}, slack={self.slack})"
