"""Catching up was said to be 14 × cheaper after 100 dormant steps and 20 × after 1000, at H = 1024.

**How it is measured.** An expert of 32·H parameters was dormant for n steps. It is caught up step by step, by one
product over all steps (its composition included), and by the learner's plan, which chooses node by node between the
two. The influences of all three are compared with full Jacobians applied one by one by the oracle (float64, 1e-12, n up
to 300), then multiply-adds are counted as they are dispatched; that ratio does not depend on H, so it is counted at a
small one, and times are taken one after the other, one thread: at H = 1024 in the full form, at smaller ones in the
quick one. Twice: over dense steps, and over steps that touch two of sixteen slots, as config *flow* has them.

**Why that is fair.** The tree begins with nothing composed, so that every product is counted here; in a stream, other
reactivations share them. Step by step means the sparse step where the step is sparse: that is what one would do
without a tree. No composed product can save more than a factor n·k / (n − 1 + k), k·H being the parameters, so that
20 × needs k > 20.

**What it leaves open.** Experts with fewer parameters than 14·H or 20·H cannot reach these ratios at all; those of
config *flow* have 16·H.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from rtrl.report.model import Table
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.dormant_slice import Costs, Dormancy, DormantSlice, costs, worst_error
from rtrl.verification.harness.measuring import times
from rtrl.verification.show import plot

CLAIMED, HIDDEN = {100: 14.0, 1000: 20.0}, 1024


@dataclass(frozen=True, slots=True)
class Config:
    """The lengths that are counted; which of them are timed, and at which H; k of the experts; slot width; rounds."""

    lengths: tuple[int, ...] = (10, 100, 1000)
    timed: tuple[tuple[int, int], ...] = ((100, 128), (1000, 128))
    k: int = 32
    width: int = 2
    rounds: int = 2

    @property
    def at_claimed_size(self) -> bool:
        """Whether every claimed length is timed at H = 1024."""
        return all((n, HIDDEN) in self.timed for n in CLAIMED)

    @property
    def kinds(self) -> dict[str, Dormancy]:
        """Dense and sparse steps, as they are counted."""
        return {"dense": Dormancy(0, 8, 1, 8, self.k), "sparse": Dormancy(0, 16, self.width, 2, self.k)}


@dataclass(kw_only=True)
class Savings(Measurements):
    """By kind of steps and length: multiply-adds, and seconds of step by step over those of the plan with H."""

    config: Config
    macs: dict[str, dict[int, Costs]]
    seconds: dict[str, dict[int, tuple[float, int]]]

    @property
    def saved(self) -> dict[str, dict[int, float]]:
        """Multiply-adds of step by step over those of the plan."""
        return {kind: {n: c.one_by_one / c.planned for n, c in found.items()} for kind, found in self.macs.items()}


def verdict(m: Savings) -> Judgement:
    """Judge the savings, say where one composed product loses, and the size if it is another one."""
    found = _with_losing(m)
    if m.config.at_claimed_size or found.name == "does not hold":
        return found
    sizes = ", ".join(f"n = {n} at H = {hidden}" for n, hidden in m.config.timed)
    return Judgement.not_at_claimed_size(f"timed for {sizes}, where by count it {found.name}: {found.condition}")


def _with_losing(m: Savings) -> Judgement:
    """Judge the savings, and say where one composed product loses."""
    found = judge(m.saved["dense"], m.saved["sparse"], CLAIMED)
    sparse = m.macs["sparse"]
    losing = [n for n, c in sparse.items() if c.composed > c.one_by_one]
    if not losing:
        return found
    n = max(losing)
    more = (
        f"; one log-depth product over sparse steps loses to replaying them up to {n} dormant steps "
        f"({times(sparse[n].composed / sparse[n].one_by_one)} the cost there)"
    )
    return replace(found, condition=found.condition + more)


def judge(dense: dict[int, float], sparse: dict[int, float], claimed: dict[int, float]) -> Judgement:
    """Judge the ratios step by step : plan, over dense and over sparse steps."""

    def reached(found: dict[int, float]) -> bool:
        return all(found[n] >= least for n, least in claimed.items() if n in found)

    def listed(found: dict[int, float]) -> str:
        return ", ".join(f"{times(value)} at n = {n}" for n, value in found.items() if n in claimed)

    if reached(dense) and reached(sparse):
        return Judgement.holds()
    if reached(dense):
        return Judgement.holds_when(
            "the steps are dense and the expert has more than about 20·H parameters; over steps that touch two of "
            f"sixteen slots, replaying them is cheap already, and the plan saves {listed(sparse)}"
        )
    return Judgement.does_not_hold(listed(dense))


def timed(dormancy: Dormancy, rounds: int, few: int = 5) -> float:
    """Return the seconds of step by step over those of the plan, the median over rounds.

    Each round begins with a new tree, in which nothing is composed. Step by step, ``few`` steps are timed, since each
    takes the same. Copying the influence, which both need, is timed apart and subtracted.
    """

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    ratios = []
    for _ in range(rounds):
        dormant = DormantSlice(dormancy)
        copy = min(seconds(partial(dormant.one_by_one, 0)) for _ in range(2))
        replayed = seconds(partial(dormant.one_by_one, min(few, dormancy.n))) - copy
        planned = seconds(dormant.planned) - copy
        ratios.append(dormancy.n * max(replayed, 1e-9) / min(few, dormancy.n) / max(planned, 1e-9))
    return median(ratios)


def show(m: Savings) -> Shown:
    """Show the savings by length of dormancy."""
    saved, kinds, k = m.saved, m.config.kinds, m.config.k
    parts = []
    for n in [n for n in CLAIMED if n in saved["dense"]] or list(saved["dense"])[-1:]:
        seconds = f" ({times(m.seconds['dense'][n][0])} in time)" if n in m.seconds["dense"] else ""
        dense, sparse = times(saved["dense"][n]), times(saved["sparse"][n])
        parts.append(f"{dense} at {n} dense steps{seconds}, {sparse} at {n} sparse")
    states = f"H = {kinds['dense'].hidden} dense, {kinds['sparse'].hidden} sparse"
    counts = {kind: {n: (c.one_by_one, c.composed, c.planned) for n, c in m.macs[kind].items()} for kind in kinds}
    rows = [
        [kind, n, *counts[kind][n], saved[kind][n], *m.seconds[kind].get(n, (None, None))]
        for kind in kinds
        for n in m.config.lengths
    ]
    lines = {
        "dense steps": saved["dense"],
        "sparse steps": saved["sparse"],
        "most that a product can save": {n: n * k / (n - 1 + k) for n in m.config.lengths},
    }
    columns = ["steps", "n", "one by one", "one product", "plan", "one by one / plan", "the same in time", "H timed"]
    y_label, dashed = "multiply-adds of one by one over those of the plan", ("most that a product can save",)
    return Shown(
        ", ".join(parts),
        [Table(f"Multiply-adds to catch up {k}·H parameters ({states}), and times", columns, rows)],
        [plot("What the tree saves against step by step", "dormant steps", y_label, lines, dashed=dashed, log="xy")],
        model=f"Jacobians drawn at random, {states}; {k}·H parameters, up to {max(m.config.lengths):,} steps, one seed",
    )


@claim(
    "catch-up",
    claimed="14 × cheaper at 100 dormant steps, 20 × at 1000 (H = 1024)",
    threshold="≥ 14 × at 100, ≥ 20 × at 1000",
    quick=Config(),
    full=Config((3, 10, 30, 100, 300, 1000, 3000), timed=((100, HIDDEN), (1000, HIDDEN)), rounds=1),
    verdict=verdict,
    show=show,
    question="clock",
    void="what is caught up is wrong, so the results are void",
    small=Config((3, 100), ((20, 16),), 32, 1, 1),
    noticed_breaks=("one-by-one",),
)
def measure(config: Config, settings: Settings) -> Savings:
    """Count and time over dense and sparse steps."""
    m = Savings(config=config, macs={kind: {} for kind in config.kinds}, seconds={kind: {} for kind in config.kinds})
    for n in config.lengths:
        settings.progress(f"{n} dormant steps")
        for kind, dormancy in config.kinds.items():
            error = worst_error(replace(dormancy, n=n, k=4, dtype=torch.float64)) if n <= 300 else 0.0
            if not error <= 1e-12:
                m.failures.append(f"after {n} dormant {kind} steps the influence is off by {error:.1e}")
            m.macs[kind][n] = costs(replace(dormancy, n=n))
            if m.macs[kind][n].planned > m.macs[kind][n].one_by_one:
                m.failures.append(f"the plan for {n} {kind} steps costs more than replaying them")
    for n, hidden in config.timed:
        settings.progress(f"timing {n} steps")
        for kind, shape in (("dense", (hidden, 1, hidden)), ("sparse", (16, hidden // 16, 2))):
            m.seconds[kind][n] = timed(Dormancy(n, *shape, config.k), config.rounds), hidden
    return m
