"""What ``lazy=True`` saves: its multiply-adds beside those of ``lazy=False``, on the same steps with the same routing.

The routing is prescribed through ``replay``: two experts of a sample are used for eight steps, then the next two, round
and round, so that with E experts each is dormant for ``8·(E/2 − 1)`` steps in between. Counts are exact and the same on
every machine; times are reported beside them. No count is looked at before the gradients of both sides agree with each
other and with backpropagation through time.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from counting import exponent
from measuring import Measurement, curve
from torch import Tensor

from rtrl import BlockRTRL, RecurrentMoE, Sparsity
from rtrl.profiling import MacCounter, alternate, median_ratio
from rtrl.testing import worst_difference

F64 = torch.float64
COMPARED = 8
"""The number of experts for which lazy and eager take the same steps, and are compared with each other."""


@dataclass(frozen=True)
class Setup:
    """One side of a comparison. ``in_use`` is the number of experts of a sample that are used at a step; None for all
    of them."""

    n_experts: int
    lazy: bool
    in_use: int | None = 2
    hold: int = 8  # steps before the next experts take over
    measured: int = 32  # steps counted, after each expert has had its turn
    block: int = 4
    window: int = 64  # blocks: longer than any dormancy, so that nothing is brought up to date because it expires
    batch: int = 2
    d_model: int = 8
    n_slots: int = 4
    expert_hidden: int = 64

    @property
    def before(self) -> int:
        """Steps before the counted ones: a block with all experts, so that all have an influence, and one round, which
        eager needs only to be compared with lazy: its blocks cost the same from the first one on."""
        round_too = self.in_use and (self.lazy or self.n_experts == COMPARED)
        return self.block + (self.n_experts // 2 * self.hold if round_too else 0)

    def cell(self) -> RecurrentMoE:
        return RecurrentMoE(
            2, 1, self.d_model, self.n_slots, self.n_experts, 2, n_heads=1, read_slots=2, write_slots=1,
            expert_hidden=self.expert_hidden, ffn_hidden=4, generator=torch.Generator().manual_seed(0), dtype=F64,
        )  # fmt: skip

    def x(self, t: int) -> Tensor:
        return torch.randn(self.batch, 2, generator=torch.Generator().manual_seed(t), dtype=F64)

    def choices(self, cell: RecurrentMoE, t: int) -> Sparsity:
        """Reads two slots and writes the first of them, in turn; the samples use different slots and experts."""
        sample = torch.arange(self.batch).unsqueeze(1)
        reads = (t + sample + torch.arange(2)) % self.n_slots
        in_use = self.in_use if self.in_use and t >= self.block else self.n_experts
        turn = t // self.hold + sample
        experts = (in_use * turn + torch.arange(in_use)) % self.n_experts
        return cell.choices(reads, reads[:, :1], experts)


class Run:
    """A learner that has taken its steps, with the cost of the last ``measured`` of them, ``sync`` included."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.cell = setup, setup.cell()
        self.learner = BlockRTRL(self.cell, setup.batch, block=setup.block, window=setup.window, lazy=setup.lazy)
        self.taken = 0
        self.advance(setup.before)
        self.learner.sync(dormant=False)
        with MacCounter() as self.counter:
            self.advance(setup.measured)
            self.learner.sync()
        self.gradients = {name: p.grad.clone() for name, p in self.cell.named_parameters() if p.grad is not None}

    def advance(self, steps: int) -> int:
        for _ in range(steps):
            y = self.learner.step(self.setup.x(self.taken), replay=self.setup.choices(self.cell, self.taken))
            self.learner.backward(y.square().sum())
            self.taken += 1
        return steps

    @property
    def macs(self) -> float:
        """Multiply-adds a step."""
        return self.counter.macs / self.setup.measured


def unrolled(setup: Setup) -> dict[str, Tensor]:
    """Backpropagation through time over the same steps."""
    cell = setup.cell()
    h, total = cell.init_state(setup.batch), torch.zeros((), dtype=F64)
    for t in range(setup.before + setup.measured):
        y, h, _ = cell(setup.x(t), h, setup.choices(cell, t))
        total = total + y.square().sum()
    return dict(zip(dict(cell.named_parameters()), torch.autograd.grad(total, list(cell.parameters())), strict=True))


@cache
def compare(n_experts: int, in_use: int | None = 2) -> tuple[Run, Run]:
    """Lazy and eager, their gradients compared before anyone sees their counts."""
    lazy, eager = (Run(Setup(n_experts, lazy, in_use)) for lazy in (True, False))
    pairs = [(lazy, unrolled(lazy.setup)), (eager, unrolled(eager.setup))]
    if lazy.setup.before == eager.setup.before:
        pairs.append((lazy, eager.gradients))
    for actual, reference in pairs:
        assert worst_difference(actual.gradients, reference, group="tensor", nonzero="each").error <= 1e-10
    return lazy, eager


@pytest.mark.parametrize("sizes", [(8, 16, 32), pytest.param((8, 16, 32, 64), marks=pytest.mark.nightly)])
def test_lazy_saves_multiply_adds(sizes: tuple[int, ...], measurement: Measurement, benchmark: Any) -> None:
    """Eager moves all 32 experts of a sample at every block. Lazy moves two by one transition at every other block, and
    in between the two that are used again, by one or a few products over the 30 blocks of their dormancy. With what
    both spend alike, the dense parameters (as much as 0.8 experts), the immediate influence and the linearisation, a
    ratio of 7.7 is left. Counts do not scatter; the bar leaves room for versions of PyTorch that compute the same
    otherwise. The control has no dormant expert.

    The cost of a lazy step does not grow with the dormant experts: it composes a longer dormancy, while eager is linear
    in the experts above the dense parameters. The exponents are 0.04 and 0.88. Linear lazy work would reach 0.9, too:
    the dense parameters weigh as much in both. What is linear in lazy work is the sync at the end, one row vector for
    each dormant expert.
    """
    runs = {size: compare(size) for size in sizes}
    lazy, eager = runs[32]
    lazy_control, eager_control = compare(8, None)
    assert lazy.counter.elementwise <= eager.counter.elementwise  # nothing has been moved to where it is not counted
    assert eager_control.macs / lazy_control.macs == pytest.approx(1.0, rel=0.01)
    lazy_macs, eager_macs = ([pair[side].macs for pair in runs.values()] for side in (0, 1))
    assert eager_macs[-1] - eager_macs[-2] == pytest.approx(2 * (eager_macs[-2] - eager_macs[-3]), rel=0.05)
    assert lazy_macs[-1] - lazy_macs[-2] < 0.01 * (eager_macs[-1] - eager_macs[-2])
    facts: dict[str, float] = {"multiply-adds per step, lazy": lazy.macs, "multiply-adds per step, eager": eager.macs}
    if measurement.clock:  # both go on from here, without a counter
        hold = lazy.setup.hold
        times = alternate({"lazy": lambda: lazy.advance(hold), "eager": lambda: eager.advance(hold)}, 3)
        facts["times faster, by the clock"] = median_ratio(times["eager"], times["lazy"])
    benchmark.pedantic(lazy_control.advance, args=(1,), rounds=1)
    measurement.settle(
        {
            "lazy.fewer": eager.macs / lazy.macs,
            "lazy.control": eager_control.macs / lazy_control.macs,
            "lazy.growth": exponent(list(sizes), lazy_macs),
            "lazy.growth.control": exponent(list(sizes), eager_macs),
        },
        curve(
            "Mixture, 2 experts per step", "experts", sizes, "multiply-adds per step",
            {"lazy=True": lazy_macs, "lazy=False": eager_macs},
        ),
        **facts,
    )  # fmt: skip
