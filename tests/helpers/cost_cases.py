"""Learners really run, beside what was planned for them: multiply-adds, bytes held and bytes at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rtrl
from helpers.strategies import normal
from helpers.toy_cells import OddCell, PlainRNN, ScheduledCell, seeded
from rtrl._utils import pytrees
from rtrl.costs.block_rtrl import block_rtrl
from rtrl.costs.others import bptt, tbptt
from rtrl.costs.profile import Profile, profile
from rtrl.costs.result import Choice
from rtrl.costs.textbook import dense_rtrl
from rtrl.learners import BPTT, TBPTT, DenseRTRL
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter

Make = Callable[[nn.Module, int], Any]


def mixture(**options: Any) -> nn.Module:
    sizes = {"d_model": 2, "n_slots": 5, "n_experts": 6, "topk": 2, "read_slots": 3, "write_slots": 1} | options
    return seeded(rtrl.RecurrentMoE(3, 2, **sizes), 1)


class Symbols(nn.Module):
    """An embedding under a GRU: slices picked of a parameter that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.cell = nn.Embedding(7, 3), rtrl.cells.from_torch(nn.GRUCell(3, 5), nn.Linear(5, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return self.cell.init_state(batch_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(self.look(x), h)


def torch_cell(kind: type[nn.Module], hidden: int = 5, width: int = 3) -> nn.Module:
    return seeded(rtrl.cells.from_torch(kind(width, hidden), nn.Linear(hidden, 2)), 0)


DENSE: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: torch_cell(nn.RNNCell),
    "GRU": lambda: torch_cell(nn.GRUCell),
    "LSTM": lambda: torch_cell(nn.LSTMCell),
    "layers": lambda: seeded(rtrl.cells.from_torch(nn.LSTM(3, 4, num_layers=2)), 0),
    "no analytic step": lambda: seeded(PlainRNN(3, 6), 0),
    "parameters no tap covers": lambda: seeded(OddCell(3, 4), 0),
    "embedding": lambda: seeded(Symbols(), 0),
    "stack of dense cells": lambda: seeded(rtrl.cells.Stack([PlainRNN(3, 4, 3), PlainRNN(3, 2)]), 0),
}
SPARSE: dict[str, Callable[[], nn.Module]] = {
    "mixture": mixture,
    "mixture with its router": lambda: mixture(router_output=True, topk=1),
    "stack of mixtures": lambda: seeded(
        rtrl.cells.Stack(
            [
                rtrl.RecurrentMoE(3, 4, d_model=2, n_slots=3, n_experts=4, topk=1),
                rtrl.RecurrentMoE(4, 2, d_model=2, n_slots=4, n_experts=3, topk=2),
            ]
        ),
        0,
    ),
    "rows and slices in x": lambda: seeded(ScheduledCell(3, 3, 2, 3), 2),
}


def inputs(cell: nn.Module, steps: int, batch_size: int) -> Tensor:
    """x of every step."""
    if isinstance(cell, Symbols):
        return torch.randint(0, 7, (steps, batch_size), generator=torch.Generator().manual_seed(3))
    if isinstance(cell, ScheduledCell):  # as many rows and slices at every step, others each time
        generator = torch.Generator().manual_seed(3)
        masks = [
            torch.rand(steps, batch_size, count, generator=generator).argsort(dim=2).double().le(1).double()
            for count in (3, 3, 3)
        ]
        return torch.cat([0.5 * normal(3, steps, batch_size, 3).tanh(), *masks], dim=2)
    return normal(3, steps, batch_size, 3)


def loss(y: Any) -> Tensor:
    return torch.stack([leaf.square().sum() for leaf in pytrees.tensors(y) if leaf.is_floating_point()]).sum()


def counted(make: Make, cell: nn.Module, xs: Tensor) -> int:
    """Multiply-adds of a run with a loss at every step and one delivery."""
    with MacCounter() as counter:
        learner = make(cell, xs.shape[1])
        for x in xs:
            learner.backward(loss(learner.step(x)))
        learner.sync()
    return counter.macs


@dataclass(frozen=True)
class Bytes:
    """What a run held between two steps when that was most, by part, and had alive at once."""

    held: dict[str, int]
    peak: int


def held(make: Make, cell: nn.Module, xs: Tensor) -> dict[str, int]:
    """What a run with a loss at every step and one delivery holds between two steps, when that is most."""
    for parameter in cell.parameters():
        parameter.grad = None
    found: list[dict[str, int]] = []
    learner = make(cell, xs.shape[1])
    for x in xs:
        learner.backward(loss(learner.step(x)))
        found.append(learner.retained_bytes())
    learner.sync()
    found.append(learner.retained_bytes())
    return max(found, key=lambda parts: sum(parts.values()))


def watched(make: Make, cell: nn.Module, xs: Tensor) -> Bytes:
    """The same, and the bytes alive at once."""
    with LiveBytes() as alive:
        parts = held(make, cell, xs)
    return Bytes(parts, alive.peak)


@dataclass(frozen=True)
class Way:
    """One way to learn: the learner, and what is planned for it."""

    name: str
    make: Make
    planned: Callable[[Profile, int], Choice]


def block(m: int, window: int = 4, lazy: bool = True) -> Way:
    return Way(
        f"block {m}, window {window}{'' if lazy else ', eager'}",
        lambda cell, size: rtrl.BlockRTRL(cell, size, block=m, window=window, lazy=lazy),
        lambda found, steps: block_rtrl(found, steps, m, window, lazy),
    )


def truncated(k: int, sliding: bool) -> Way:
    return Way(
        f"TBPTT({k}){'' if sliding else ' in chunks'}",
        lambda cell, size: TBPTT(cell, size, k, sliding=sliding),
        lambda found, steps: tbptt(found, steps, k, sliding),
    )


TRUNCATED = [truncated(1, True), truncated(1, False), truncated(4, False), truncated(4, True)]
BASELINES = [Way("BPTT", BPTT, bptt), Way("textbook", DenseRTRL, dense_rtrl), *TRUNCATED]
BLOCKS = [block(1), block(3, 2), block(3, 7, lazy=False), block(7, 64)]


def profiled(cell: nn.Module, xs: Tensor) -> Profile:
    """Of all steps; one serves all ways to learn."""
    return profile(cell, list(xs), xs.shape[1])


def expect_counts(way: Way, cell: nn.Module, xs: Tensor, found: Profile | None = None) -> None:
    """What is planned is counted, to the last multiply-add."""
    choice = way.planned(found or profiled(cell, xs), len(xs))
    assert not choice.estimated
    assert choice.macs == counted(way.make, cell, xs), way.name


def expect_bytes(way: Way, cell: nn.Module, xs: Tensor, found: Profile | None = None, tolerance: float = 0.1) -> None:
    """What is planned is held, to the byte; and is alive at once within 10 %."""
    choice = way.planned(found or profiled(cell, xs), len(xs))
    real = watched(way.make, cell, xs)
    assert dict(choice.held) == real.held, way.name
    assert abs(choice.peak_bytes - real.peak) <= tolerance * real.peak, (way.name, choice.peak_bytes, real.peak)
