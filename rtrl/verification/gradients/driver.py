"""Run a learner over a stream, and note its gradients, its influences and which experts were dormant. Nothing is judged
here."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.cells.moe import RecurrentMoE
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.testing.driver import Driver
from rtrl.verification.harness.routing_watch import WatchRouting


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a stream: inputs (T, B, d) and target bytes (T, B)."""

    inputs: Tensor
    targets: Tensor

    def loss(self, t: int, y: Tensor) -> Tensor:
        """Return the cross-entropy of step t, the mean over samples."""
        return F.cross_entropy(y, self.targets[t])

    def first(self, steps: int) -> "Segment":
        """Return the first steps."""
        return Segment(self.inputs[:steps], self.targets[:steps])

    def __len__(self) -> int:
        return self.inputs.shape[0]


@dataclass(frozen=True, slots=True)
class Interventions:
    """What happens in mid-stream.

    Attributes:
        optimizer: "SGD" or "Adam" changes the parameters after every ``every`` steps; None leaves them.
        every: steps between two updates.
        rate: the learning rate.
        dormant: the argument of ``sync`` before an update: whether dormant slices are to be brought up to date.
        resets: Boolean (T, B); before step t these samples are reset. None for never.
    """

    optimizer: str | None = None
    every: int = 20
    rate: float = 0.0
    dormant: bool = True
    resets: Tensor | None = None


@dataclass(slots=True)
class DormancyCount:
    """How experts were dormant, counted per (sample, expert) from the ``Sparsity`` that the cell returned.

    Attributes:
        window: how many blocks the learner remembers.
        reactivated: reactivations after at least one whole dormant block.
        expired: those of them after at least ``window`` whole dormant blocks.
        dormant: (sample, expert) pairs used before that were dormant through at least the last block, at the time of
            the comparison.
        longest: steps of the longest dormancy that ``reactivated`` or ``dormant`` counts.
    """

    window: int
    reactivated: int = 0
    expired: int = 0
    dormant: int = 0
    longest: int = 0
    _last: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, repr=False)

    def used(self, step: int, block: int, experts: Tensor) -> None:
        """Note the experts (B, k) that a step of a block used."""
        for pair in ((b, e) for b, row in enumerate(experts.tolist()) for e in row):
            if pair in self._last:
                last_step, last_block = self._last[pair]
                blocks = block - last_block - 1
                if blocks > 0:
                    self.reactivated += 1
                    self.expired += blocks >= self.window
                    self.longest = max(self.longest, step - last_step - 1)
            self._last[pair] = (step, block)

    def reset(self, samples: Collection[int]) -> None:
        """Forget samples that are reset: their influence is dropped, not caught up."""
        self._last = {pair: last for pair, last in self._last.items() if pair[0] not in samples}

    def so_far(self, step: int, block: int) -> "DormancyCount":
        """Return the counts up to a comparison after this step of this block."""
        lengths = [step - last_step for last_step, last_block in self._last.values() if last_block < block]
        return replace(self, dormant=len(lengths), longest=max([self.longest, *lengths]), _last={})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a learner gives after a number of steps: its whole gradient, its influences at a checkpoint, and who was
    dormant until then."""

    steps: int
    gradient: dict[str, Tensor | None]
    influence: dict[str, Tensor | None]
    dormancy: DormancyCount


@dataclass(frozen=True, slots=True)
class LearnerRecord:
    """One run of a learner: snapshots by number of steps, the last with the whole run; the parameters' offsets at
    every step."""

    snapshots: dict[int, Snapshot]
    offsets: list[dict[str, Tensor]]


def run_learner(
    cell: RecurrentMoE,
    segment: Segment,
    block: int,
    window: int,
    checkpoints: Collection[int] = (),
    interventions: Interventions | None = None,
) -> LearnerRecord:
    """Run a learner over a segment with a loss at every step and the cell's own routing.

    Args:
        cell: where to start from; it is copied, not changed.
        segment: the stream.
        block: its block.
        window: its window.
        checkpoints: numbers of steps after which a copy of the learner, made from its ``state_dict``, returns its
            influences and gradient; the learner itself is not disturbed.
        interventions: what happens in mid-stream.

    Raises:
        RTRLError: the learner raises it.

    Cost: the run; at every checkpoint B·H·P numbers.
    """
    interventions = interventions or Interventions()
    fresh, cell = cell, copy.deepcopy(cell)
    cell.zero_grad()
    start = {name: p.detach().clone() for name, p in cell.named_parameters()}
    offset: dict[str, Tensor] = {}
    offsets: list[dict[str, Tensor]] = []
    total: dict[str, Tensor | None] = dict.fromkeys(start)
    optimizer = _optimizer(cell, interventions)

    def make(cell: nn.Module, batch_size: int) -> BlockRTRL:
        return BlockRTRL(cell, batch_size, block=block, window=window)

    driver = Driver(make, cell, segment.inputs.shape[1])
    dormancy, snapshots = DormancyCount(window), {}
    blocks = open_steps = 0
    for t in range(len(segment)):
        if open_steps == block:
            blocks, open_steps = blocks + 1, 0
        if interventions.resets is not None and bool(interventions.resets[t].any()):
            driver.reset(interventions.resets[t])
            dormancy.reset(interventions.resets[t].nonzero().flatten().tolist())
            blocks, open_steps = blocks + bool(open_steps), 0
        with WatchRouting(cell) as watch:
            driver.step(segment.inputs[t], lambda y, t=t: segment.loss(t, y))  # type: ignore[misc]
        offsets.append(offset)
        open_steps += 1
        assert watch.used is not None
        dormancy.used(t, blocks, watch.used.active["expert_up"])
        if t + 1 in checkpoints:
            twin = driver.fork(fresh)
            influences: dict[str, Tensor | None] = {**twin.influences()}
            twin.sync()
            snapshots[t + 1] = Snapshot(t + 1, _added(total, twin.cell), influences, dormancy.so_far(t, blocks))
        if optimizer is not None and (t + 1) % interventions.every == 0 and t + 1 < len(segment):
            driver.sync(dormant=interventions.dormant)
            total = _added(total, cell)
            optimizer.step()
            optimizer.zero_grad()
            offset = {name: p.detach() - start[name] for name, p in cell.named_parameters()}
            with torch.no_grad():  # bit for bit what the references compute, so that no rounding starts another path
                for name, p in cell.named_parameters():
                    p.copy_(start[name] + offset[name])
            blocks, open_steps = blocks + 1, 0
    if len(segment) not in snapshots:
        driver.sync()
        end = dormancy.so_far(len(segment) - 1, blocks)
        snapshots[len(segment)] = Snapshot(len(segment), _added(total, cell), {}, end)
    return LearnerRecord(snapshots, offsets)


def _optimizer(cell: nn.Module, interventions: Interventions) -> torch.optim.Optimizer | None:
    if interventions.optimizer is None:
        return None
    kind = torch.optim.SGD if interventions.optimizer == "SGD" else torch.optim.Adam
    return kind(cell.parameters(), lr=interventions.rate)


def _added(total: Mapping[str, Tensor | None], cell: nn.Module) -> dict[str, Tensor | None]:
    """Return the total with every ``.grad`` added; a parameter that never received one stays None."""
    added = dict(total)
    for name, p in cell.named_parameters():
        if p.grad is not None:
            before = total[name]
            added[name] = p.grad.detach().clone() if before is None else before + p.grad
    return added
