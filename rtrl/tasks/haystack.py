"""A needle in a haystack: find the symbol after the key among noise, and repeat it at the end."""

import torch

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.tasks._episodes import Episode, EpisodeTask, draw_integers

_FRAME = 5  # BOS, KEY, k, SEP and Q


class Haystack(EpisodeTask):
    """Read BOS, noise, KEY, k, SEP, noise, Q, one symbol per step, and answer k at Q.

    The noise consists of the symbols that k is chosen from, so that only its place after KEY distinguishes k. x is the
    one-hot of 0 … ``values`` − 1, then BOS, KEY, SEP, Q. The samples of a batch have the same length; each has its own
    noise, k and place of KEY.

    In held-out episodes, the numbers of the noise symbols add up to a multiple of ``values``; in training episodes they
    do not. The sum is independent of k.

    Args:
        values: the number of symbols that k may be; there are ``values + 4`` symbols.
        lengths: of the shortest and the longest episode; by default (8, 16), and with a gap (gap + 6, gap + 8).
        gap: the smallest number of noise symbols between SEP and Q.

    Attributes:
        chance: 1 / values.
        solved: 0.99.

    Raises:
        ConfigError: a number is out of range, or an episode is too short for the frame of 5 symbols, the gap and one
            symbol of noise.

    Example:
        >>> stream = Haystack(values=6).stream(batch_size=4)
        >>> next(stream).x.shape
        torch.Size([4, 10])
    """

    name = "haystack"
    solved = 0.99

    def __init__(self, values: int = 6, lengths: tuple[int, int] | None = None, gap: int = 0) -> None:
        validation.integer("values", values, least=2)
        validation.integer("gap", gap, least=0)
        if lengths is None:
            lengths = (gap + 6, gap + 8) if gap else (8, 16)
        shortest, longest = lengths
        if not _FRAME + max(gap, 1) <= shortest <= longest:
            raise ConfigError(
                f"lengths must be (shortest, longest) with shortest ≥ {_FRAME + max(gap, 1)}: {_FRAME} symbols of "
                f"frame and at least {max(gap, 1)} of noise; got {lengths}"
            )
        self.values, self.lengths, self.gap = values, (shortest, longest), gap
        self.d_in, self.d_out, self.chance = values + 4, values, 1 / values

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Episode:
        v = self.values
        length = int(draw_integers(*self.lengths, (1,), generator))
        noise = draw_integers(0, v - 1, (length - _FRAME, batch_size), generator)
        # The last noise symbol decides whether the sum is a multiple of v; all symbols remain equally likely.
        rest = draw_integers(1, v - 1, (batch_size,), generator) * (not held_out)
        noise[-1] = (rest - noise[:-1].sum(dim=0)) % v
        k = draw_integers(0, v - 1, (batch_size,), generator)
        before = draw_integers(0, len(noise) - self.gap, (batch_size,), generator)

        t = torch.arange(length)[:, None]
        late = t > before + 3  # the second part of the noise is three symbols later
        symbols = noise.gather(0, (t - 1 - 3 * late).clamp(0, len(noise) - 1).expand(-1, batch_size))
        places = ((t == 0, v), (t == before + 1, v + 1), (t == before + 2, k), (t == before + 3, v + 2))
        for here, symbol in (*places, (t == length - 1, v + 3)):
            symbols = torch.where(here, symbol, symbols)
        return Episode(symbols, k.expand_as(symbols), (t == length - 1).expand_as(symbols))

    def __repr__(self) -> str:
        return f"Haystack(values={self.values}, lengths={self.lengths}, gap={self.gap})"
