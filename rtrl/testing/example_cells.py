"""Small cells that together take every path of the engine. Sparsity patterns are part of the input x, so that every
oracle can run them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.cells import RecurrentMoE, Sparsity, grouped_linear


class PlainRNN(nn.Module):
    """tanh(W x + U h + b), the weights used by ``F.linear`` and ``h @ U``; y depends on h before and after the step."""

    def __init__(self, d_in: int, hidden: int, d_out: int = 2, start: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.inward = nn.Linear(d_in, hidden)
        self.recurrent = nn.Parameter(torch.empty(hidden, hidden))
        self.head = nn.Linear(2 * hidden, d_out)

    def init_state(self, batch_size: int) -> Tensor:
        return self.recurrent.new_full((batch_size, self.recurrent.shape[0]), self.start)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(self.inward(x) + h @ self.recurrent)
        return self.head(torch.cat([h, h_next], dim=-1)), h_next


class DictOutput(NamedTuple):
    value: Tensor
    extra: dict[str, Tensor]


class OddCell(nn.Module):
    """Parameters that no tap covers: a normalisation, element-wise scales, a transposed use, a scalar; the state is
    (B, 2, hidden)."""

    def __init__(self, d_in: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.weight = nn.Parameter(torch.empty(hidden, hidden))
        self.scale = nn.Parameter(torch.empty(hidden))
        self.leak = nn.Parameter(torch.empty(()))
        self.inward = nn.Linear(d_in, hidden, bias=False)

    def init_state(self, batch_size: int) -> Tensor:
        rows = torch.linspace(-0.3, 0.9, 2 * self.scale.shape[0], dtype=self.scale.dtype, device=self.scale.device)
        return rows.square().reshape(1, 2, -1).repeat(batch_size, 1, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[DictOutput, Tensor]:
        fast, slow = h.unbind(dim=1)
        drive = self.inward(x) + F.linear(slow, self.weight)
        fast_next = torch.tanh(
            self.norm(fast) * self.scale + drive @ self.weight.T
        )  # ``weight`` twice: as a tap, and transposed
        rate = torch.sigmoid(self.leak)
        h_next = torch.stack([fast_next, rate * slow + (1 - rate) * fast_next], dim=1)
        return DictOutput(drive, {"product": fast_next * self.scale}), h_next


class ScheduledCell(nn.Module):
    """Reads, writes and experts as the input says: x = [features | read mask | write mask | expert mask].

    Reads and writes may be any sets, empty ones included, and need not meet. In a batch the declared sets are as wide
    as the largest, so some samples declare more than they use. ``row_scale`` is sliced by the rows written and not used
    by a linear map.
    """

    def __init__(self, features: int, n_rows: int, width: int, n_experts: int) -> None:
        super().__init__()
        self.features, self.n_rows, self.width, self.n_experts = features, n_rows, width, n_experts
        self.look = nn.Linear(width, width)
        self.inward = nn.Linear(features, width, bias=False)
        self.expert = nn.Parameter(torch.empty(n_experts, width, width))
        self.expert_bias = nn.Parameter(torch.empty(n_experts, width))
        self.label = nn.Parameter(torch.empty(n_rows, width))
        self.row_scale = nn.Parameter(torch.empty(n_rows, width))
        self.mix = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 2)

    def init_state(self, batch_size: int) -> Tensor:
        rows = torch.linspace(-0.5, 0.7, self.n_rows * self.width, dtype=self.label.dtype, device=self.label.device)
        return rows.reshape(1, self.n_rows, self.width).repeat(batch_size, 1, 1)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        features, read, write, use = x.split([self.features, self.n_rows, self.n_rows, self.n_experts], dim=-1)
        if replay is None:
            chosen = [
                mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
                for mask in (read, write, use)
            ]
            replay = self.declare(*chosen)
            if float(features[0, 0]) > 0.8:  # at some steps it declares all but the experts: slow and right
                replay = Sparsity(active={name: replay.active[name] for name in ("expert", "expert_bias")})
        every = torch.arange(self.n_rows, device=h.device).expand(h.shape[0], -1)
        reads = every if replay.reads is None else replay.reads
        writes = every if replay.writes is None else replay.writes
        experts = replay.active["expert"]
        reading, writing = read.gather(1, reads).unsqueeze(-1), write.gather(1, writes).unsqueeze(-1)
        seen = rows(h, reads) + F.embedding(reads, self.label)
        pooled = (reading * torch.tanh(self.look(seen))).sum(dim=1) + self.inward(features)
        mixture = grouped_linear(torch.tanh(pooled)[:, None, None], self.expert, self.expert_bias, experts).squeeze(2)
        pooled = pooled + (use.gather(1, experts).unsqueeze(-1) * mixture).sum(dim=1)
        before = rows(h, writes)
        new = torch.tanh(before * self.row_scale[writes] + pooled.unsqueeze(1) + self.mix(before))
        after = torch.where(writing > 0, new, before)
        h_next = h.scatter(1, wide(writes, h), after)
        product = (writing * after).sum(dim=1) * (reading * rows(h, reads)).sum(dim=1)
        return self.head(pooled) + product.sum(dim=-1, keepdim=True), h_next, replay

    def declare(self, reads: Tensor, writes: Tensor, experts: Tensor) -> Sparsity:
        active = {"expert": experts, "expert_bias": experts, "label": reads, "row_scale": writes}
        return Sparsity(reads=reads, writes=writes, active=active)


class Ring(nn.Module):
    """``tanh(W x + (U ∘ ring) h)``: entry i of the state depends on itself and entry i − 1."""

    ring: Tensor

    def __init__(self, d_in: int, hidden: int) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.empty(hidden, d_in))
        self.recurrent = nn.Parameter(torch.empty(hidden, hidden))
        self.register_buffer("ring", torch.eye(hidden) + torch.eye(hidden).roll(1, 0))

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.new_full((batch_size, self.inward.shape[0]), 0.3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(x @ self.inward.T + h @ (self.recurrent * self.ring).T)
        return torch.cat([h, h_next], dim=-1), h_next


class Leaky(nn.Module):
    """``a ∘ h + (1 − a) tanh(W x)``: the dynamics Jacobian is diag(a), and a is a parameter or the same constant for
    all."""

    def __init__(self, d_in: int, hidden: int, leak: float | None) -> None:
        super().__init__()
        self.inward = nn.Linear(d_in, hidden)
        self.rate = nn.Parameter(torch.empty(hidden)) if leak is None else None
        self.leak = leak

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.weight.new_zeros(batch_size, self.inward.out_features)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        keep = 1 - (self.leak or 0.0) if self.rate is None else torch.sigmoid(self.rate)
        h_next = keep * h + (1 - keep) * torch.tanh(self.inward(x))
        return h + h_next, h_next


class TwoLayers(nn.Module):
    """Two layers of tanh units, the upper one fed by the lower one's new state; y is the upper one's."""

    def __init__(self, d_in: int, lower: int, upper: int) -> None:
        super().__init__()
        self.sizes = [lower, upper]
        self.enter, self.rise = nn.Linear(d_in, lower), nn.Linear(lower, upper)
        self.within_lower, self.within_upper = nn.Linear(lower, lower, bias=False), nn.Linear(upper, upper, bias=False)

    def init_state(self, batch_size: int) -> Tensor:
        return self.enter.weight.new_full((batch_size, sum(self.sizes)), -0.2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        below, above = h.split(self.sizes, dim=1)
        below = torch.tanh(self.enter(x) + self.within_lower(below))
        above = torch.tanh(self.rise(below) + self.within_upper(above))
        return above, torch.cat([below, above], dim=1)


class TwiceUsed(PlainRNN):
    """Uses its recurrent weight in two linear maps of one step."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h_next = super().forward(x, h)
        return y, torch.tanh(h_next + (h * h) @ self.recurrent)


class PartlyTrained(PlainRNN):
    """One weight is frozen, one belongs to two modules, and a scalar scales only y."""

    def __init__(self, d_in: int, hidden: int) -> None:
        super().__init__(d_in, hidden, start=0.3)
        self.again = nn.Linear(d_in, hidden, bias=False)
        self.again.weight = self.inward.weight
        self.gain = nn.Parameter(torch.empty(()))
        self.inward.bias.requires_grad_(False)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h_next = super().forward(x, h)
        return self.gain * y, torch.tanh(h_next + self.again(x * x))


class NearTie(nn.Module):
    """Two units, one of which is written; which one is a near tie that a lone sample and a larger batch decide
    differently, as another order of rounding does. Follows ``replay``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return self.weight.new_full((batch_size, 2), 0.5)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        chosen = torch.full((len(x), 1), int(len(x) == 1), device=h.device) if replay is None else replay.writes
        assert chosen is not None
        new = torch.tanh((h @ self.weight).gather(1, chosen) + x[:, :1])
        return new, h.scatter(1, chosen, new), Sparsity(None, chosen) if replay is None else replay


class SlowUnits(nn.Module):
    """Units that forget slowly, each at its own rate, and feed the next one a little: an influence that is dropped
    anywhere is missed hundreds of steps later."""

    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(1, 2)
        self.mix = nn.Linear(2, 2, bias=False)
        self.register_buffer("rates", torch.tensor([0.03, 0.01]))

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.weight.new_full((batch_size, 2), 0.1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = h + self.rates * (torch.tanh(self.inward(x) + self.mix(h)) - h)
        return h + h_next, h_next


class ForcedMoE(nn.Module):
    """A ``RecurrentMoE`` whose choices are part of the input: x = [features | reads | writes | experts], the last three
    as numbers."""

    def __init__(self, cell: RecurrentMoE, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.cell, self.widths = cell, widths

    def init_state(self, batch_size: int) -> Tensor:
        return self.cell.init_state(batch_size)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        features, *chosen = x.split([self.cell.d_in, *self.widths], dim=-1)
        y, h_next, used = self.cell(features, h, replay=self.cell.choices(*(index.long() for index in chosen)))
        return (
            y,
            h_next,
            Sparsity(used.reads, used.writes, {f"cell.{name}": index for name, index in used.active.items()}),
        )


def rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, wide(index, values))


def wide(index: Tensor, values: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, values.shape[-1])


def seeded(cell: nn.Module, seed: int, scale: float = 0.7) -> nn.Module:
    """The cell in float64 with weights drawn from ``seed``."""
    cell = cell.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in cell.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale / fan_in**0.5
            )
    return cell
