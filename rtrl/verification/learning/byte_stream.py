"""Claim: `BlockRTRL` learns from streams of 10⁵ and 10⁶ bytes, one at a time, in memory that does not grow.

**How it is measured.** A GRU with a linear readout reads the sources of Python's own standard library, one byte per
step and one sample, from the first byte on without a reset, and predicts the next byte before it is shown. The
parameters change once every `block` steps. The score is the mean bits per byte over the last third of the stream, each
byte being counted before it is learned from. The bytes held are the sum of `retained_bytes()`, influence included, at
every end of a block; so that nothing uncounted grows either, what the process holds is read there too: past the first
third of the stream it may grow by no more than 16 MB. Beside it, from the same weights with the same optimizer,
clipping and number of updates, learn two truncated BPTTs: one whose horizon is the block, the cheapest way to make
these updates, and one with the longest horizon that holds no more bytes than `BlockRTRL`. And for scale: bits per byte
of an adaptive count of bytes (order 0), which remembers nothing.

**Why that is fair.** All see each byte once, in the same order. The bytes of truncated BPTT are those it holds between
steps; the graph that it builds on top while going backward is left out, in its favour. It carries its state over the
border of a horizon, like `BlockRTRL`; what it lacks is the gradient beyond.

**What it leaves open.** Source text rewards a memory of some tens of bytes, and a horizon of the same bytes is longer
than that. So exactness need not show in bits per byte here, and it costs time; where it does show is the claim
haystack-long. The parameters change in mid-stream, so that the influence is that of parameters a little out of date
(the usual RTRL gradient). The quick run has few steps, which show whether memory grows but teach little; the full one
has 100 000, and then 1 000 000 with longer blocks, again from the first byte. One seed, and one rate for all, which was
not tuned for each.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import rtrl
from rtrl.learners import TBPTT
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import VERDICTS
from rtrl.tasks.bytes import ByteStream
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.subprocesses import rss_bytes
from rtrl.verification.show import plot, table

MARGIN = 0.02
"""Bits per byte; less is not a difference."""
PROCESS = 16 * 2**20
"""Bytes by which the process may grow past the first third of a stream: the allocator's and Python's own."""
CLAIMED_STEPS = 10**5


@dataclass(frozen=True)
class StreamConfig:
    """One stream: its length, H of the GRU, the block, the rate of Adam and the points of the curve."""

    steps: int = 1_200
    hidden: int = 8
    block: int = 8
    rate: float = 2e-2
    clip: float = 1.0
    points: int = 30

    @property
    def part(self) -> int:
        """Steps per point of the curve."""
        return max(self.steps // self.points, 1)


@dataclass(frozen=True)
class Run:
    """One learner on the stream."""

    name: str  # the learner
    bits: float  # mean bits per byte over the last third
    curve: list[float]  # bits per byte of each part of the stream
    held: list[int]  # the most bytes held in each of these parts
    horizon: int | None  # None for an exact learner
    duration_s: float  # seconds of the whole run
    process: list[int] = field(
        default_factory=list
    )  # the most bytes of the process in each part; [] if it is not known


@dataclass(frozen=True)
class StreamResult:
    """The exact learner's run on one stream, those of truncated BPTT, and bits per byte of order 0."""

    config: StreamConfig
    exact: Run
    others: list[Run]
    order_zero: float

    @property
    def best(self) -> Run:
        """The best run of truncated BPTT."""
        return min(self.others, key=lambda run: run.bits)

    @property
    def growth(self) -> int:
        """Bytes by which the exact learner's memory grows."""
        filled = [held for held in self.exact.held if held]
        return max(filled) - filled[0]

    @property
    def process_growth(self) -> int:
        """Bytes by which the process grows past the first third of the stream."""
        later = self.exact.process[len(self.exact.process) // 3 :]
        return max(later) - later[0] if later else 0


@dataclass(kw_only=True)
class Streams(Measurements):
    """The results on all streams."""

    streams: list[StreamResult]

    def __post_init__(self) -> None:
        self.failures += [
            f"the bytes held grew by {result.growth} over {result.config.steps} steps"
            for result in self.streams
            if result.growth
        ]
        self.failures += [
            f"the process grew by {result.process_growth} bytes over {result.config.steps} steps"
            for result in self.streams
            if result.process_growth > PROCESS
        ]


def make_cell(hidden: int, seed: int) -> nn.Module:
    """Return a GRU with 256 inputs and outputs."""
    torch.manual_seed(seed)
    return rtrl.cells.from_torch(nn.GRUCell(256, hidden), nn.Linear(hidden, 256))


def horizon_within(budget: int, config: StreamConfig) -> int:
    """Return the longest horizon, in whole blocks, with which truncated BPTT holds at most ``budget`` bytes when it is
    synchronised after every block."""

    def held(blocks: int) -> int:
        learner = TBPTT(make_cell(config.hidden, 0), 1, blocks * config.block, sliding=False)
        most = 0
        for t in range(blocks * config.block):
            learner.backward(learner.step(torch.zeros(1, 256)).sum())
            if (t + 1) % config.block == 0:
                most = max(most, _held(learner))
                learner.sync()
        return most

    per_block = held(3) - held(2)
    return config.block * max(1, 2 + (budget - held(2)) // per_block)


def run(
    name: str,
    cell: nn.Module,
    learner: Any,
    config: StreamConfig,
    progress: Callable[[str], None],
    horizon: int | None = None,
) -> Run:
    """Train the cell in place on the whole stream, with one update every ``block`` steps."""
    stream = ByteStream(batch_size=1, steps=config.steps)
    parameters = list(cell.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.rate)
    losses: list[float] = []
    held = [0] * math.ceil(config.steps / config.part)
    process = [0] * len(held)
    began = time.perf_counter()
    t = -1  # the newest step
    while t + 1 < config.steps:
        left = config.block - (t + 1) % config.block
        count = min(learner.block, left, config.steps - t - 1)
        xs, targets = zip(*(stream[t + 1 + k] for k in range(count)), strict=True)
        ys = learner.unroll(torch.stack(xs))
        loss = F.cross_entropy(ys.flatten(0, 1), torch.cat(targets), reduction="none")
        learner.backward(loss.sum())
        losses += (loss.detach() / math.log(2)).tolist()
        t += count
        if (t + 1) % config.block == 0 or t + 1 == config.steps:
            held[t // config.part] = max(held[t // config.part], _held(learner))
            process[t // config.part] = max(process[t // config.part], rss_bytes() or 0)
            progress(f"{name}, step {t + 1} of {config.steps}")
            learner.sync()
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            optimizer.zero_grad()
    duration = time.perf_counter() - began
    curve = [_mean(losses[at : at + config.part]) for at in range(0, config.steps, config.part)]
    bits = _mean(losses[-(config.steps // 3) :])
    return Run(name, bits, curve, held, horizon, duration, [n for n in process if n])


def order_zero(config: StreamConfig) -> float:
    """Return the bits per byte, over the last third, of predicting each byte by how often it came before (Laplace's
    rule)."""
    stream = ByteStream(batch_size=1, steps=config.steps)
    counts, bits = [1] * 256, []
    for t in range(config.steps):
        byte = int(stream[t][1])
        bits.append(-math.log2(counts[byte] / (t + 256)))
        counts[byte] += 1
    return _mean(bits[-(config.steps // 3) :])


def _held(learner: Any) -> int:
    return int(sum(learner.retained_bytes().values()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def verdict(m: Streams) -> Judgement:
    """Return the worst of the streams' verdicts."""
    return max((judge(result) for result in m.streams), key=lambda found: VERDICTS.index(found.name))


def judge(result: StreamResult) -> Judgement:
    """Judge one stream."""
    exact, best = result.exact, result.best
    if result.growth:
        return Judgement.does_not_hold("memory grows")
    if result.config.steps < CLAIMED_STEPS:
        return Judgement.not_at_claimed_size(
            f"{result.config.steps} steps: memory is constant; {exact.bits:.2f} bits per byte, {best.name} "
            f"{best.bits:.2f}, order 0 {result.order_zero:.2f}"
        )
    if exact.bits >= result.order_zero:
        return Judgement.does_not_hold(
            f"memory is constant, but in {result.config.steps} steps nothing is learned that counting bytes does not "
            "tell"
        )
    if exact.bits <= best.bits + MARGIN:
        return Judgement.holds()
    return Judgement.holds_when(
        f"constant memory is all that is required: on this text {best.name}, comes to {exact.bits - best.bits:.2f} "
        f"bits per byte fewer, and holds {max(best.held)} bytes"
    )


def show(m: Streams) -> Shown:
    """Show bits per byte and bytes held of all runs."""
    sizes = [
        f"GRU, H = {stream.config.hidden}, T = {stream.config.steps:,}, block {stream.config.block}, one seed"
        for stream in m.streams
    ]
    shown = Shown(". ".join(map(_result, m.streams)), model="; ".join(sizes))
    for stream in m.streams:
        config, runs = stream.config, {run.name: run for run in [stream.exact, *stream.others]}
        columns = {
            "bits per byte": {**{name: run.bits for name, run in runs.items()}, "order 0": stream.order_zero},
            "most bytes held": {name: max(run.held) for name, run in runs.items()},
            "ms per step": {name: 1e3 * run.duration_s / config.steps for name, run in runs.items()},
        }
        shown.tables.append(table(f"{config.steps} bytes of Python's standard library, one by one", "learner", columns))
        curves, held = (
            {name: {config.part * n: v for n, v in enumerate(getattr(run, what), 1)} for name, run in runs.items()}
            for what in ("curve", "held")
        )
        shown.plots.append(plot(f"Learning from {config.steps:,} bytes", "steps", "bits per byte", curves))
        shown.plots.append(plot(f"Bytes held over {config.steps:,} bytes", "steps", "bytes", held, log="y"))
    return shown


def _result(stream: StreamResult) -> str:
    exact = stream.exact
    return (
        f"{stream.config.steps} steps, {max(exact.held)} bytes held, growth {stream.growth}; {exact.bits:.2f} bits per "
        f"byte, TBPTT of the same bytes at best {stream.best.bits:.2f}, order 0 {stream.order_zero:.2f}"
    )


@claim(
    "byte-stream",
    claimed="streams of 10⁵ and 10⁶ bytes are learned from in constant memory",
    threshold=f"growth 0 bytes; fewer bits per byte than order 0, at most {MARGIN} more than TBPTT of the same bytes",
    quick=(StreamConfig(),),
    # Longer blocks in the longer stream: at each update truncated BPTT of the same bytes goes back over several of
    # them, which takes most of the time.
    full=(
        StreamConfig(steps=100_000, hidden=16, block=32, rate=5e-3, points=50),
        StreamConfig(steps=1_000_000, hidden=16, block=128, rate=5e-3, points=100),
    ),
    small=(StreamConfig(steps=480, hidden=2, points=12),),
    verdict=verdict,
    show=show,
    question="memory",
    noticed_breaks=("keep-states", "leak"),
)
def measure(config: tuple[StreamConfig, ...], settings: Settings) -> Streams:
    """Run all learners on every stream."""
    return Streams(streams=[_measure(stream, settings) for stream in config])


def _measure(config: StreamConfig, settings: Settings) -> StreamResult:
    start = make_cell(config.hidden, settings.seed)
    cell = copy.deepcopy(start)
    learner = BlockRTRL(cell, 1, block=config.block)
    exact = run("BlockRTRL", cell, learner, config, settings.progress)
    others = []
    for horizon in sorted({config.block, horizon_within(max(exact.held), config)}):
        cell = copy.deepcopy(start)
        truncated = TBPTT(cell, 1, horizon, sliding=False)
        others.append(run(f"TBPTT, horizon {horizon}", cell, truncated, config, settings.progress, horizon))
    return StreamResult(config, exact, others, order_zero(config))
