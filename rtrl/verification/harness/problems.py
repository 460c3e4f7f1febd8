"""The mixtures, streams and learners that the claims about cost share, and how they are counted and timed."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import oracles
from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.profiling.macs import MacCounter
from rtrl.verification.harness.compare import Comparison, compare_gradients
from rtrl.verification.harness.models import SLICED

EXACT = 1e-10
"""The largest relative error of a gradient in float64."""
ROUGH = 1e-3
"""The same in float32, of a parameter's largest entry: shows that the right thing was counted, and no more."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A configuration of ``RecurrentMoE``: top-2, two heads, two slots read and written a step."""

    name: str
    d_in: int
    d_out: int
    d_model: int
    n_slots: int
    n_experts: int

    def cell(self, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> RecurrentMoE:
        """The cell, its weights drawn from the seed."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.d_in, self.d_out, self.d_model, self.n_slots, self.n_experts, 2)
        cell = RecurrentMoE(*sizes, generator=generator, dtype=dtype)
        return cell.to(device)

    @property
    def hidden(self) -> int:
        """H, entries of the state of a sample."""
        return self.d_model * self.n_slots


QUICK = Mixture("quick", 2, 2, 32, 4, 4)
SPEED = Mixture("speed", 8, 4, 64, 8, 16)
HAYSTACK = Mixture("haystack", 16, 12, 32, 4, 8)
FLOW = Mixture("flow", 8, 4, 64, 16, 64)
CONFIGS = {mixture.name: mixture for mixture in (QUICK, SPEED, HAYSTACK, FLOW)}


@dataclass(frozen=True)
class Problem:
    """A cell, a stream of normal numbers for one sample and a squared error at every step; the stream begins anew when
    it is over."""

    cell: nn.Module
    xs: Tensor
    targets: Tensor

    def loss(self, t: int, y: Any) -> Tensor:
        """The squared error of step t."""
        error: Tensor = y - self.targets[t % len(self.targets)]
        return error.square().sum()

    @property
    def parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.cell.parameters())

    def first(self, steps: int) -> "Problem":
        """The first so many steps of the stream."""
        return Problem(self.cell, self.xs[:steps], self.targets[:steps])


def problem(
    mixture: Mixture, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Problem:
    """A mixture with a stream of that length."""
    draw = torch.Generator().manual_seed(seed + 1)
    xs, targets = (
        torch.randn(steps, 1, width, generator=draw, dtype=torch.float64).to(device, dtype)
        for width in (mixture.d_in, mixture.d_out)
    )
    return Problem(mixture.cell(seed, dtype, device), xs, targets)


class Declares(nn.Module):
    """A mixture that keeps some of what it touches to itself; what it does not name counts as touched.

    It takes no replay: it chooses by itself whenever it runs, or, with ``laid``, as x says: x = [features | two reads |
    two writes | two experts], as ``lay_down`` makes it.
    """

    def __init__(
        self, cell: nn.Module, reads: bool = True, writes: bool = True, experts: bool = True, laid: bool = False
    ) -> None:
        super().__init__()
        self.cell, self._told, self._laid = cell, (reads, writes, experts), laid

    def init_state(self, batch_size: int) -> Tensor:
        """The first state of the mixture."""
        first: Tensor = self.cell.init_state(batch_size)  # type: ignore[operator]
        return first

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Sparsity]:
        """A step of the mixture."""
        if self._laid:
            x, *chosen = x.split([x.shape[-1] - 6, 2, 2, 2], dim=-1)
            laid = self.cell.choices(*(index.long() for index in chosen))  # type: ignore[operator]
            y, h_next, used = self.cell(x, h, replay=laid)
        else:
            y, h_next, used = self.cell(x, h)
        reads, writes, experts = self._told
        active = {f"cell.{name}": index for name, index in used.active.items()} if experts else {}
        return y, h_next, Sparsity(used.reads if reads else None, used.writes if writes else None, active)


def lay_down(problem: Problem) -> Problem:
    """The stream with what the mixture chooses on it written into x, for ``Declares(..., laid=True)``."""
    h, rows = problem.cell.init_state(1), []  # type: ignore[operator]
    with torch.no_grad():
        for x in problem.xs:
            _, h, used = problem.cell(x, h)
            rows.append(torch.cat([x, used.reads, used.writes, used.active["expert_up"]], dim=-1))
    return Problem(problem.cell, torch.stack(rows), problem.targets)


NOTHING = {"reads": False, "writes": False, "experts": False}
"""What ``Run`` is given for full updates: every row read and written, every slice active."""


class Run:
    """``BlockRTRL`` on a problem, with a loss at every step.

    Args:
        declared: which of reads, writes and experts the cell declares; None for the cell as it is.
        options: of the learner.
    """

    def __init__(self, problem: Problem, declared: Mapping[str, bool] | None = None, **options: Any) -> None:
        self.problem, self.t = problem, 0
        self.own = copy.deepcopy(problem.cell)
        self.own.zero_grad()
        told = self.own if declared is None else Declares(self.own, **declared)
        self.learner = BlockRTRL(told, problem.xs.shape[1], **options)

    def advance(self, steps: int) -> int:
        """Take steps; the gradients wait for a delivery."""
        for _ in range(steps):
            y = self.learner.step(self.problem.xs[self.t % len(self.problem.xs)])
            self.learner.backward(self.problem.loss(self.t, y))
            self.t += 1
        return steps

    def deliver(self) -> None:
        """Close the open block and pay everybody, sleepers too."""
        self.learner.sync()

    def gradients(self) -> dict[str, Tensor | None]:
        """What has been delivered so far."""
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.own.named_parameters()}

    def held_bytes(self) -> int:
        """What the learner holds between two steps."""
        return sum(self.learner.retained_bytes().values())


def unrolled(problem: Problem) -> dict[str, Tensor]:
    """The gradient over the whole stream, by the oracle's backpropagation through time."""
    return oracles.bptt(problem.cell, problem.xs, problem.loss)


def agree(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], what: str = "gradient", tolerance: float = EXACT
) -> tuple[Comparison, list[str]]:
    """A comparison of gradients, and, if it does not pass, the failure that voids whatever was counted of the run.

    A tolerance above ``EXACT`` is for float32, where a slice of a small gradient is not judged by its own scale.
    """
    compared = compare_gradients(found, expected, SLICED if tolerance <= EXACT else (), tolerance)
    if compared.passed:
        return compared, []
    why = compared.problem or f"{compared.where} is off by {compared.error:.1e}, more than {tolerance:.0e}"
    return compared, [f"{what}: {why}"]


def count(work: Callable[[], Any]) -> int:
    """The multiply-adds of a call."""
    with MacCounter() as counter:
        work()
    return counter.macs


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of growth: the slope of log(values) over log(sizes), by least squares."""
    xs, ys = (torch.tensor(list(numbers), dtype=torch.float64).log() for numbers in (sizes, values))
    xs, ys = xs - xs.mean(), ys - ys.mean()
    return float((xs * ys).sum() / xs.square().sum())


def line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(a, b) of the least-squares line ``a + b · size``."""
    xs, ys = (torch.tensor(list(numbers), dtype=torch.float64) for numbers in (sizes, values))
    b = float(((xs - xs.mean()) * (ys - ys.mean())).sum() / (xs - xs.mean()).square().sum())
    return float(ys.mean()) - b * float(xs.mean()), b


def times(number: float) -> str:
    """A ratio for people."""
    return f"{number:,.0f} ×" if number >= 100 else f"{number:.3g} ×"
