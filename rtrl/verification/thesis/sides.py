"""The sides of the comparison: the cells, the bytes that each learner holds, and how all of them are trained alike."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rtrl
from rtrl._influence import history
from rtrl._influence.transition import Transition, compose
from rtrl.learners import TBPTT, Learner
from rtrl.verification.harness.measuring import count_macs, percent
from rtrl.verification.thesis.signal import Signal

MakeLearner = Callable[[nn.Module, int], Learner]
"""Makes a learner of a cell for a batch size."""


@dataclass(frozen=True)
class Training:
    """How every side is trained.

    Attributes:
        signal: the task.
        batch_size: B.
        steps: of the stream.
        every: steps between two updates; the block of ``BlockRTRL``.
        window: of ``BlockRTRL``.
        rate: the learning rate of Adam.
        balance: the weight of the loss that balances the experts.
        balance_every: steps between two of these losses.
        points: of a curve.
    """

    signal: Signal = field(default_factory=Signal)
    batch_size: int = 8
    steps: int = 100_000
    every: int = 32
    window: int = 8
    rate: float = 0.01
    balance: float = 0.03
    balance_every: int = 256
    points: int = 20


@dataclass(frozen=True)
class Mixture:
    """The sizes of the mixture."""

    d_model: int = 4
    n_slots: int = 8
    n_experts: int = 32
    expert_hidden: int = 4
    write_slots: int = 1

    @property
    def state(self) -> int:
        """H."""
        return self.d_model * self.n_slots

    def cell(self, signal: Signal, seed: int, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the mixture; its gates begin so that they keep what they hold for up to ``signal.steps`` writes."""
        generator = torch.Generator().manual_seed(seed)
        cell = rtrl.RecurrentMoE(
            signal.d_in,
            signal.values,
            self.d_model,
            self.n_slots,
            self.n_experts,
            topk=1,
            read_slots=self.n_slots,
            write_slots=self.write_slots,
            expert_hidden=self.expert_hidden,
            router_output=True,
            independent_slots=True,
            generator=generator,
            dtype=dtype,
        )
        with torch.no_grad():
            cell.slots.gate_bias.uniform_(1, signal.steps, generator=generator).log_().neg_()
        return cell


def gru(hidden: int, signal: Signal, seed: int) -> nn.Module:
    """Return a GRU whose update gates begin as those of the mixture."""
    torch.manual_seed(seed)
    cell = nn.GRUCell(signal.d_in, hidden)
    with torch.no_grad():
        cell.bias_hh[hidden : 2 * hidden] = 0.0
        cell.bias_ih[hidden : 2 * hidden] = torch.empty(hidden).uniform_(1, signal.steps).log_()
    return rtrl.cells.from_torch(cell, nn.Linear(hidden, signal.values))


def gru_of_equal_cost(macs: float, training: Training) -> int:
    """Return the number of units with which ``BlockRTRL`` takes about ``macs`` multiply-adds per step, and not more: a
    multiple of 4 up to 256."""

    def exact(cell: nn.Module, batch_size: int) -> Learner:
        return rtrl.BlockRTRL(cell, batch_size, block=training.every)

    low, high = 1, 65
    while high - low > 1:
        middle = (low + high) // 2
        small_enough = macs_per_step(gru(4 * middle, training.signal, 0), exact, training, blocks=1) <= macs
        low, high = (middle, high) if small_enough else (low, middle)
    return 4 * low


def held_bytes(learner: Learner, signal: Signal, steps: int) -> int:
    """Return the most bytes that a learner holds during some steps, with losses at the last three."""
    most = 0
    for t, step in zip(range(steps), signal.stream(learner.batch_size, 0), strict=False):
        y = learner.step(step.x)
        if t >= steps - 3:
            learner.backward(_output(y).square().sum())
        most = max(most, sum(learner.retained_bytes().values()))
    return most


def horizon_within(budget: int, cell: nn.Module, training: Training) -> int:
    """Return the longest horizon with which truncated BPTT holds at most ``budget`` bytes between steps."""

    def held(horizon: int) -> int:
        return held_bytes(TBPTT(cell, training.batch_size, horizon), training.signal, horizon + 4)

    per_step = held(5) - held(4)
    horizon = max(1, (budget - held(4)) // per_step + 4)
    while horizon > 1 and held(horizon) > budget:
        horizon -= 1
    return int(horizon)


@dataclass
class Trained:
    """One side.

    Attributes:
        name: of the side.
        parameters: P.
        accuracy: by step, of the answers since the point before.
        loss: by step, their mean loss in nats.
        n_bytes: the most bytes held between steps.
        seconds: CPU time.
        final: the accuracy in the last tenth of the stream; in all of it, if there is no answer there.
    """

    name: str
    parameters: int
    accuracy: dict[int, float]
    loss: dict[int, float]
    n_bytes: int
    seconds: float
    final: float


OnStep = Callable[[int, Any], None]


def train(
    name: str, cell: nn.Module, make: MakeLearner, training: Training, seed: int, progress: Callable[[str], None]
) -> Trained:
    """Train a cell on one stream."""
    return _train(name, cell, make, training, seed, progress, lambda t, y: None)


def _train(
    name: str,
    cell: nn.Module,
    make: MakeLearner,
    training: Training,
    seed: int,
    progress: Callable[[str], None],
    on_step: OnStep,
) -> Trained:
    learner, optimizer = make(cell, training.batch_size), torch.optim.Adam(cell.parameters(), lr=training.rate)
    answers: list[tuple[int, float, float]] = []
    most, started = 0, time.process_time()
    stream = training.signal.stream(training.batch_size, seed)
    for t, step in zip(range(training.steps), stream, strict=False):
        if t % 1000 == 0:
            newest = [right for _, right, _ in answers[-20:]]
            progress(f"{name}, step {t}" + (f", {percent(sum(newest) / len(newest))} right" if newest else ""))
        if step.is_first and t:
            learner.reset()
        y = learner.step(step.x)
        on_step(t, y)
        loss = _loss(y, step.target, training, t)
        if step.target is not None:
            logits = _output(y).detach()
            right = float((logits.argmax(dim=1) == step.target).float().mean())
            answers.append((t, right, float(F.cross_entropy(logits, step.target))))
        if loss is not None:
            learner.backward(loss)
        if (t + 1) % training.every == 0:
            block = (t + 1) // training.every
            if block < 40 or block % 64 == 0:
                most = max(most, sum(learner.retained_bytes().values()))
            learner.sync()
            nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    span = max(1, training.steps // training.points)
    accuracy, losses = {}, {}
    for stop in range(span, training.steps + 1, span):
        here = [answer for answer in answers if stop - span <= answer[0] < stop]
        if here:
            accuracy[stop] = sum(right for _, right, _ in here) / len(here)
            losses[stop] = sum(loss for _, _, loss in here) / len(here)
    last = [right for t, right, _ in answers if t >= 0.9 * training.steps] or [right for _, right, _ in answers]
    parameters = sum(p.numel() for p in cell.parameters())
    final = sum(last) / max(1, len(last))
    return Trained(name, parameters, accuracy, losses, most, time.process_time() - started, final)


def _output(y: Any) -> Tensor:
    output: Tensor = y.output if isinstance(y, rtrl.cells.MoEOutput) else y
    return output


def _loss(y: Any, target: Tensor | None, training: Training, t: int) -> Tensor | None:
    loss = None if target is None else F.cross_entropy(_output(y), target)
    if isinstance(y, rtrl.cells.MoEOutput) and t % training.balance_every == training.balance_every - 1:
        balance = training.balance * rtrl.cells.load_balancing_loss(y.router_logits, y.experts)
        loss = balance if loss is None else loss + balance
    return loss


def macs_per_step(cell: nn.Module, make: MakeLearner, training: Training, blocks: int) -> float:
    """Return the multiply-adds per step of a learner in some blocks, after as many others, with the task's losses."""
    learner = make(cell, training.batch_size)
    stream = enumerate(training.signal.stream(training.batch_size, 0))

    def run() -> None:
        for _, (t, step) in zip(range(blocks * training.every), stream, strict=False):
            y = learner.step(step.x)
            loss = _loss(y, step.target, training, t)
            if loss is not None:
                learner.backward(loss)
            if (t + 1) % training.every == 0:
                learner.sync()

    run()
    counted = count_macs(run)
    cell.zero_grad()
    return counted / (blocks * training.every)


@dataclass
class Routing:
    """How a mixture used its experts, and the tree.

    Attributes:
        dormant: the mean share of an expert's blocks, of one sample, in which it is not used.
        longest: steps that an expert was dormant for at most, before it was used again.
        dead: experts that no sample used in the last tenth of the stream.
        combines: compositions in the segment tree, per step.
    """

    dormant: float
    longest: int
    dead: int
    combines: float


def train_watched(
    name: str,
    mixture: Mixture,
    cell: nn.Module,
    make: MakeLearner,
    training: Training,
    seed: int,
    progress: Callable[[str], None],
) -> tuple[Trained, Routing]:
    """Train a cell of a mixture, and watch how it uses its experts and the tree."""
    size, experts = training.batch_size, mixture.n_experts
    last = torch.full((size, experts), -1)
    used_late, in_block = torch.zeros(experts, dtype=torch.bool), torch.zeros(size, experts, dtype=torch.bool)
    longest, used, blocks = 0, 0.0, 0

    def watch(t: int, y: Any) -> None:
        nonlocal longest, used, blocks
        before = last.gather(1, y.experts)
        longest = max(longest, int(torch.where(before >= 0, t - before - 1, 0).max()))
        last.scatter_(1, y.experts, t)
        in_block.scatter_(1, y.experts, True)
        if t >= 0.9 * training.steps:
            used_late[y.experts.flatten()] = True
        if (t + 1) % training.every == 0:
            used, blocks = used + float(in_block.float().mean()), blocks + 1
            in_block.zero_()

    with counted_combines() as counts:
        trained = _train(name, cell, make, training, seed, progress, watch)
    combines = counts[0] / training.steps
    return trained, Routing(1 - used / max(1, blocks), longest, int((~used_late).sum()), combines)


@contextmanager
def counted_combines() -> Iterator[list[int]]:
    """Count the compositions in the trees of learners that take their first step inside ``with``."""
    counts = [0]

    def counting(first: Transition, second: Transition) -> Transition:
        counts[0] += 1
        return compose(first, second)

    with mock.patch.object(history, "compose", counting):
        yield counts
