"""A stream that asks for a signal seen long before, with noise in between."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SignalStep(NamedTuple):
    """One step of B samples.

    Attributes:
        x: (B, d_in).
        target: LongTensor (B,), the signal, at the steps that ask for it; None at the others.
        is_first: whether all samples begin an episode.
    """

    x: Tensor
    target: Tensor | None
    is_first: bool


@dataclass(frozen=True)
class Signal:
    """Episodes of 1 + gap + questions steps: one of ``values`` signals, noise, and questions for the signal.

    x has an entry for each signal, one for a question, and ``noise`` entries of normal noise at every step.

    Attributes:
        values: the number of signals.
        noise: entries of noise.
        gap: steps between the signal and the first question.
        questions: steps that ask, at the end.
    """

    values: int = 4
    noise: int = 4
    gap: int = 172
    questions: int = 1

    @property
    def d_in(self) -> int:
        """The width of x."""
        return self.values + 1 + self.noise

    @property
    def steps(self) -> int:
        """The length of an episode."""
        return 1 + self.gap + self.questions

    def stream(self, batch_size: int, seed: int, dtype: torch.dtype | None = None) -> Iterator[SignalStep]:
        """Return an endless stream of episodes; the same seed gives the same one."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            signal = torch.randint(self.values, (batch_size,), generator=generator)
            for t in range(self.steps):
                x = torch.zeros(batch_size, self.d_in, dtype=dtype)
                x[:, self.values + 1 :] = torch.randn(batch_size, self.noise, generator=generator)
                asks = t > self.gap
                if t == 0:
                    x[:, : self.values] = F.one_hot(signal, self.values)
                x[:, self.values] = float(asks)
                yield SignalStep(x, signal if asks else None, t == 0)
