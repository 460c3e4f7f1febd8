"""Cells whose groups of rows do not lie in the order of their entries, or whose weights reach rows in unusual ways."""

import torch
from torch import Tensor, nn

from helpers.structured_cells import ElementwiseLSTM, Layer, MinGRU


class TopDown(nn.Module):
    """Two layers, the upper one's state first, or, ``interleaved``, entry by entry beside the lower one's."""

    def __init__(self, d: int, n: int, interleaved: bool) -> None:
        super().__init__()
        self.low, self.high, self.n, self.interleaved = MinGRU(d, n), ElementwiseLSTM(n, n), n, interleaved

    def init_state(self, batch_size: int) -> Tensor:
        return self.low.both.weight.new_zeros(batch_size, 2 * self.n)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        high, low = h.view(len(h), self.n, 2).unbind(2) if self.interleaved else h.chunk(2, dim=1)
        y, low = self.low(x, low)
        y, high = self.high(y, high)
        return y, torch.stack([high, low], dim=2).flatten(1) if self.interleaved else torch.cat([high, low], dim=1)


class Chain(Layer):
    """Each row sees the one before it: as many groups as rows."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n)
        self.enter, self.own, self.before = nn.Linear(d, n), nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shifted = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
        h = torch.tanh(self.enter(x) + self.own * h + self.before * shifted)
        return h, h


class DelayLine(Layer):
    """The last three inputs, mapped: no row depends on itself."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([3, n], n)
        self.enter, self.weights = nn.Linear(d, n), nn.Parameter(torch.zeros(3, n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return (self.weights * h).sum(1), torch.cat([self.enter(x)[:, None], h[:, :-1]], dim=1)


class Memoryless(Layer):
    """Half of the rows forget all at every step, half of them remember, and y sees both."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([2 * n], 2 * n)
        self.enter, self.rate = nn.Linear(d, 2 * n), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(self.enter(x))
        forgets, remembers = new.chunk(2, dim=1)
        return h * new, torch.cat([forgets, torch.sigmoid(self.rate) * h.chunk(2, dim=1)[1] + remembers], dim=1)


class TwiceUsed(Layer):
    """One weight is used in two maps of a step, and its channels reach two rows each."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n)
        self.enter, self.rate = nn.Linear(d, n), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.rate * h + self.enter(x) + self.enter(x.square()).roll(1, 1))
        return h, h


class Reordered(Layer):
    """Weights that no linear map meets: flat, squared, in another order, their elements spread over the rows."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n)
        self.flat, self.rates = nn.Parameter(torch.zeros(d * n)), nn.Parameter(torch.zeros(2, n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        weight = (self.flat.flip(0) ** 2).view(-1, h.shape[1])
        h = torch.tanh(self.rates.prod(0) * h + (x[:, :, None] * weight).sum(1))
        return h, h


ORDERED = {
    "the upper layer first": lambda d, n: TopDown(d, n, interleaved=False),
    "interleaved": lambda d, n: TopDown(d, n, interleaved=True),
    "chain": Chain,
    "delay line": DelayLine,
    "memoryless": Memoryless,
    "twice used": TwiceUsed,
    "reordered": Reordered,
}
