"""Is exact online learning faster, by the clock, than what one would use instead? Where is it, and where not?

**How it is measured.** One sample, float32, one thread, a squared error at every step of a drawn stream, 32 inputs.
Cells: a tanh RNN and a GRU (dense), minGRU, element-wise LSTM and recurrent trace units (independent rows), and a
mixture of 16 experts on 8 slots, each at several sizes H of its state. ``BlockRTRL`` delivers exact gradients at the
end of every block, *step by step* as a stream needs it, and in *sequences*, a block's steps at once. Against it stand,
each as a user would write it: *eager BPTT*, a Python loop over the cell and one ``backward`` for the whole stream;
*TBPTT*, the same with a ``backward`` after every block, whose gradient is another one; *fused BPTT*, ``nn.RNN`` or
``nn.GRU`` on the whole stream at once; and *RTRL in JAX*, a jitted ``lax.scan`` (where JAX is installed, at the smaller
sizes; compiling is not timed). T and the block stand in the table. All sides take the stream in turns; the median of
the ratios of neighbours is shown. Beside it the peak bytes of all tensors alive: those of ``BlockRTRL`` are constant,
those of eager BPTT grow with T, and T* is the length from which they are more.

**Why that is fair.** Every gradient but that of TBPTT is compared with the others', roughly, in the very runs that are
timed; and those of ``BlockRTRL`` exactly (float64, 1e-10) with an oracle, on small cells over a stream longer than the
block. The rivals that have sequences at hand are compared with ``BlockRTRL`` on sequences, those that go step by step
with both.

**What it leaves open.** A batch helps all sides, and BPTT more (*performance* has batches). Fused and jitted code of
the independent-row cells would have to be written by hand. Blocks are set by rule and not tuned.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log

import torch

import oracles
from rtrl.profiling.live_bytes import peak_of
from rtrl.profiling.timing import alternate, median_ratio, medians
from rtrl.report.model import Cell, Plot, Series, Table, VerticalLine
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.compare import compare_gradients
from rtrl.verification.harness.measuring import fit_line
from rtrl.verification.harness.problems import EXACT, ROUGH
from rtrl.verification.speed import jax_rtrl
from rtrl.verification.speed.crossover_sides import RIVALS, Case, Eager, Online, case, sides

PAIRS = (
    ("eager BPTT", "steps"), ("TBPTT", "steps"), ("eager BPTT", "sequences"), ("fused BPTT", "sequences"),
    ("RTRL in JAX", "sequences"),
)  # fmt: skip
"""Which side is compared with which way to run ``BlockRTRL``."""

Sizes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Config:
    """How much is run.

    Attributes:
        sizes: each kind of cell with its sizes H.
        jax_sizes: the same where RTRL in JAX is run.
        steps: T of the timed stream; four times as many for dense cells.
        rounds: how many times each side is timed.
        narrow: H at which gradients are compared exactly.
    """

    sizes: Sizes
    jax_sizes: Sizes = ()
    steps: int = 64
    rounds: int = 3
    narrow: int = 8

    def lengths(self, kind: str) -> tuple[int, int]:
        """Return T and the block: half of T for dense cells, 32 steps for independent rows, 16 for the mixture."""
        if kind in ("RNN", "GRU"):
            return 4 * self.steps, 2 * self.steps
        return self.steps, 16 if kind == "mixture" else 32


@dataclass(frozen=True, slots=True)
class SizeMeasured:
    """One cell at one size: P, T, the block, seconds per step by side, and peak bytes: those of ``BlockRTRL``, and the
    line of those of eager BPTT over T."""

    kind: str
    hidden: int
    parameters: int
    steps: int
    block: int
    seconds: dict[str, list[float]]
    held: int
    bptt: tuple[float, float]

    def ratio(self, rival: str, ours: str) -> float | None:
        """Return the time of a rival over that of ours; None if it was not run."""
        return median_ratio(self.seconds[rival], self.seconds[ours]) if rival in self.seconds else None

    @property
    def longest(self) -> float:
        """T*, from which eager BPTT takes more bytes."""
        return max((self.held - self.bptt[0]) / self.bptt[1], 0.0)


@dataclass(kw_only=True)
class Ratios(Measurements):
    """The rows, and the largest error of exactly compared gradients."""

    config: Config
    rows: list[SizeMeasured]
    error: float

    def wins(self, rival: str, ours: str) -> tuple[list[SizeMeasured], list[SizeMeasured]]:
        """Return the rows in which ours is faster, and all in which the rival was run."""
        run = [row for row in self.rows if row.ratio(rival, ours) is not None]
        return [row for row in run if (row.ratio(rival, ours) or 0.0) > 1], run


def verdict(m: Ratios) -> Judgement:
    """Judge whether it is faster than every rival at every size, or where it is."""
    parts, won, lost = [], 0, 0
    for rival, ours in PAIRS:
        wins, run = m.wins(rival, ours)
        won, lost = won + len(wins), lost + len(run) - len(wins)
        if run:
            where = f" ({_listed(wins)})" if wins else ""
            parts.append(f"than {rival}, in {ours}, at {len(wins)} of {len(run)} sizes{where}")
    if not won:
        return Judgement.does_not_hold("at no size is it faster than any of them")
    return Judgement.holds_when("it is faster " + "; ".join(parts)) if lost else Judgement.holds()


def _listed(rows: list[SizeMeasured]) -> str:
    """Name cells and sizes: "GRU 32, 64; minGRU 512"."""
    kinds = dict.fromkeys(row.kind for row in rows)
    return "; ".join(f"{kind} {', '.join(str(row.hidden) for row in rows if row.kind == kind)}" for kind in kinds)


def crossings(points: dict[int, float]) -> list[float]:
    """Return the sizes at which a ratio over H crosses 1, interpolated between its points on logarithmic axes."""
    found = []
    for (h, ratio), (h_next, next_) in pairwise(sorted(points.items())):
        if (ratio - 1) * (next_ - 1) < 0:
            share = log(ratio) / (log(ratio) - log(next_))
            found.append(exp(log(h) + share * (log(h_next) - log(h))))
    return found


def show(m: Ratios) -> Shown:
    """Show ratios of clocks and bytes over H, with the crossovers."""
    kinds = [kind for kind, _ in m.config.sizes]
    lines: dict[str, dict[int, float]] = {}
    for kind in kinds:
        for rival, ours in PAIRS:
            found = {row.hidden: row.ratio(rival, ours) for row in m.rows if row.kind == kind}
            points = {hidden: value for hidden, value in found.items() if value is not None}
            if points and (rival, ours) not in {("TBPTT", "steps"), ("eager BPTT", "sequences")}:
                lines[f"{kind}: {rival}"] = points
    marks = [VerticalLine(place, name) for name, points in lines.items() for place in crossings(points)]
    series = [Series(name, list(points), list(points.values())) for name, points in lines.items()]
    ends = [min(row.hidden for row in m.rows), max(row.hidden for row in m.rows)]
    series.append(Series("as fast", ends, [1.0, 1.0], dashed=True))
    own = {kind: [row for row in m.rows if row.kind == kind] for kind in kinds}
    held = [Series(kind, [row.hidden for row in has], [row.longest for row in has]) for kind, has in own.items()]
    rows: list[list[Cell]] = []
    for row in m.rows:
        seconds = medians(row.seconds)
        clock = [row.ratio(rival, ours) for rival, ours in PAIRS]
        micro = [1e6 * seconds[name] if name in seconds else None for name in ("steps", "sequences", *RIVALS)]
        rows.append(
            [
                row.kind,
                row.hidden,
                row.parameters,
                row.steps,
                row.block,
                *micro,
                *clock,
                row.held,
                row.bptt[1],
                row.longest,
            ]
        )
    columns = [
        "cell", "H", "P", "T", "block", *(f"µs per step, {name}" for name in ("steps", "sequences", *RIVALS)),
        *(f"{rival} / {ours}" for rival, ours in PAIRS),
        "peak bytes", "bytes per step of BPTT", "T*",
    ]  # fmt: skip
    counted = [f"{len(m.wins(*pair)[0])} of {len(m.wins(*pair)[1])} sizes than {pair[0]} ({pair[1]})" for pair in PAIRS]
    absent = "" if jax_rtrl.available else "; JAX is not installed here"
    return Shown(
        "faster at " + ", ".join(counted) + absent,
        [Table("One sample, float32, one thread, one seed; times in turns", columns, rows)],
        [
            Plot("Time of each rival over that of BlockRTRL: above 1 it is faster", "H", "ratio of times", series,
                 log_x=True, log_y=True, vertical_lines=marks),
            Plot("The length of stream from which BlockRTRL takes fewer bytes than BPTT", "H", "T*, steps", held,
                 log_x=True, log_y=True),
        ],
        headline="By the clock, BlockRTRL is faster than "
        + ", ".join(
            f"{pair[0]} at {len(m.wins(*pair)[0])} of {len(m.wins(*pair)[1])} sizes"
            for pair in PAIRS
            if m.wins(*pair)[1] and pair[0] != "TBPTT" and pair != ("eager BPTT", "sequences")
        ),
        model=f"{', '.join(kinds)}; H = {ends[0]} … {ends[1]}, one seed, one thread",
    )  # fmt: skip


@claim(
    "crossover",
    claimed="by the clock, exact online learning is faster than eager, truncated and fused BPTT, and RTRL in JAX",
    threshold="> 1 × against each, at every size",
    quick=Config(
        (("RNN", (16, 64)), ("GRU", (16, 64)), ("minGRU", (64, 256)), ("RTU", (256,)), ("mixture", (64,))),
        (("RNN", (16,)), ("GRU", (16,))), rounds=2,
    ),
    full=Config(
        (
            *((kind, (16, 32, 64, 128, 256)) for kind in ("RNN", "GRU")),
            *((kind, (64, 128, 256, 512, 1024)) for kind in ("minGRU", "eLSTM", "RTU")),
            ("mixture", (64, 128, 256)),
        ),
        (("RNN", (16, 32, 64)), ("GRU", (16, 32, 64))), steps=128, rounds=5,
    ),
    verdict=verdict,
    show=show,
    void="gradients differ, so the times mean nothing",
    question="clock",
    small=Config((("RNN", (8,)),), steps=16),
    noticed_breaks=("truncate", "off-by-one"),
)  # fmt: skip
def measure(config: Config, settings: Settings) -> Ratios:
    """Compare gradients, then take times and bytes of every cell at every size."""
    m = Ratios(config=config, rows=[], error=0.0)
    for kind, sizes in config.sizes:
        settings.progress(f"gradients, {kind}")
        _check_exactly(m, case(kind, 2 * config.narrow, 11, 4, settings.seed, torch.float64))
        for hidden in sizes:
            settings.progress(f"{kind}, H = {hidden}")
            found = case(kind, hidden, *config.lengths(kind), settings.seed)
            made = sides(found, hidden in dict(config.jax_sizes).get(kind, ()))
            for side in made.values():
                side.advance()
            expected = made["eager BPTT"].gradients()
            for name, side in made.items():
                if name != "TBPTT":
                    compared = compare_gradients(side.gradients(), expected, (), ROUGH)
                    if not compared.passed:
                        m.failures.append(f"{kind}, H = {hidden}, {name}: {compared.problem or compared.error}")
            seconds = alternate({name: side.advance for name, side in made.items()}, config.rounds)
            parameters = sum(p.numel() for p in found.cell.parameters())
            m.rows.append(SizeMeasured(kind, hidden, parameters, len(found.xs), found.block, seconds, *_bytes(found)))
    return m


def _bytes(found: Case) -> tuple[int, tuple[float, float]]:
    """Return the peak bytes of ``BlockRTRL``, and the line of those of eager BPTT over T."""

    def peak(kind: type[Online] | type[Eager], steps: int) -> int:
        return peak_of(lambda: kind(_shorter(found, steps)).advance())

    lengths = (8, 24)
    return peak(Online, 3 * found.block), fit_line(lengths, [peak(Eager, steps) for steps in lengths])


def _shorter(found: Case, steps: int) -> Case:
    """Return the case with a stream of this length, repeated if need be."""
    repeats = -(-steps // len(found.xs))
    xs, targets = (values.repeat(repeats, *[1] * (values.ndim - 1))[:steps] for values in (found.xs, found.targets))
    return replace(found, xs=xs, targets=targets)


def _check_exactly(m: Ratios, found: Case) -> None:
    """Compare the gradients of ``BlockRTRL`` with the oracle's, over a stream longer than the block."""
    expected = oracles.bptt(found.cell, found.xs, found.loss)
    for name, side in sides(found, jax=False).items():
        if name in ("steps", "sequences"):
            side.advance()
            compared = compare_gradients(side.gradients(), expected, (), EXACT)
            m.error = max(m.error, compared.error)
            if not compared.passed:
                m.failures.append(f"{found.kind}, {name}, float64: {compared.problem or compared.error}")
