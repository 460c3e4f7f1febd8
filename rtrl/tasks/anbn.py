"""The language aⁿbⁿ: accept strings with as many b as a, reject the others."""

from collections.abc import Sequence

import torch

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.tasks._rounds import Round, RoundTask, draw_integers


class AnBn(RoundTask):
    """Read a string aⁿbᵐ, one symbol a step, and say at its last symbol whether m = n.

    x is the one-hot of a (0) or b (1). No marks are needed: a string begins with a fresh state and ends where an answer
    is asked. Half of the strings are accepted (class 1); in the others (class 0) m differs from n by 1 to ``slack``,
    the nearest being the hardest. Samples whose string has ended wait with x = 0 for the longest of their batch.

    Args:
        train_n: the n of training. held_out_n: the n of held-out strings, in none of the training.
        slack: the largest difference of a rejected string; of strings with n < slack at most n.

    Attributes:
        chance: of whoever sees the last symbol alone: 0.5, since half of the strings are accepted, and more by the
            share of strings of training that end in a and so give themselves away (m = 0): 0.571 as it comes. solved:
            0.99.

    Raises:
        ConfigError: a number is out of range, or an n is in both lists.

    Source: Gers and Schmidhuber (2001), "LSTM recurrent networks learn simple context-free and context-sensitive
    languages", IEEE Transactions on Neural Networks 12(6); there as prediction, here as acceptance.

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
            raise ConfigError(f"n = {both} is both in train_n and in held_out_n; a held-out n is in no training")
        without_b = [max(self.slack - n + 1, 0) / self.slack / 4 for n in self.train_n]
        self.chance = 0.5 + sum(without_b) / len(without_b)

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Round:
        choices = torch.tensor(self.held_out_n if held_out else self.train_n)
        n = choices[draw_integers(0, len(choices) - 1, (batch_size,), generator)]
        accepted = draw_integers(0, 1, (batch_size,), generator)
        sign = 2 * draw_integers(0, 1, (batch_size,), generator) - 1
        least = draw_integers(1, self.slack, (batch_size,), generator)
        m = n + (1 - accepted) * sign * least.minimum(n)
        t = torch.arange(int((n + m).max()))[:, None]
        symbols = torch.where(t < n + m, (t >= n).long(), -1)
        return Round(symbols, accepted.expand_as(symbols), t == n + m - 1)

    def __repr__(self) -> str:
        return f"AnBn(train_n={self.train_n}, held_out_n={self.held_out_n}, slack={self.slack})"
