"""Small cells of the oracles' own tests, each with one feature that could go wrong, and the cases drawn over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

F64 = torch.float64


def draw_parameter(generator: torch.Generator, *shape: int, scale: float = 0.7) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=F64))


class Tanh(nn.Module):
    """A tanh network; y looks at the state received and at the next one; one idle and one frozen parameter."""

    def __init__(self, d_in: int, size: int, g: torch.Generator) -> None:
        super().__init__()
        self.size = size
        self.recurrent, self.input = draw_parameter(g, size, size), draw_parameter(g, size, d_in)
        self.bias, self.readout = draw_parameter(g, size), draw_parameter(g, 2, size)
        self.idle = draw_parameter(g, 3)
        self.frozen = nn.Parameter(torch.tensor(0.9, dtype=F64), requires_grad=False)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, self.size, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(h @ self.recurrent.T + self.frozen * (x @ self.input.T) + self.bias)
        return (h_next + 0.5 * h * h) @ self.readout.T, h_next


class Slots(nn.Module):
    """A gated cell with a state (B, n, d) whose slots meet, a first state that is not zero, y a dict, a third item."""

    def __init__(self, d_in: int, size: int, g: torch.Generator) -> None:
        super().__init__()
        self.first = torch.randn(2, size, generator=g, dtype=F64)
        self.gate, self.candidate = draw_parameter(g, size, size), draw_parameter(g, size, size)
        self.between, self.input = draw_parameter(g, 2, 2), draw_parameter(g, 2, size, d_in)

    def init_state(self, batch_size: int) -> Tensor:
        return self.first.expand(batch_size, -1, -1).clone()

    def forward(self, x: Tensor, h: Tensor) -> tuple[dict[str, Tensor], Tensor, None]:
        drive = torch.einsum("ndi,bi->bnd", self.input, x) + torch.einsum("nm,bmd->bnd", self.between, h)
        gate = torch.sigmoid(h @ self.gate.T + 0.5)
        h_next = h + gate * (torch.tanh(drive @ self.candidate.T) - h)
        return {"slots": h_next * h, "gate": gate.sum(1)}, h_next, None


class Stacked(nn.Module):
    """Two tanh layers in one state (B, 2, H), the second fed by the first; y a tuple; one weight tied to both."""

    def __init__(self, d_in: int, size: int, g: torch.Generator) -> None:
        super().__init__()
        self.size = size
        self.lower, self.upper = nn.Linear(size, size, dtype=F64), nn.Linear(size, size, dtype=F64)
        for linear in (self.lower, self.upper):
            linear.weight, linear.bias = draw_parameter(g, size, size), draw_parameter(g, size)
        self.upper.bias = self.lower.bias
        self.input, self.feed = draw_parameter(g, size, d_in), draw_parameter(g, size, size)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2, self.size, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        lower = torch.tanh(self.lower(h[:, 0]) + x @ self.input.T)
        upper = torch.tanh(self.upper(h[:, 1]) + lower @ self.feed.T)
        return (upper, lower * h[:, 1]), torch.stack([lower, upper], 1)


class RoutedOutput(NamedTuple):
    y: Tensor
    logits: Tensor


class Routed(nn.Module):
    """One expert of three writes one unit of the state, both taken by largest value: piecewise constant selections."""

    def __init__(self, d_in: int, size: int, g: torch.Generator) -> None:
        super().__init__()
        self.size = size
        self.router, self.experts = draw_parameter(g, 3, d_in + size), draw_parameter(g, 3, size, d_in + size)
        self.score = draw_parameter(g, size, d_in + size)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, self.size), 0.3, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[RoutedOutput, Tensor]:
        xh = torch.cat([x, h], 1)
        logits, score = xh @ self.router.T, xh @ self.score.T
        chosen = logits.real.argmax(1)
        weight = torch.sigmoid(logits.gather(1, chosen[:, None]))
        proposal = torch.tanh(weight * torch.einsum("bij,bj->bi", self.experts[chosen], xh))
        written = torch.nn.functional.one_hot(score.real.argmax(1), self.size).bool()
        h_next = torch.where(written, torch.sigmoid(score) * proposal, h)
        return RoutedOutput(h_next * proposal, logits), h_next


CELLS: dict[str, Callable[[int, int, torch.Generator], nn.Module]] = {
    "tanh": Tanh,
    "slots": Slots,
    "stacked": Stacked,
    "routed": Routed,
}


def leaves(y: Any) -> list[Tensor]:
    if isinstance(y, Tensor):
        return [y]
    return [leaf for part in (y.values() if isinstance(y, dict) else y) for leaf in leaves(part)]


@dataclass
class Case:
    """A cell, its inputs, and a loss that couples the samples of the batch, at the steps where there is one."""

    cell: nn.Module
    xs: Tensor
    loss_at: list[bool]
    h0: Tensor | None
    resets: Tensor | None
    offsets: list[dict[str, Tensor]] | None

    def loss_fn(self, t: int, y: Any) -> Tensor | None:
        if not self.loss_at[t]:
            return None
        total = torch.zeros((), dtype=F64)
        for k, leaf in enumerate(leaves(y)):
            target = torch.sin(torch.arange(leaf.numel(), dtype=F64) + t + k).reshape(leaf.shape)
            total = total + ((leaf - target) ** 2).mean() + leaf.mean(0).pow(3).sum()
        return total

    @property
    def schedule(self) -> dict[str, Any]:
        return {"resets": self.resets, "offsets": self.offsets}


def make_case(
    kind: str, steps: int = 4, batch: int = 2, size: int = 3, seed: int = 0, losses: str = "all", start: bool = False,
    resets: bool = False, offsets: bool = False,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    cell = CELLS[kind](2, size, g)
    fresh: Tensor = cell.init_state(batch)  # type: ignore[operator]
    some = (torch.rand(steps, generator=g) < 0.5).tolist()
    loss_at = {
        "all": [True] * steps,
        "none": [False] * steps,
        "some": some,
        "first": [t == 0 for t in range(steps)],
        "last": [t == steps - 1 for t in range(steps)],
    }[losses]
    moved = [
        {n: 0.1 * torch.randn(p.shape, generator=g, dtype=F64) for n, p in cell.named_parameters() if p.requires_grad}
        for _ in range(steps)
    ]
    for t in range(1, steps, 2):  # a name that is missing is a parameter that did not move
        moved[t].pop(next(iter(moved[t])))
    return Case(
        cell=cell,
        xs=torch.randn(steps, batch, 2, generator=g, dtype=F64),
        loss_at=loss_at,
        h0=torch.randn(fresh.shape, generator=g, dtype=F64) if start else None,
        resets=torch.rand(steps, batch, generator=g) < 0.35 if resets else None,
        offsets=moved if offsets else None,
    )


def cases(kinds: list[str] | None = None, losses: tuple[str, ...] = ("all", "none", "some", "first", "last")) -> Any:
    return st.builds(
        make_case,
        kind=st.sampled_from(kinds or list(CELLS)),
        steps=st.integers(1, 5),
        batch=st.integers(1, 3),
        size=st.integers(2, 4),
        seed=st.integers(0, 2**20),
        losses=st.sampled_from(losses),
        start=st.booleans(),
        resets=st.booleans(),
        offsets=st.booleans(),
    )


def assert_same(got: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float, zero: bool = False) -> None:
    """Each entry within `tolerance` of its parameter's largest entry; the reference finite, and zero only if `zero`."""
    assert list(got) == list(reference)
    for name, b in reference.items():
        a = got[name]
        assert a.shape == b.shape and a.dtype == b.dtype and not a.requires_grad, name
        assert bool(b.isfinite().all()), name
        worst, scale = (a - b).abs().max().item(), b.abs().max().item()
        assert worst <= tolerance * scale, f"{name}: {worst:.3g} against a scale of {scale:.3g}"
    assert any(bool(b.any()) for b in reference.values()) is not zero
