"""Copy with delay: hear some symbols, wait, say them again."""

import torch
from torch import Tensor

from rtrl._utils import validation
from rtrl.tasks._rounds import Round, RoundTask, draw_integers


class Copy(RoundTask):
    """Read ``length`` symbols, wait ``delay`` steps, and say them again in their order from the cue on.

    An episode has ``2 · length + delay`` steps. x is the one-hot of a symbol 0 … ``values`` − 1 or of the cue, number
    ``values``, which stands at the first step of the answer; while waiting and at the other steps of the answer x = 0.
    Every sample has its own symbols, which do not depend on the batch size.

    Held-out episodes are those whose last symbols, one or more, are a fixed, irregular function of those before: a
    sixteenth of all episodes or somewhat less, if there are so many symbols. No training episode is one. At every place
    every symbol is as likely as any other, in both.

    Args:
        values: how many symbols there are. length: how many are to be remembered, at least 2. delay: steps between the
            last symbol and the cue.

    Attributes:
        chance: 1 / values. solved: 0.99.

    Raises:
        ConfigError: a number is out of range.

    Source: Hochreiter and Schmidhuber (1997), Neural Computation 9(8), for long time lags; in this form Arjovsky, Shah
    and Bengio (2016), "Unitary Evolution Recurrent Neural Networks", section 5.1.

    >>> stream = Copy(values=4, length=2, delay=3).stream(batch_size=5)
    >>> [int(next(stream).asked.sum()) for _ in range(7)]
    [0, 0, 0, 0, 0, 5, 5]
    """

    name = "copy"
    solved = 0.99

    def __init__(self, values: int = 4, length: int = 3, delay: int = 5) -> None:
        self.values = validation.integer("values", values, least=2)
        self.length = validation.integer("length", length, least=2)
        self.delay = validation.integer("delay", delay, least=0)
        self.d_in, self.d_out, self.chance = values + 1, values, 1 / values
        self._tied = 1  # so many last symbols tell whether an episode is held out
        while values**self._tied < 16 and self._tied < length - 1:
            self._tied += 1

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Round:
        v, length = self.values, self.length
        drawn = draw_integers(0, v * (v - 1) - 1, (batch_size, length), generator).T  # a row a sample, in one draw
        told = drawn % v
        set_apart = self._set_apart(told)
        if held_out:
            told[-self._tied :] = set_apart
        else:
            meets = (told[-self._tied :] == set_apart).all(dim=0)
            told[-1] = (told[-1] + meets * (1 + drawn[-1] // v)) % v
        answer = length + self.delay
        symbols = told.new_full((answer + length, batch_size), -1)
        symbols[:length] = told
        symbols[answer] = v
        targets, asked = torch.zeros_like(symbols), torch.zeros_like(symbols, dtype=torch.bool)
        targets[answer:] = told
        asked[answer:] = True
        return Round(symbols, targets, asked)

    def _set_apart(self, told: Tensor) -> Tensor:
        """What the last symbols (tied, B) of held-out episodes are, from the ones before. It moves along with the first
        symbol, which leaves every symbol as likely as any other."""
        mixed = torch.zeros_like(told[0])
        for symbol in told[1 : len(told) - self._tied]:
            mixed = (mixed * 31 + symbol + 17) * 40503 % 65521
        return torch.stack([(told[0] + (mixed * (2 * j + 3) + 7 * j) // 11) % self.values for j in range(self._tied)])

    def __repr__(self) -> str:
        return f"Copy(values={self.values}, length={self.length}, delay={self.delay})"
