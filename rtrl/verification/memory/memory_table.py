"""A table of bytes was claimed in which BPTT grows with T and RTRL needs 0.0005 MB always.

**How it is measured.** Config *quick* (H = 128, 32 thousand parameters, one sample, float32), a loss at every step.
For each T, the peak of all tensor bytes alive at once, counted storage by storage as tensors are made and freed:
whatever autograd saves for backpropagation through time, its backward pass included; and for ``BlockRTRL`` the
influence, the tree, the traces of the open block, and all that exists while a block is closed. The cell's own
parameters are left out on both sides, the gradient is in. ``BlockRTRL`` first has every expert and slot laid down
once, so that it holds all that it can ever hold. T*, the length from which BPTT needs more, is told twice, and both
times predicted before the table is measured: of what is held between two steps by a plain formula, the learner's H·P
numbers of influence plus its tree over the bytes a step that BPTT takes on a stream of 32; of the peaks by
``rtrl.plan``, which knows both sides' peaks to 10 %. Measured, both are where the line through BPTT's two longest runs
meets RTRL's level.

**Why that is fair.** The old table counted one state a step for BPTT (512 bytes, nothing of the graph) and one state
alone for RTRL: it left the influence out, which is nearly all of it. Here both sides are metered by the same counter.
BPTT is plain; checkpointing would lessen its growth and pay in time.

**What it leaves open.** An allocator rounds up, operations need scratch memory inside themselves that no tensor shows,
and autograd's own nodes are no tensors: a process that runs BPTT grows several times as fast (*bptt-limit*), so that
its T* is shorter. *gpu* measures an allocator.
"""

from dataclasses import dataclass

from rtrl._utils.formatting import show_bytes
from rtrl.costs import plan
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness import problems
from rtrl.verification.harness.memory import alive, between_blocks, bptt_on_cpu, influence_bytes, tree_bytes, wake_all
from rtrl.verification.harness.problems import Mixture, Problem, Run, line, problem, slope
from rtrl.verification.harness.threads import one_thread

CLAIMED = {32: (16_000, 500), 128: (62_000, 500), 512: (250_000, 500), 1024: (500_000, 500), 100_000: (48_800_000, 500)}
"""T → (BPTT, RTRL) as claimed, bytes."""

NEAR = 0.2
"""A T* that ``rtrl.plan`` predicts from two peaks, each to 10 %."""

METERED = 128
"""So many steps the online learner runs under the meter, which slows it; after that, what it holds is compared."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The configuration, the lengths that are run, the one that is told from the fit, and the learner's sizes."""

    mixture: Mixture = problems.QUICK
    lengths: tuple[int, ...] = (32, 128, 512, 1024)
    told: tuple[int, ...] = (100_000,)
    block: int = 16
    window: int = 16


QUICK = Sizes()
FULL = Sizes(lengths=(32, 128, 512, 1024, 4096, 16_384))


def judge(
    bptt: dict[int, float],
    rtrl: dict[int, float],
    held: float,
    crossover: float,
    within: bool,
    claimed: dict[int, tuple[int, int]],
) -> tuple[Verdict, str]:
    """The verdict: the claimed figures hold, or only their shape does, from T* on."""
    alike = [0.5 <= bptt[t] / old[0] <= 2 and 0.5 <= rtrl[t] / old[1] <= 2 for t, old in claimed.items() if t in bptt]
    if alike and all(alike):
        return "holds", ""
    if not within:
        return "does not hold", f"at no length measured does RTRL need less than BPTT (T* would be {crossover:,.0f})"
    per = show_bytes((bptt[max(bptt)] - bptt[min(bptt)]) / max(max(bptt) - min(bptt), 1))
    return (
        "holds when",
        f"T > {crossover:,.0f}: only from there on does RTRL need less. Not the figures hold but their shape: BPTT "
        f"grows by {per} a step; RTRL is constant, {show_bytes(held)} between steps, nearly all of it influence, and "
        f"{show_bytes(rtrl[max(rtrl)])} while a block is closed",
    )


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """The table; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    failures = []
    stream = problem(sizes.mixture, 256, settings.seed)
    progress("the prediction", 0, len(sizes.lengths) + 2)
    probe = (8, 16, 32)
    short = [bptt_on_cpu(stream, t) for t in probe]
    offset, per_step = line(probe, short)
    formula = influence_bytes(sizes.mixture) + tree_bytes(sizes.mixture, sizes.block, sizes.window)
    predicted = (formula - offset) / per_step
    planned = _planned(stream, sizes)

    progress("BlockRTRL", 1, len(sizes.lengths) + 2)
    rtrl: dict[int, float] = {}
    held: dict[int, int] = {}
    with alive() as meter:
        run = Run(stream, block=sizes.block, window=sizes.window)
        wake_all(run)
        for t in sizes.lengths:
            if t <= METERED:
                run.advance(t - run.t)
                run.deliver()
                rtrl[t], held[t] = meter.peak, between_blocks(run.learner)
    for t in (t for t in sizes.lengths if t > METERED):  # no meter: it is slow, and what is held shows any growth
        run.advance(t - run.t)
        run.deliver()
        rtrl[t], held[t] = max(rtrl.values()), between_blocks(run.learner)
    if len(set(held.values())) != 1:
        failures.append(f"what BlockRTRL holds after a delivery changes with T: {held}")
    if next(iter(held.values())) - 4 * sizes.mixture.hidden != formula:
        failures.append(f"BlockRTRL holds {next(iter(held.values()))} bytes; the formula says {formula} and a state")
    del run

    bptt: dict[int, float] = {}
    for done, t in enumerate(sizes.lengths):
        progress(f"BPTT over {t} steps", done + 2, len(sizes.lengths) + 2)
        bptt[t] = bptt_on_cpu(stream, t)
    last = sorted(bptt)[-2:]
    rate = (bptt[last[1]] - bptt[last[0]]) / (last[1] - last[0])
    peak = max(rtrl.values())
    crossover = last[1] + (peak - bptt[last[1]]) / rate
    between = (next(iter(held.values())) - offset) / rate
    if planned is None or abs(planned / crossover - 1) > NEAR:
        failures.append(f"rtrl.plan puts T* of the peaks at {planned} steps; measured are {crossover:.0f}")
    for t in sizes.told:
        bptt[t], rtrl[t] = bptt[last[1]] + rate * (t - last[1]), peak
    lengths = sorted(bptt)
    growth = slope([float(t) for t in sizes.lengths[1:]], [bptt[t] for t in sizes.lengths[1:]])
    verdict, condition = judge(bptt, rtrl, held[min(held)], crossover, crossover < max(lengths), CLAIMED)
    rows: list[list[str | int | float | None]] = [
        [
            t,
            "told by the fit" if t in sizes.told else "measured",
            bptt[t],
            rtrl[t],
            held.get(t),
            *CLAIMED.get(t, (None, None)),
        ]
        for t in lengths
    ]
    shown = max(t for t in sizes.lengths if t <= 1024)
    return Finding(
        f"at T = {shown}: BPTT {show_bytes(bptt[shown])}, RTRL {show_bytes(rtrl[shown])} always; RTRL's peak is "
        f"lower from T* = {crossover:,.0f} on ({_steps(planned)} predicted), what it holds between steps from "
        f"{between:,.0f} on ({predicted:,.0f} predicted)",
        "BPTT 0.016 … 48.8 MB, RTRL 0.0005 MB always",
        verdict,
        condition,
        failures,
        [
            Table(
                f"Peak bytes, config {sizes.mixture.name}, block {sizes.block}, window {sizes.window}, float32",
                ["T", "how", "BPTT", "RTRL, peak", "RTRL, between steps", "BPTT, claimed", "RTRL, claimed"],
                rows,
            ),
            Table(
                "The crossover T*",
                ["of what", "predicted", "measured", "bytes a step of BPTT", "bytes of RTRL"],
                [
                    ["held between steps", predicted, between, rate, next(iter(held.values()))],
                    ["peak", planned, crossover, rate, peak],
                ],
            ),
        ],
        [
            Plot(
                "Peak memory over the length of the stream",
                "T, steps",
                "bytes",
                [
                    Series("BPTT", [float(t) for t in lengths], [bptt[t] for t in lengths]),
                    Series(
                        "RTRL, influence and tree included", [float(t) for t in lengths], [rtrl[t] for t in lengths]
                    ),
                    Series(
                        "BPTT as claimed", [float(t) for t in CLAIMED], [float(b) for b, _ in CLAIMED.values()], True
                    ),
                ],
                log_x=True,
                log_y=True,
            )
        ],
        {
            "crossover": crossover,
            "crossover_planned": planned,
            "crossover_held": between,
            "crossover_held_predicted": predicted,
            "bytes_per_step": rate,
            "rtrl_peak_bytes": peak,
            "growth_exponent_bptt": growth,
        },
    )


def _steps(number: int | None) -> str:
    return "none" if number is None else f"{number:,}"


def _planned(stream: Problem, sizes: Sizes) -> int | None:
    """The last length at which BPTT's peak is no higher, as ``rtrl.plan`` has it."""
    found = plan(stream.cell, stream.xs[0], steps=max(sizes.lengths), blocks=[sizes.block], windows=[sizes.window])
    (row,) = (row for row in found.rows if row.method == "BlockRTRL")
    return row.crossover_peak_steps


CLAIM = Claim(
    "memory-table", "BPTT 0.016 / 0.062 / 0.25 / 0.5 MB at T = 32 / 128 / 512 / 1024; RTRL 0.0005 MB always", measure
)
