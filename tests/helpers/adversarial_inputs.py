"""Attacks: what "refused, and nothing has changed" means, and the learners and cells that are attacked.

An attack is made on one of two equal learners in mid-stream. It must be refused, leave the learner bit for bit as it
was, and go unnoticed in everything that the two learners compute afterwards.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rtrl
from rtrl import Sparsity
from rtrl.cells import grouped_linear
from rtrl.errors import RTRLError

B, D_IN, STEPS, AT = 2, 3, 8, 4
F64 = torch.float64
NAN, INF = float("nan"), float("inf")
NOT_INTEGERS = [0, -1, True, 2.0, None, "2"]
Step = Callable[..., Any]


def snapshot(learner: rtrl.BlockRTRL) -> list[Any]:
    """Everything a learner holds, with its cell's parameters, buffers and ``.grad``, as a flat list of copies."""
    cell = learner.cell
    held = [
        learner.state_dict(),
        learner.steps_taken,
        list(cell.parameters()),
        [p.grad for p in cell.parameters()],
        list(cell.buffers()),
    ]
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(held)]


def assert_same(one: list[Any], two: list[Any], tolerance: float = 0.0) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert a == b


@contextmanager
def refused(learner: rtrl.BlockRTRL, error: type[RTRLError], match: str) -> Iterator[None]:
    """Exactly this error, with this message, and nothing has changed."""
    before = snapshot(learner)
    with pytest.raises(error, match=match) as caught:
        yield
    assert type(caught.value) is error
    assert_same(before, snapshot(learner))


class Plain(nn.Module):
    """h' = tanh(W x + U h), y = V h' + a frozen bias, scaled by a buffer."""

    def __init__(self, d_in: int = D_IN, n: int = 4) -> None:
        super().__init__()
        self.enter, self.recur, self.head = nn.Linear(d_in, n), nn.Linear(n, n), nn.Linear(n, 2)
        self.head.bias.requires_grad_(False)
        self.register_buffer("scale", torch.ones(()))
        self.double()

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, self.recur.in_features, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.enter(x) + self.recur(h))
        return self.head(h) * self.scale, h


def plain(**arguments: Any) -> rtrl.BlockRTRL:
    torch.manual_seed(0)
    return rtrl.BlockRTRL(Plain(), B, **{"block": 3, **arguments})


def mixture(**arguments: Any) -> rtrl.BlockRTRL:
    cell = rtrl.RecurrentMoE(D_IN, 2, 4, 4, 4, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    return rtrl.BlockRTRL(cell, B, **{"block": 2, "window": 2, **arguments})


def stream() -> list[Tensor]:
    return list(torch.randn(STEPS, B, D_IN, dtype=F64, generator=torch.Generator().manual_seed(1)))


def finish(learner: rtrl.BlockRTRL, xs: list[Tensor]) -> list[Any]:
    """Go on with good input, and return everything there is to compare."""
    for x in xs:
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    return [
        *snapshot(learner),
        *(learner.influence(name) for name, p in learner.cell.named_parameters() if p.requires_grad),
    ]


Attack = Callable[[rtrl.BlockRTRL, list[Tensor], list[Tensor]], Any]


Attack = Callable[[rtrl.BlockRTRL, list[Tensor], list[Tensor]], Any]


@functools.cache
def _unattacked(make: Callable[[], rtrl.BlockRTRL]) -> list[Any]:
    """What the twin that nobody attacks comes to, the same for every attack."""
    twin, xs = make(), stream()
    for x in xs[: AT + 1]:
        twin.backward(twin.step(x).square().sum())
    return finish(twin, xs[AT + 1 :])


def attacked(make: Callable[[], rtrl.BlockRTRL], attack: Attack, error: type[RTRLError], match: str) -> None:
    """Attack one of two twins after ``AT + 1`` good steps, with the y and the losses so far at hand."""
    learner, xs, ys, losses = make(), stream(), [], []
    for x in xs[: AT + 1]:
        ys.append(learner.step(x))
        losses.append(ys[-1].square().sum())
        learner.backward(losses[-1])
    with refused(learner, error, match):
        attack(learner, ys, losses)
    assert_same(finish(learner, xs[AT + 1 :]), _unattacked(make))


# ---------------------------------------------------------------------- a cell that can be broken


def rows(x: Tensor, *index: int) -> Tensor:
    return torch.tensor([index]).expand(x.shape[0], -1)


class Breakable(nn.Module):
    """Reads rows 0 and 1 of a state (B, 3, 2), writes row 0 and uses one of three slices of ``experts``."""

    def __init__(self, bad: Step, *, randomness: bool = False) -> None:
        super().__init__()
        self.bad, self.broken = bad, False
        self.enter, self.recur, self.head, self.other = (
            nn.Linear(D_IN, 2),
            nn.Linear(4, 2),
            nn.Linear(4, 2),
            nn.Linear(2, 2, bias=False),
        )
        self.experts = nn.Parameter(torch.randn(3, 2, 2))
        self.zero = nn.Parameter(torch.zeros(2))
        self.dropout, self.norm = nn.Dropout(), nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros(()))
        self.double()
        nn.init.zeros_(self.other.weight)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.linspace(-1.0, 1.0, 6, dtype=F64).reshape(1, 3, 2).repeat(batch_size, 1, 1)

    def good(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Sparsity]:
        expert = (x[:, :1] > 0).long()
        mixed = grouped_linear(h[:, None, :1], self.experts, None, expert)[:, 0, 0]
        row = torch.tanh(
            self.enter(x) + self.recur(h[:, :2].flatten(1)) + mixed + 0.1 * self.other(h[:, 0]) + self.zero * h[:, 0]
        )
        h = torch.cat([row.unsqueeze(1), h[:, 1:]], dim=1)
        return self.head(h[:, :2].flatten(1)), h, Sparsity(rows(x, 0, 1), rows(x, 0), {"experts": expert})

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.bad(self, x, h) if self.broken else self.good(x, h)


def make(bad: Step = Breakable.good, block: int = 3) -> rtrl.BlockRTRL:
    torch.manual_seed(0)
    return rtrl.BlockRTRL(Breakable(bad), B, block=block)


@functools.cache
def _unbroken(block: int, at: int) -> list[Any]:
    """What the twin that never breaks comes to."""
    twin, xs = make(block=block), stream()
    for x in xs[:at]:
        twin.backward(twin.step(x).square().sum())
    twin.sync()
    return finish(twin, xs[at:])


def check(
    bad: Step, error: type[RTRLError], match: str, *, at: int = AT, block: int = 3, closing: bool = False
) -> None:
    """Break one of two twins from step ``at`` on: that step itself is refused, or (``closing``) the block that it
    opens."""
    learner, xs = make(bad, block), stream()
    for x in xs[:at]:
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    saved = learner.state_dict()
    learner.cell.broken = True
    if closing:
        for x in xs[at : at + min(block, 2)]:
            learner.backward(learner.step(x).square().sum())
        for close in (learner.sync, lambda: learner.influence("enter.weight")):
            with refused(learner, error, match):
                close()
        learner.load_state_dict(saved)
    else:
        with refused(learner, error, match):
            learner.step(xs[at])
    learner.cell.broken = False
    assert_same(finish(learner, xs[at:]), _unbroken(block, at), tolerance=1e-12)
