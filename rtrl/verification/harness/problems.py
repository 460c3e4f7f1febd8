"""The mixtures, streams and learners that the claims share."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import oracles
from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.errors import ConfigError
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.verification.harness.compare import Comparison, compare_gradients

SLICED = ("router.weight", "expert_up", "expert_up_bias", "expert_down", "expert_down_bias", "slot_embedding")
"""The parameters of ``RecurrentMoE`` whose influence is kept slice by slice."""
INERT = ("out_query.weight", "out_key.weight", "out_value.weight", "out_mix.weight", "head.weight", "head.bias")
"""The parameters of the readout, which no later state depends on."""

EXACT = 1e-10
"""The largest relative error of a gradient in float64."""
ROUGH = 1e-3
"""The largest error in float32, relative to a parameter's largest entry: it shows that the right thing was counted."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A configuration of ``RecurrentMoE``: top-2, two heads, two slots read and written per step."""

    name: str
    d_in: int
    d_out: int
    d_model: int
    n_slots: int
    n_experts: int

    def cell(self, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> RecurrentMoE:
        """Return the cell, its weights drawn from the seed."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.d_in, self.d_out, self.d_model, self.n_slots, self.n_experts, 2)
        return RecurrentMoE(*sizes, generator=generator, dtype=dtype).to(device)

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
    """A cell, a stream of normal numbers for one sample, and a squared error at every step. The stream repeats."""

    cell: RecurrentMoE
    xs: Tensor
    targets: Tensor

    def loss(self, t: int, y: Any) -> Tensor:
        """Return the squared error of step t."""
        error: Tensor = y - self.targets[t % len(self.targets)]
        return error.square().sum()

    @property
    def parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.cell.parameters())

    def first(self, steps: int) -> "Problem":
        """Return the problem with only the first steps of the stream."""
        return Problem(self.cell, self.xs[:steps], self.targets[:steps])


def problem(
    mixture: Mixture, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Problem:
    """Return a mixture with a stream of that length."""
    draw = torch.Generator().manual_seed(seed + 1)
    xs, targets = (
        torch.randn(steps, 1, width, generator=draw, dtype=torch.float64).to(device, dtype)
        for width in (mixture.d_in, mixture.d_out)
    )
    return Problem(mixture.cell(seed, dtype, device), xs, targets)


def byte_model(
    seed: int,
    device: torch.device | str = "cpu",
    *,
    d_model: int = 8,
    hidden: int = 8,
    router_output: bool = False,
) -> RecurrentMoE:
    """Return a small mixture of experts that reads and predicts bytes, in float64.

    Args:
        seed: of the weights.
        device: of the parameters.
        d_model: the width of a slot.
        hidden: hidden widths of experts and of the feed-forward layer.
        router_output: whether the outputs tell the router's logits, for a balancing loss.
    """
    return RecurrentMoE(
        256, 256, d_model=d_model, n_slots=4, n_experts=8, topk=2, read_slots=2, write_slots=1,
        expert_hidden=hidden, ffn_hidden=hidden,
        router_output=router_output, generator=torch.Generator().manual_seed(seed), dtype=torch.float64,
    ).to(device)  # fmt: skip


def usable_device(name: str) -> torch.device:
    """Return the device, after trying it out.

    Raises:
        ConfigError: it is not there, or has no float64.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used in float64: {str(error).splitlines()[0]}") from error
    return device


class HideSparsity(nn.Module):
    """A mixture that declares only part of what it touches; what it does not declare counts as touched.

    It takes no replay: it chooses by itself whenever it runs, or, with ``recorded``, as x says: x = [features | two
    reads | two writes | two experts], as ``record_routing`` makes it.
    """

    def __init__(
        self, cell: RecurrentMoE, reads: bool = True, writes: bool = True, experts: bool = True, recorded: bool = False
    ) -> None:
        super().__init__()
        self.cell, self._declared, self._recorded = cell, (reads, writes, experts), recorded

    def init_state(self, batch_size: int) -> Tensor:
        """Return the first state of the mixture."""
        return self.cell.init_state(batch_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Sparsity]:
        """Take a step of the mixture."""
        replay = None
        if self._recorded:
            x, *chosen = x.split([x.shape[-1] - 6, 2, 2, 2], dim=-1)
            replay = self.cell.choices(*(index.long() for index in chosen))
        y, h_next, used = self.cell(x, h, replay)
        reads, writes, experts = self._declared
        active = {f"cell.{name}": index for name, index in used.active.items()} if experts else {}
        return y, h_next, Sparsity(used.reads if reads else None, used.writes if writes else None, active)


def routing(problem: Problem) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what the mixture chooses by itself at every step: reads, writes and experts."""
    h, chosen = problem.cell.init_state(1), []
    with torch.no_grad():
        for x in problem.xs:
            _, h, used = problem.cell(x, h)
            chosen.append((used.reads, used.writes, used.active["expert_up"]))
    return chosen


def record_routing(problem: Problem) -> Problem:
    """Return the problem with the mixture's own choices written into x, for ``HideSparsity(..., recorded=True)``."""
    rows = [torch.cat([x, *chosen], dim=-1) for x, chosen in zip(problem.xs, routing(problem), strict=True)]
    return Problem(problem.cell, torch.stack(rows), problem.targets)


DECLARE_NOTHING = {"reads": False, "writes": False, "experts": False}
"""What ``LearnerRun`` declares for full updates: every row read and written, every slice active."""


class LearnerRun:
    """``BlockRTRL`` on a problem, with a loss at every step.

    Args:
        problem: the problem; its cell is copied.
        declared: which of reads, writes and experts the cell declares; None for the cell as it is.
        replays: the choices of every step; None for the cell's own.
        options: options of the learner.
    """

    def __init__(
        self, problem: Problem, declared: Mapping[str, bool] | None = None, *,
        replays: Sequence[Sparsity] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.problem, self.t, self._replays = problem, 0, replays
        self.cell = copy.deepcopy(problem.cell)
        self.cell.zero_grad()
        cell = self.cell if declared is None else HideSparsity(self.cell, **declared)
        options = {"audit": "off", **options}  # the learner alone is counted and timed, not its audits
        self.learner = BlockRTRL(cell, problem.xs.shape[1], **{"structure": "off", **options})

    def advance(self, steps: int) -> int:
        """Take steps; their gradients wait for ``sync``."""
        for _ in range(steps):
            replay = None if self._replays is None else self._replays[self.t]
            y = self.learner.step(self.problem.xs[self.t % len(self.problem.xs)], replay=replay)
            self.learner.backward(self.problem.loss(self.t, y))
            self.t += 1
        return steps

    def sync(self) -> None:
        """Close the open block and deliver all gradients."""
        self.learner.sync()

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients delivered so far."""
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.cell.named_parameters()}

    def held_bytes(self) -> int:
        """Return the bytes that the learner holds between two steps."""
        return sum(self.learner.retained_bytes().values())


def bptt_gradients(problem: Problem) -> dict[str, Tensor]:
    """Return the gradients over the whole stream by the oracle's backpropagation through time."""
    return oracles.bptt(problem.cell, problem.xs, problem.loss)


def check_gradients(
    found: Mapping[str, Tensor | None], reference: Mapping[str, Tensor], what: str, tolerance: float = EXACT
) -> tuple[Comparison, list[str]]:
    """Compare gradients; also return the failure, if there is one, which voids what was counted of the run.

    A tolerance above ``EXACT`` is for float32, where a slice with small gradients is not judged by its own scale.
    """
    compared = compare_gradients(found, reference, SLICED if tolerance <= EXACT else (), tolerance)
    if compared.passed:
        return compared, []
    why = compared.problem or f"{compared.where} is off by {compared.error:.1e}, more than {tolerance:.0e}"
    return compared, [f"{what}: {why}"]
