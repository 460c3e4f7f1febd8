"""Copy with delay: read some symbols, wait, and repeat them."""

import torch
from torch import Tensor

from rtrl._utils import validation
from rtrl.tasks._episodes import Episode, EpisodeTask, draw_integers


class Copy(EpisodeTask):
    """Read ``length`` symbols, wait ``delay`` steps, and repeat the symbols in order from the cue on.

    An episode has ``2 · length + delay`` steps. x is the one-hot of a symbol 0 … ``values`` − 1, or of the cue, number
    ``values``, at the first step of the answer; during the delay and at the other steps of the answer x = 0. Every
    sample has its own symbols, which do not depend on the batch size.

    In held-out episodes, the last symbols, one or more, are a fixed, irregular function of the symbols before; they are
    at most a sixteenth of all episodes if there are enough symbols, and none of them is a training episode. In both
    parts, all symbols are equally likely at every place.

    Args:
        values: the number of different symbols.
        length: the number of symbols to remember, at least 2.
        delay: the number of steps between the last symbol and the cue.

    Attributes:
        chance: 1 / values.
        solved: 0.99.

    Raises:
        ConfigError: a number is out of range.

    Source:
        Hochreiter and Schmidhuber (1997), Neural Computation 9(8), for long time lags; in this form Arjovsky, Shah and
        Bengio (2016), "Unitary Evolution Recurrent Neural Networks", section 5.1.

    Example:
        >>> stream = Copy(values=4, length=2, delay=3).stream(batch_size=5)
        >>> tuple(int(next(stream).has_target.sum()) for _ in range(7))
        (0, 0, 0, 0, 0, 5, 5)
    """

    name = "copy"
    solved = 0.99

    def __init__(self, values: int = 4, length: int = 3, delay: int = 5) -> None:
        self.values = validation.integer("values", values, least=2)
        self.length = validation.integer("length", length, least=2)
        self.delay = validation.integer("delay", delay, least=0)
        self.d_in, self.d_out, self.chance = values + 1, values, 1 / values
        self._tied = 1  # the number of last symbols that decide whether an episode is held out
        while values**self._tied < 16 and self._tied < length - 1:
            self._tied += 1

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Episode:
        v, length = self.values, self.length
        drawn = draw_integers(0, v * (v - 1) - 1, (batch_size, length), generator).T  # one row per sample, in one draw
        content = drawn % v
        held_out_end = self._held_out_end(content)
        if held_out:
            content[-self._tied :] = held_out_end
        else:
            meets = (content[-self._tied :] == held_out_end).all(dim=0)
            content[-1] = (content[-1] + meets * (1 + drawn[-1] // v)) % v
        answer = length + self.delay
        symbols = content.new_full((answer + length, batch_size), -1)
        symbols[:length] = content
        symbols[answer] = v
        targets, has_target = torch.zeros_like(symbols), torch.zeros_like(symbols, dtype=torch.bool)
        targets[answer:] = content
        has_target[answer:] = True
        return Episode(symbols, targets, has_target)

    def _held_out_end(self, content: Tensor) -> Tensor:
        """The last symbols (tied, B) of a held-out episode, a function of the symbols before. It is shifted by the
        first symbol, so that all symbols are equally likely."""
        mixed = torch.zeros_like(content[0])
        for symbol in content[1 : len(content) - self._tied]:
            mixed = (mixed * 31 + symbol + 17) * 40503 % 65521
        return torch.stack(
            [(content[0] + (mixed * (2 * j + 3) + 7 * j) // 11) % self.values for j in range(self._tied)]
        )

    def __repr__(self) -> str:
        return f"Copy(values={self.values}, length={self.length}, delay={self.delay})"
