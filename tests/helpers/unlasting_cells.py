"""Cells whose structure does not last: rows are independent until a weight has grown or a gate opens."""

import torch
from torch import Tensor, nn

from helpers.structured_cells import ElementwiseLSTM, Layer, MinGRU, Routed
from rtrl import Sparsity


class Coupled(Layer):
    """``tanh(W x + a ∘ h + C h)``: independent as long as C is zero, and C learns."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n)
        self.enter, self.own = nn.Linear(d, n), nn.Parameter(torch.zeros(n))
        self.coupling = nn.Parameter(torch.zeros(n, n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.enter(x) + self.own * h + h @ self.coupling.T)
        return h, h


class Opening(Layer):
    """An independent layer of n ≥ 2 rows in which something opens where ``x[:, 0]`` is positive, sample by sample.

    ``what`` couples rows, and opens: "state" a neighbour in the state; "balanced" two that cancel in the sum over rows;
    "drive" a neighbour's drive, so that a weight reaches two rows; "weight" a neighbour's element-wise weight;
    "written" the drive itself; "moved" a permutation of the drive, so that each weight still reaches one row, but
    another one. "zero" is a function of a product of neighbours, which couples at every state but zero.
    """

    def __init__(self, d: int, n: int, what: str = "state") -> None:
        super().__init__([n], n)
        self.what, self.enter, self.own = what, nn.Linear(d, n), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        opened, drive = torch.relu(x[:, :1]), self.enter(x)
        kept = torch.sigmoid(self.own) * h
        if self.what == "state":
            kept = kept + opened * h.roll(1, 1)
        elif self.what == "balanced":
            kept = kept + opened * torch.cat([h[:, 1:2], -h[:, 1:2], torch.zeros_like(h[:, 2:])], dim=1)
        elif self.what == "drive":
            drive = drive + opened * drive.roll(1, 1)
        elif self.what == "weight":
            drive = drive + self.own + opened * self.own.roll(1)
        elif self.what == "written":
            drive = opened * drive
        elif self.what == "moved":
            drive = torch.where(opened > 0, drive.roll(1, 1), drive)
        else:
            kept = kept + torch.tanh(h * h.roll(1, 1))
        h = kept + torch.tanh(drive)
        return h, h


class Passing(MinGRU):
    """Passes on the first feature as it is, beside its state."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = super().forward(x, h)
        return torch.cat([x[:, :1], y[:, 1:]], dim=1), h


class Feedback(nn.Module):
    """Two independent layers; what the upper one remembers reaches the lower one where ``x[:, 0]`` is positive."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__()
        self.below, self.above, self.n = MinGRU(d, n), ElementwiseLSTM(n, n), n

    def init_state(self, batch_size: int) -> Tensor:
        return self.below.both.weight.new_zeros(batch_size, 2 * self.n)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        low, high = h.chunk(2, dim=1)
        y, low = self.below(x, low)
        y, new = self.above(y, high)
        return y, torch.cat([low + torch.relu(x[:, :1]) * high, new], dim=1)


class RoutedOpening(Routed):
    """Its rows see one another where the first feature is positive."""

    def __init__(self) -> None:
        super().__init__(writes=False)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        seen = h + torch.relu(x[:, :1, None]) * h.roll(1, 1)
        return super().forward(x, seen, replay)


class TwoKinds(MinGRU):
    """Takes features at some steps and symbols at others, whose parameters serve no step before."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__(d, n)
        self.embed, self.extra = nn.Embedding(4, 2 * n), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if x.is_floating_point():
            return super().forward(x, h)
        gate, candidate = self.embed(x).chunk(2, dim=-1)
        h = torch.sigmoid(gate) * h + candidate * self.extra
        return h, h
