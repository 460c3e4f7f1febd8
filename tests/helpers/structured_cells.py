"""Cells whose rows are independent, or whose groups of rows lie above one another: plain modules, as users write them.

None declares anything. Each layer takes x (B, d) and gives y (B, d_out); ``Layers`` puts several into one flat state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl import Sparsity


class Layer(nn.Module):
    """A layer with a constant first state of the given ``shape`` (without the batch).

    Attributes:
        d_out: how many numbers y has.
        width: how many numbers of the state depend on one another.
    """

    def __init__(self, shape: Sequence[int], d_out: int, width: int = 1, start: float = 0.0) -> None:
        super().__init__()
        self.shape, self.d_out, self.width, self.start = tuple(shape), d_out, width, start

    def init_state(self, batch_size: int) -> Tensor:
        return next(self.parameters()).new_full((batch_size, *self.shape), self.start)


class MinGRU(Layer):
    """The minimal gated unit: no gate sees the state; one fused linear map."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n)
        self.both = nn.Linear(d, 2 * n)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate = self.both(x).chunk(2, dim=-1)
        gate = torch.sigmoid(gate)
        h = (1 - gate) * h + gate * candidate
        return h, h


class ElementwiseLSTM(Layer):
    """Irie, Gopalakrishnan and Schmidhuber (2024): several linear maps, weights ``w ⊙ c``, an output gate that sees all
    of the state."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n)
        self.forget, self.enter, self.out = nn.Linear(d, n), nn.Linear(d, n), nn.Linear(d, n)
        self.forget_weight, self.enter_weight = nn.Parameter(torch.ones(n)), nn.Parameter(torch.ones(n))
        self.out_state = nn.Linear(n, n, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        forget = torch.sigmoid(self.forget(x) + self.forget_weight * c)
        c = forget * c + (1 - forget) * torch.tanh(self.enter(x) + self.enter_weight * c)
        return torch.sigmoid(self.out(x) + self.out_state(c)) * c, c


class Peephole(Layer):
    """An LSTM without dense recurrence, its h and c side by side in (B, 2n): row i is (h_i, c_i)."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([2 * n], n, width=2)
        self.gates = nn.Linear(d, 4 * n)
        self.by_h, self.by_c = nn.Parameter(torch.ones(4, n)), nn.Parameter(torch.ones(2, n))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, c = state.chunk(2, dim=1)
        i, f, g, o = (self.gates(x).view(len(x), 4, -1) + self.by_h * h[:, None]).unbind(1)
        c = torch.sigmoid(f + self.by_c[0] * c) * c + torch.sigmoid(i + self.by_c[1] * c) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, torch.cat([h, c], dim=1)


class ComplexDiagonal(Layer):
    """A linear recurrent unit (Zucchet et al. 2023), its complex state as pairs (B, n, 2) or as two planes (B, 2, n).

    With ``nonlinear`` it is a recurrent trace unit (Elelimy et al. 2024).
    """

    def __init__(self, d: int, n: int, dim: int = 2, nonlinear: bool = False) -> None:
        super().__init__([n, 2] if dim == 2 else [2, n], 2 * n, width=2)
        self.decay, self.angle = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.ones(n))
        self.real, self.imaginary = nn.Linear(d, n, bias=False), nn.Linear(d, n, bias=False)
        self.dim, self.nonlinear = dim, nonlinear

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.exp(-torch.exp(self.decay))
        cos, sin, scale = size * torch.cos(self.angle), size * torch.sin(self.angle), torch.sqrt(1 - size * size)
        a, b = h.unbind(self.dim)
        real, imaginary = cos * a - sin * b + scale * self.real(x), sin * a + cos * b + scale * self.imaginary(x)
        h = torch.stack([real, imaginary], dim=self.dim)
        h = torch.tanh(h) if self.nonlinear else h
        return h.flatten(1), h


class BlockDiagonal(Layer):
    """Heads of k units, each with a recurrence of its own, in a flat state (B, n·k), written in one of four ways."""

    def __init__(self, d: int, n: int, how: str = "bmm", k: int = 2) -> None:
        super().__init__([n * k], n * k, width=k)
        self.n, self.k, self.how = n, k, how
        self.enter = nn.Linear(d, n * k)
        self.recur = nn.Parameter(torch.empty(n * k, n * k) if how == "mask" else torch.empty(n, k, k))
        self.register_buffer("mask", torch.block_diag(*[torch.ones(k, k)] * n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        heads = h.view(-1, self.n, self.k)
        if self.how == "bmm":
            back = torch.bmm(heads.transpose(0, 1), self.recur).transpose(0, 1).flatten(1)
        elif self.how == "einsum":
            back = torch.einsum("bnk,nkj->bnj", heads, self.recur).flatten(1)
        elif self.how == "reshape":
            back = (heads[..., None] * self.recur).sum(2).reshape(h.shape)
        else:
            back = F.linear(h, self.recur * self.mask)
        h = torch.tanh(self.enter(x) + back)
        return h, h


class Columns(Layer):
    """Small recurrent networks beside one another (Javed et al. 2023)."""

    def __init__(self, d: int, n: int, k: int = 2) -> None:
        super().__init__([n, k], n * k, width=k)
        self.columns = nn.ModuleList(nn.GRUCell(d, k) for _ in range(n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.stack([column(x, h[:, i]) for i, column in enumerate(self.columns)], dim=1)
        return h.flatten(1), h


class Transposed(Layer):
    """``σ(a) ⊙ h + x W + x V``, one weight stored by input and the other used transposed."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n, start=0.4)
        self.rate = nn.Parameter(torch.zeros(n))
        self.right, self.turned = nn.Parameter(torch.empty(d, n)), nn.Parameter(torch.empty(d, n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.sigmoid(self.rate)
        h = keep * h + (1 - keep) * torch.tanh(x @ self.right + F.linear(x.square(), self.turned.T))
        return h, h


class Normed(Layer):
    """A norm over all that is driven in, and one gain for all rows."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n, start=0.2)
        self.enter, self.norm = (
            nn.Linear(d, n),
            nn.LayerNorm(n, eps=0.1),
        )  # over two entries, it would be almost constant
        self.gain, self.rate = nn.Parameter(torch.empty(())), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sigmoid(self.rate) * h + torch.tanh(self.gain * self.norm(self.enter(x)) + h)
        return h, h


class TwoWidths(Layer):
    """n rows of one number and n rows of two, in one flat state (B, 3n)."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([3 * n], 3 * n, width=2)
        self.n, self.rate, self.enter = n, nn.Parameter(torch.zeros(n)), nn.Linear(d, 3 * n)
        self.turn = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        one, a, b = h.split(self.n, dim=1)
        cos, sin = 0.9 * torch.cos(self.turn), 0.9 * torch.sin(self.turn)
        moved = torch.cat([torch.sigmoid(self.rate) * one, cos * a - sin * b, sin * a + cos * b], dim=1)
        h = moved + torch.tanh(self.enter(x))
        return h, h


class Placed(Layer):
    """Writes ``V x`` into the rows to different amounts: every parameter reaches all rows, each row only itself."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n, 2], 2 * n, width=2)
        self.value, self.place = nn.Linear(d, 2), nn.Linear(d, n)
        self.recur = nn.Parameter(torch.empty(2, 2))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ self.recur + self.place(x).softmax(1)[:, :, None] * self.value(x)[:, None])
        return h.flatten(1), h


class RolledStart(Transposed):
    """Its rates decay each row, and begin as the state of another."""

    def init_state(self, batch_size: int) -> Tensor:
        return torch.tanh(self.rate).roll(1).expand(batch_size, -1)


class Dense(Layer):
    """``tanh(W x + U h)``."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__([n], n, width=n)
        self.enter, self.recur = nn.Linear(d, n), nn.Linear(n, n, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.enter(x) + self.recur(h))
        return h, h


class Layers(nn.Module):
    """Layers above one another in one flat state, y of each the x of the next, and a readout of the last.

    Args:
        layers: the layers; the same one may occur twice.
        d: the size of x.
        between: whether each layer but the first sees what a linear map makes of the y below.
        readout: whether y is a linear map of the last layer's y, times a gain; else it is that y.
        learned: whether the first state is a parameter.
        symbols: with a number, x is a LongTensor (B,) of that many symbols, and enters by an embedding.
    """

    def __init__(
        self, layers: Sequence[Layer], d: int, *, between: bool = False, readout: bool = False, learned: bool = False,
        symbols: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sizes = [layer.init_state(1).numel() for layer in layers]
        self.embed = nn.Embedding(symbols, d) if symbols else None
        self.between = nn.ModuleList(nn.Linear(below.d_out, below.d_out) for below in layers[:-1]) if between else None
        self.head = nn.Linear(layers[-1].d_out, 2) if readout else None
        self.gain = nn.Parameter(torch.ones(2)) if readout else None
        self.first = nn.Parameter(torch.zeros(sum(self.sizes))) if learned else None

    def init_state(self, batch_size: int) -> Tensor:
        if self.first is not None:
            return torch.tanh(self.first).expand(batch_size, -1)
        return torch.cat([layer.init_state(batch_size).flatten(1) for layer in self.layers], dim=1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, states = x if self.embed is None else self.embed(x), []
        for k, (layer, below) in enumerate(zip(self.layers, h.split(self.sizes, dim=1), strict=True)):
            y = torch.tanh(self.between[k - 1](y)) if k and self.between is not None else y
            y, new = layer(y, below.view(-1, *layer.shape))
            states.append(new.flatten(1))
        y = y if self.head is None else self.gain * self.head(y)
        return y, torch.cat(states, dim=1)


class Routed(nn.Module):
    """Rows of two numbers, of which a step uses one expert of three, and, with ``writes``, writes one row of three.

    x = [features | expert | row]; it declares what it uses.
    """

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.expert, self.recur = nn.Parameter(torch.empty(3, 6, 2)), nn.Parameter(torch.empty(3, 2, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return self.recur.new_full((batch_size, 3, 2), 0.2)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        features, expert, row = x[:, :2], x[:, 2:3].long(), x[:, 3:4].long()
        if replay is None:
            replay = Sparsity(row if self.writes else None, row if self.writes else None, {"expert": expert})
        drive = torch.einsum("boi,bi->bo", self.expert[replay.active["expert"][:, 0]], features).view(h.shape)
        new = torch.tanh(torch.einsum("bni,nij->bnj", h, self.recur) + drive)
        if self.writes:
            mask = torch.zeros_like(h[:, :, :1]).scatter(1, row[:, :, None], 1.0)
            new = torch.where(mask > 0, new, h)
            return (mask * new).sum(1), new, replay
        return new.flatten(1), new, replay
