"""Learners really run, beside what is planned for them: multiply-adds, bytes held and bytes alive at once."""

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
from rtrl.costs.others import bptt, dense_rtrl, tbptt
from rtrl.costs.profile import Profile
from rtrl.costs.result import Choice
from rtrl.learners import BPTT, TBPTT, DenseRTRL
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter

Make = Callable[[nn.Module, int], Any]

COUNTS, BYTES = 0.05, 0.1
"""How far a prediction may be from a real run, as a part of it."""


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
    "independent slots": lambda: mixture(n_experts=10, topk=1, independent_slots=True),
    "rows and slices in x": lambda: seeded(ScheduledCell(3, 3, 2, 3), 2),
}
BIG: dict[str, Callable[[], nn.Module]] = {  # what is alive at once is worth planning from some kilobytes on
    "RNN": lambda: torch_cell(nn.RNNCell, 32),
    "GRU": lambda: torch_cell(nn.GRUCell, 24),
    "LSTM": lambda: torch_cell(nn.LSTMCell, 16),
    "layers": lambda: seeded(rtrl.cells.from_torch(nn.LSTM(3, 10, num_layers=2)), 0),
    "no analytic step": lambda: seeded(PlainRNN(3, 24), 0),
    "mixture": lambda: mixture(d_model=8),
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


def held(make: Make, cell: nn.Module, xs: Tensor) -> dict[str, int]:
    """What a run with a loss at every step and one ``sync`` holds between two steps, when that is most."""
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


@dataclass(frozen=True)
class Real:
    """What a run took: multiply-adds, bytes held between two steps when that was most, and bytes alive at once."""

    macs: int
    held: dict[str, int]
    peak: int


def really(make: Make, cell: nn.Module, xs: Tensor) -> Real:
    with MacCounter() as counter, LiveBytes() as alive:
        parts = held(make, cell, xs)
    return Real(counter.macs, parts, alive.peak)


@dataclass(frozen=True)
class Way:
    """One way to learn: the learner, and what is planned for it."""

    name: str
    make: Make
    planned: Callable[[Profile, int], Choice]


def block(m: int, window: int = 4, lazy: bool = True) -> Way:
    """The search for structure is not planned for: a real learner takes what was found."""
    known: dict[str, Any] = {}

    def make(cell: nn.Module, size: int) -> Any:
        return rtrl.BlockRTRL(cell, size, block=m, window=window, lazy=lazy, audit="off", **known)

    def planned(found: Profile, steps: int) -> Choice:
        known["structure"] = found.structure_option
        return block_rtrl(found, steps, m, window, lazy)

    return Way(f"block {m}, window {window}{'' if lazy else ', eager'}", make, planned)


def truncated(k: int, sliding: bool) -> Way:
    return Way(
        f"TBPTT({k}){'' if sliding else ' in chunks'}",
        lambda cell, size: TBPTT(cell, size, k, sliding=sliding),
        lambda found, steps: tbptt(found, steps, k, sliding),
    )


FULL = Way("BPTT", BPTT, bptt)
TEXTBOOK = Way("textbook", DenseRTRL, dense_rtrl)
TRUNCATED = [truncated(1, True), truncated(1, False), truncated(7, False), truncated(7, True)]


def profiled(cell: nn.Module, xs: Tensor) -> Profile:
    """Of all steps; one serves all ways to learn."""
    return Profile(cell, list(xs), xs.shape[1])


def off(choice: Choice, real: Real) -> dict[str, float]:
    """By how much of the real value each prediction is off."""
    pairs = {
        "macs": (choice.macs, real.macs),
        "held": (choice.held_bytes, sum(real.held.values())),
        "peak": (choice.peak_bytes, real.peak),
    }
    return {what: planned / value - 1 for what, (planned, value) in pairs.items()}


def expect(way: Way, cell: nn.Module, xs: Tensor, found: Profile | None = None, peak: float = BYTES) -> None:
    """What is planned is counted, held and alive at once in a real run, within the tolerances."""
    choice = way.planned(found or profiled(cell, xs), len(xs))
    errors = off(choice, really(way.make, cell, xs))
    limits = {"macs": COUNTS, "held": BYTES, "peak": peak}
    assert all(abs(errors[what]) <= limit for what, limit in limits.items()), (way.name, errors, choice)
