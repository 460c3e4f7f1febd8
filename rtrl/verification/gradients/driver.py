"""Drive a learner over a stream and note what it gives and which experts slept; nothing is judged here."""

import copy
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.learners.block_rtrl import BlockRTRL


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a stream: inputs (T, B, d) and target bytes (T, B)."""

    inputs: Tensor
    targets: Tensor

    def loss(self, t: int, y: Tensor) -> Tensor:
        """Cross-entropy of step t, the mean over samples."""
        return F.cross_entropy(y, self.targets[t])

    def first(self, steps: int) -> "Stretch":
        """The first so many steps."""
        return Stretch(self.inputs[:steps], self.targets[:steps])

    def __len__(self) -> int:
        return self.inputs.shape[0]


@dataclass(frozen=True, slots=True)
class Interventions:
    """What happens in mid-stream.

    Attributes:
        optimizer: "SGD" or "Adam" changes the parameters after every ``every`` steps; None leaves them.
        every: steps between two updates. rate: the learning rate.
        dormant: what ``sync`` is told before an update: whether sleeping slices are to be paid.
        resets: Boolean (T, B); before step t these samples start anew. None for never.
    """

    optimizer: str | None = None
    every: int = 20
    rate: float = 0.0
    dormant: bool = True
    resets: Tensor | None = None


@dataclass(slots=True)
class Sleep:
    """How experts slept, counted per (sample, expert) from the ``Sparsity`` that the cell returned.

    Attributes:
        window: how many blocks the learner under watch remembers.
        woken: wake-ups after at least one whole block asleep. expired: those of them after at least ``window`` whole
            blocks.
        asleep: (sample, expert) pairs used before that slept through at least the last block, at the moment of the
            comparison.
        longest: steps of the longest sleep that ``woken`` or ``asleep`` counts.
    """

    window: int
    woken: int = 0
    expired: int = 0
    asleep: int = 0
    longest: int = 0
    _last: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, repr=False)

    def used(self, step: int, block: int, experts: Tensor) -> None:
        """Note the experts (B, k) that a step of a block used."""
        for pair in ((b, e) for b, row in enumerate(experts.tolist()) for e in row):
            if pair in self._last:
                then, then_block = self._last[pair]
                slept = block - then_block - 1
                if slept > 0:
                    self.woken += 1
                    self.expired += slept >= self.window
                    self.longest = max(self.longest, step - then - 1)
            self._last[pair] = (step, block)

    def restarted(self, samples: Collection[int]) -> None:
        """Forget the samples that start anew: their influence is dropped, not caught up."""
        self._last = {pair: last for pair, last in self._last.items() if pair[0] not in samples}

    def so_far(self, step: int, block: int) -> "Sleep":
        """The counts up to a comparison after this step of this block."""
        sleeping = [step - then for then, then_block in self._last.values() if then_block < block]
        return replace(self, asleep=len(sleeping), longest=max([self.longest, *sleeping]), _last={})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a learner gives after so many steps: its whole gradient, the influence if it was asked for, and who slept
    until then."""

    steps: int
    gradient: dict[str, Tensor | None]
    influence: dict[str, Tensor | None]
    sleep: Sleep


@dataclass(frozen=True, slots=True)
class Drive:
    """One run of a learner: snapshots by number of steps, the last with the whole run; the parameters' offsets at
    every step."""

    snapshots: dict[int, Snapshot]
    offsets: list[dict[str, Tensor]]


def drive(
    cell: RecurrentMoE,
    stretch: Stretch,
    learner_type: type[BlockRTRL],
    block: int,
    window: int,
    moments: Collection[int] = (),
    interventions: Interventions | None = None,
) -> Drive:
    """Run a learner over a stretch with a loss at every step and natural routing.

    Args:
        cell: where to start from; it is copied, not changed.
        learner_type: the learner. block, window: as it takes them.
        moments: numbers of steps after which a copy of the learner, made from its ``state_dict``, is asked for its
            influences and gradient; the learner itself is not disturbed and its sleepers sleep on.
        interventions: what happens in mid-stream.

    Raises:
        RTRLError: whatever the learner raises.

    Cost: the run; at every moment B·H·P numbers.
    """
    plan = Interventions() if interventions is None else interventions
    mine = copy.deepcopy(cell)
    mine.zero_grad()
    start = {name: p.detach().clone() for name, p in mine.named_parameters()}
    offset: dict[str, Tensor] = {}
    offsets: list[dict[str, Tensor]] = []
    total: dict[str, Tensor | None] = dict.fromkeys(start)
    optimizer = _optimizer(mine, plan)
    learner = learner_type(mine, stretch.inputs.shape[1], block=block, window=window)
    sleep, snapshots = Sleep(window), {}
    blocks = open_steps = 0
    for t in range(len(stretch)):
        if open_steps == block:
            blocks, open_steps = blocks + 1, 0
        if plan.resets is not None and bool(plan.resets[t].any()):
            learner.reset(plan.resets[t])
            sleep.restarted(plan.resets[t].nonzero().flatten().tolist())
            blocks, open_steps = blocks + bool(open_steps), 0
        with _Watch(mine) as watch:
            y = learner.step(stretch.inputs[t])
        learner.backward(stretch.loss(t, y))
        offsets.append(offset)
        open_steps += 1
        sleep.used(t, blocks, watch.experts)
        if t + 1 in moments:
            snapshots[t + 1] = _ask(learner, cell, mine, total, sleep.so_far(t, blocks))
        if optimizer is not None and (t + 1) % plan.every == 0 and t + 1 < len(stretch):
            learner.sync(dormant=plan.dormant)
            _collect(total, mine)
            optimizer.step()
            optimizer.zero_grad()
            offset = {name: p.detach() - start[name] for name, p in mine.named_parameters()}
            with torch.no_grad():  # bit for bit what the references compute, so that no rounding starts another path
                for name, p in mine.named_parameters():
                    p.copy_(start[name] + offset[name])
            blocks, open_steps = blocks + 1, 0
    if len(stretch) not in snapshots:
        learner.sync()
        _collect(total, mine)
        snapshots[len(stretch)] = Snapshot(len(stretch), total, {}, sleep.so_far(len(stretch) - 1, blocks))
    return Drive(snapshots, offsets)


class _Watch:
    """Keeps the experts that the cell chooses by itself; the learner's replays are not looked at."""

    def __init__(self, cell: nn.Module) -> None:
        self._cell = cell
        self.experts = torch.empty(0, 0, dtype=torch.int64)

    def __enter__(self) -> "_Watch":
        self._handle = self._cell.register_forward_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: tuple[Any, Tensor, Sparsity]) -> None:
        if kwargs.get("replay") is None:
            self.experts = out[2].active["expert_up"]


def _optimizer(cell: nn.Module, plan: Interventions) -> torch.optim.Optimizer | None:
    if plan.optimizer is None:
        return None
    kinds: dict[str, type[torch.optim.SGD] | type[torch.optim.Adam]] = {
        "SGD": torch.optim.SGD,
        "Adam": torch.optim.Adam,
    }
    return kinds[plan.optimizer](cell.parameters(), lr=plan.rate)


def _collect(total: dict[str, Tensor | None], cell: nn.Module) -> None:
    """Add every ``.grad`` to a total; a parameter that was never given one stays None."""
    for name, p in cell.named_parameters():
        if p.grad is not None:
            before = total[name]
            total[name] = p.grad.detach().clone() if before is None else before + p.grad


def _ask(
    learner: BlockRTRL, fresh: RecurrentMoE, cell: RecurrentMoE, delivered: dict[str, Tensor | None], sleep: Sleep
) -> Snapshot:
    """Influences and the gradient up to now, from a copy of the learner with a copy of its cell."""
    twin = copy.deepcopy(fresh)
    twin.load_state_dict(cell.state_dict())
    twin.zero_grad()
    double = type(learner)(twin, learner.batch_size, block=learner.block, window=learner.window)
    double.load_state_dict(learner.state_dict())
    influence: dict[str, Tensor | None] = {name: double.influence(name) for name, _ in twin.named_parameters()}
    double.sync()
    total = dict(delivered)
    _collect(total, twin)
    return Snapshot(learner.steps_taken, total, influence, sleep)
