"""Cells that declare slices of their parameters active, met in every way."""

import torch
from torch import Tensor, nn

import rtrl
from helpers.strategies import normal
from rtrl.cells import grouped_linear

F64 = torch.float64


class Cell(nn.Module):
    """A state of three numbers that begins at 0.2; x = [indices of slices | features]."""

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 3), 0.2, dtype=F64)


class MatmulSlices(Cell):
    """A sliced parameter met as ``u @ W``: its slices are entries of u. Two of four are active."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.w, self.u, self.head = nn.Parameter(torch.empty(4, 3)), nn.Parameter(torch.empty(3, 3)), nn.Linear(3, 2)

    def forward(
        self, x: Tensor, h: Tensor, replay: rtrl.Sparsity | None = None
    ) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        picked = x[:, :2].long() if replay is None else replay.active["w"]
        entries = torch.zeros(len(x), 4, dtype=h.dtype).scatter(1, picked, 1.0) * x[:, 2:6]
        z = torch.stack([entries, 0.5 * entries][: self.tokens], dim=1) @ self.w
        h = torch.tanh(z.square().sum(1) + z.sum(1) + h @ self.u)
        return self.head(h), h, rtrl.Sparsity(active={"w": picked})


class WeightAndBias(Cell):
    """An expert's weight is active where it is used; its bias everywhere, or not declared, or computed."""

    def __init__(self, bias: str) -> None:
        super().__init__()
        self.bias = bias
        self.w, self.b = nn.Parameter(torch.empty(4, 3, 3)), nn.Parameter(torch.empty(4, 3))
        self.head = nn.Linear(3, 2)

    def forward(
        self, x: Tensor, h: Tensor, replay: rtrl.Sparsity | None = None
    ) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        index = x[:, :1].long() if replay is None else replay.active["w"]
        b = 0.5 * self.b if self.bias == "computed" else self.b
        h = torch.tanh(grouped_linear((h + x[:, 1:])[:, None, None], self.w, b, index).flatten(1) + 0.3 * h)
        active = {"w": index}
        if self.bias == "all":
            active["b"] = torch.arange(4).expand(len(x), -1)
        return self.head(h), h, rtrl.Sparsity(active=active)


def turns(k: int, features: int) -> list[Tensor]:
    """Nine steps of two samples; slice t // 2 and the k − 1 after it, other ones for the other sample."""
    index = torch.tensor([[[(t // 2 + 2 * b + i) % 4 for i in range(k)] for b in range(2)] for t in range(9)])
    return list(torch.cat([index.double(), normal(3, 9, 2, features)], dim=-1))
