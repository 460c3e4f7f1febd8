"""A table of bytes was claimed in which BPTT grows with T and RTRL needs 0.0005 MB always.

**How it is measured.** Config *quick* (H = 128, 32 thousand parameters, one sample, float32), a loss at every step.
For each T, the peak of all tensor bytes alive at once, counted storage by storage as tensors are made and freed:
what autograd saves for backpropagation through time, its backward pass included; and for ``BlockRTRL`` the influence,
the tree, the traces of the open block, and all that exists while a block is closed. The cell's own parameters are left
out on both sides, the gradient is in. Both sides run under the meter at every T, from the first step to the last.
``BlockRTRL`` first uses every expert and slot once, so that it holds all that it can ever hold; a peak that then grows
with T, or bytes held that do, void the table. T*, the length from which BPTT needs more, is given twice, and both
times predicted before the table is measured: of what is held between two steps by a plain formula, the learner's H·P
numbers of influence plus its tree over the bytes per step that BPTT takes on a stream of 32; of the peaks by
``rtrl.plan``, which knows both sides' peaks to 10 %. Measured, both are where the line through BPTT's two longest runs
meets RTRL's level.

**Why that is fair.** The old table counted one state per step for BPTT (512 bytes, nothing of the graph) and one state
alone for RTRL: it left the influence out, which is nearly all of it. Here both sides are metered by the same counter.
BPTT is plain; checkpointing would reduce its growth and cost time.

**What it leaves open.** An allocator rounds up, operations need scratch memory inside themselves that no tensor shows,
and autograd's own nodes are not tensors: a process that runs BPTT grows several times as fast (*bptt-limit*), so that
its T* is shorter. *gpu* measures an allocator.
"""

from dataclasses import dataclass, field, replace

from rtrl._utils.formatting import show_bytes
from rtrl.costs import plan
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.report.model import Cell, Table, VerticalLine
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness import problems
from rtrl.verification.harness.measuring import fit_line
from rtrl.verification.harness.memory import bptt_on_cpu, bytes_after_sync, influence_bytes, tree_bytes, use_all_slices
from rtrl.verification.harness.problems import LearnerRun, Mixture, Problem, problem
from rtrl.verification.show import plot, table

CLAIMED = {32: (16_000, 500), 128: (62_000, 500), 512: (250_000, 500), 1024: (500_000, 500), 100_000: (48_800_000, 500)}
"""T → (BPTT, RTRL) as claimed, bytes."""

NEAR = 0.2
"""How far a T* may be that ``rtrl.plan`` predicts from two peaks, each to 10 %."""

GROWTH = 1.01
"""The most by which RTRL's peak at the longest T may exceed the one at the shortest."""


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration, the lengths that are run, those that are extrapolated, and the learner's sizes."""

    mixture: Mixture = problems.QUICK
    lengths: tuple[int, ...] = (32, 128, 512, 1024, 4096)
    extrapolated: tuple[int, ...] = (100_000,)
    block: int = 16
    window: int = 16


@dataclass(kw_only=True)
class Peaks(Measurements):
    """What was measured."""

    config: Config
    bptt: dict[int, int]  # T → peak bytes of BPTT, for the lengths that are run
    peak: dict[int, int]  # peak bytes of RTRL at each of these lengths
    held: dict[int, int]  # what RTRL holds between steps at each of these lengths
    short: tuple[float, float]  # the line through BPTT's peaks on short streams, from which T* is predicted
    formula: int  # what RTRL holds between steps by formula
    planned: int | None  # T* of the peaks as ``rtrl.plan`` predicts it
    parameters: int  # P
    claimed: dict[int, tuple[int, int]] = field(default_factory=lambda: CLAIMED)  # T → (BPTT, RTRL) as claimed, bytes

    @property
    def rate(self) -> float:
        """Bytes per step of BPTT, by its two longest runs."""
        first, last = sorted(self.bptt)[-2:]
        return (self.bptt[last] - self.bptt[first]) / (last - first)

    @property
    def crossover(self) -> float:
        """T* of the peaks."""
        last = max(self.bptt)
        return last + (max(self.peak.values()) - self.bptt[last]) / self.rate

    @property
    def crossover_held(self) -> float:
        """T* of what is held between steps."""
        return (min(self.held.values()) - self.short[0]) / self.rate

    @property
    def predicted_held(self) -> float:
        """T* of what is held between steps, as predicted."""
        return (self.formula - self.short[0]) / self.short[1]

    @property
    def extended(self) -> tuple[dict[int, float], dict[int, float]]:
        """T → peak bytes of BPTT and of RTRL, with the lengths that are extrapolated."""
        last, beyond = max(self.bptt), self.config.extrapolated
        bptt = {t: self.bptt[last] + self.rate * (t - last) for t in beyond}
        return {**self.bptt, **bptt}, {**self.peak, **dict.fromkeys(beyond, max(self.peak.values()))}


def verdict(m: Peaks) -> Judgement:
    """Judge the bytes, and say the size if it is another one."""
    found, mixture, longest = judge(m), m.config.mixture, max(m.config.lengths)
    if mixture == problems.QUICK and longest >= 1024:
        return found
    size = f"d_model {mixture.d_model}, H = {mixture.hidden}, T up to {longest}"
    return Judgement.not_at_claimed_size(f"measured at {size}, where it {found.name}: {found.condition}")


def judge(m: Peaks) -> Judgement:
    """Judge whether the claimed bytes hold, or only their shape does, from T* on."""
    bptt, rtrl = m.extended
    alike = [0.5 <= bptt[t] / old[0] <= 2 and 0.5 <= rtrl[t] / old[1] <= 2 for t, old in m.claimed.items() if t in bptt]
    if alike and all(alike):
        return Judgement.holds()
    if m.crossover >= max(bptt):
        return Judgement.does_not_hold(
            f"at no length measured does RTRL need less than BPTT (T* would be {m.crossover:,.0f})"
        )
    per = show_bytes((bptt[max(bptt)] - bptt[min(bptt)]) / max(max(bptt) - min(bptt), 1))
    held, peak = show_bytes(min(m.held.values())), show_bytes(rtrl[max(rtrl)])
    return Judgement.holds_when(
        f"T > {m.crossover:,.0f}: only from there on does RTRL need less. Not the bytes hold but their shape: BPTT "
        f"grows by {per} per step; RTRL is constant, {held} between steps, nearly all of it influence, and {peak} "
        "while a block is closed"
    )


def show(m: Peaks) -> Shown:
    """Show the table, the crossover and the peaks over T."""
    config, (bptt, rtrl), held, peak = m.config, m.extended, min(m.held.values()), max(m.peak.values())
    t = max(config.lengths)
    planned = "none" if m.planned is None else f"{m.planned:,}"
    old = {t: bytes_[0] for t, bytes_ in m.claimed.items()}
    claimed = {"BPTT, claimed": old, "RTRL, claimed": {t: bytes_[1] for t, bytes_ in m.claimed.items()}}
    columns = {
        "how": {t: "extrapolated" if t in config.extrapolated else "measured" for t in bptt},
        "BPTT": bptt, "RTRL, peak": rtrl, "RTRL, between steps": m.held, **claimed,
    }  # fmt: skip
    mixture = config.mixture
    title = (
        f"Peak bytes, config {mixture.name}: d_model {mixture.d_model}, H = {mixture.hidden}, P = {m.parameters:,}, "
        f"block {config.block}, window {config.window}, one sample, float32"
    )
    crossovers: list[list[Cell]] = [
        ["held between steps", m.predicted_held, m.crossover_held, m.rate, held],
        ["peak", m.planned, m.crossover, m.rate, peak],
    ]
    lines = {"BPTT": bptt, "RTRL, influence and tree included": rtrl, "BPTT as claimed": old}
    shown = plot(
        "Peak memory over the length of the stream", "T, steps", "bytes", lines, dashed=["BPTT as claimed"], log="xy"
    )
    if m.crossover > 0:
        shown = replace(shown, vertical_lines=[VerticalLine(m.crossover, f"T* = {m.crossover:,.0f}")])
    heading = ["of what", "predicted", "measured", "bytes per step of BPTT", "bytes of RTRL"]
    return Shown(
        f"at T = {t}: BPTT {show_bytes(bptt[t])}, RTRL {show_bytes(rtrl[t])} always; RTRL's peak is lower from T* = "
        f"{m.crossover:,.0f} on ({planned} predicted), what it holds between steps from {m.crossover_held:,.0f} on "
        f"({m.predicted_held:,.0f} predicted)",
        [table(title, "T", columns), Table("The crossover T*", heading, crossovers)],
        [shown],
        headline=f"On a mixture with {m.parameters:,} parameters BlockRTRL holds fewer bytes than BPTT from "
        f"{m.crossover_held:,.0f} steps on between steps, and from {m.crossover:,.0f} on at its peak",
        model=f"RecurrentMoE, config {mixture.name}: P = {m.parameters:,}, H = {mixture.hidden}, T up to {t:,}; one "
        "seed",
    )


@claim(
    "memory-table",
    claimed="BPTT 0.016 / 0.062 / 0.25 / 0.5 MB at T = 32 / 128 / 512 / 1024; RTRL 0.0005 MB always",
    threshold="BPTT 0.016 … 48.8 MB, RTRL 0.0005 MB always",
    quick=Config(replace(problems.QUICK, name="quick, half as wide", d_model=16), (32, 128, 352)),
    full=Config(),
    verdict=verdict,
    show=show,
    question="memory",
    void="the bytes are not what the learner says, or grow, so the table is void",
    small=Config(Mixture("small", 2, 2, 4, 3, 4), (8, 16, 32), (1000,), 4, 4),
    noticed_breaks=("keep-states", "uncounted-influence", "double-window"),
)
def measure(config: Config, settings: Settings) -> Peaks:
    """Predict T*, then measure both sides."""
    stream = problem(config.mixture, 256, settings.seed)
    settings.progress("the prediction")
    probe = (8, 16, 32)
    short = fit_line(probe, [bptt_on_cpu(stream, t) for t in probe])
    formula = influence_bytes(config.mixture) + tree_bytes(config.mixture, config.block, config.window)
    planned = _planned(stream, config)

    peak: dict[int, int] = {}
    held: dict[int, int] = {}
    with LiveBytes() as meter:
        run = LearnerRun(stream, block=config.block, window=config.window)
        use_all_slices(run)
        for t in config.lengths:
            settings.progress(f"BlockRTRL over {t} steps")
            run.advance(t - run.t)
            run.sync()
            peak[t], held[t] = meter.peak, bytes_after_sync(run.learner)
    failures = []
    if peak[max(peak)] > GROWTH * peak[min(peak)]:
        failures.append(f"the peak of BlockRTRL grows with T: {peak}")
    first = next(iter(held.values()))
    if len(set(held.values())) != 1:
        failures.append(f"what BlockRTRL holds after a delivery changes with T: {held}")
    if first - 4 * config.mixture.hidden != formula:
        failures.append(f"BlockRTRL holds {first} bytes; the formula says {formula} and a state")
    del run

    bptt: dict[int, int] = {}
    for t in config.lengths:
        settings.progress(f"BPTT over {t} steps")
        bptt[t] = bptt_on_cpu(stream, t)
    m = Peaks(
        config=config, bptt=bptt, peak=peak, held=held, short=short, formula=formula, planned=planned,
        parameters=stream.parameters, failures=failures,
    )  # fmt: skip
    if planned is None or abs(planned / m.crossover - 1) > NEAR:
        failures.append(f"rtrl.plan puts T* of the peaks at {planned} steps; measured are {m.crossover:.0f}")
    return m


def _planned(stream: Problem, config: Config) -> int | None:
    """Return the last length at which BPTT's peak is not higher, as ``rtrl.plan`` predicts it."""
    steps, blocks, windows = max(config.lengths), [config.block], [config.window]
    found = plan(stream.cell, stream.xs[0], steps=steps, blocks=blocks, windows=windows, horizons=[])
    (row,) = (row for row in found.rows if row.method == "BlockRTRL")
    return row.crossover_peak_steps
