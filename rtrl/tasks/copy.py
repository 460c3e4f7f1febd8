"""Copy with delay: hear some symbols, wait, say them again."""

import torch

from rtrl import _numbers
from rtrl.tasks._rounds import Round, RoundTask, draw_integers


class Copy(RoundTask):
    """Read ``length`` symbols, wait ``delay`` steps, and say them again in their order from the cue on.

    An episode has ``2 · length + delay`` steps. x is the one-hot of a symbol 0 … ``values`` − 1 or of the cue, number
    ``values``, which stands at the first step of the answer; while waiting and at the other steps of the answer x = 0.
    Every sample has its own symbols, which do not depend on the batch size.

    Held-out episodes are those whose symbols add up to a multiple of ``values``; no training episode is one. At every
    place every symbol is as likely as any other, in both.

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
        self.values = _numbers.integer("values", values, least=2)
        self.length = _numbers.integer("length", length, least=2)
        self.delay = _numbers.integer("delay", delay, least=0)
        self.d_in, self.d_out, self.chance = values + 1, values, 1 / values

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Round:
        v, length = self.values, self.length
        drawn = draw_integers(0, v * (v - 1) - 1, (batch_size, length), generator).T  # a row a sample, in one draw
        told = drawn % v
        rest = torch.zeros_like(told[-1]) if held_out else 1 + drawn[-1] // v
        told[-1] = (rest - told[:-1].sum(dim=0)) % v
        answer = length + self.delay
        symbols = told.new_full((answer + length, batch_size), -1)
        symbols[:length] = told
        symbols[answer] = v
        targets, asked = torch.zeros_like(symbols), torch.zeros_like(symbols, dtype=torch.bool)
        targets[answer:] = told
        asked[answer:] = True
        return Round(symbols, targets, asked)

    def __repr__(self) -> str:
        return f"Copy(values={self.values}, length={self.length}, delay={self.delay})"
