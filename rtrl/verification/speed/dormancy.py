"""A slice dormant for 100 steps was said to be caught up by about log₂ n products.

**How it is measured.** The segment tree that the learner uses, over a monoid that counts its combinations. For
dormancies of n = 1 … 1000 steps, three numbers: combinations when the tree is queried for the first time; when every
inner node is there already; and, step by step over a long stream in which something that was dormant for n steps is
reactivated at every step (as in a mixture with n/2 experts, top-2), the mean per reactivation. The result of every
query is compared with the product taken one by one: exactly over strings, where any error of order shows, and in
float64 to 1e-12 over the learner's own transitions of Jacobians.

And end to end: in a learner's stream, with a loss at every step, one expert of a mixture is active in the first four
steps (in the full form also never), dormant until step 200, and active from then on; slots and the other experts are
drawn. The gradients of the whole stream are compared with BPTT (float64, 1e-10), with a window that holds the dormancy
and with one that does not, and the multiply-adds of every step around the reactivation are counted.

**Why that is fair.** A first query must touch each of n elements, so that n − 1 combinations are the least that any
method can do; what the tree promises is that other reactivations then share them. Which of the three numbers is “the”
cost depends on what else is reactivated, so all are reported.

**What it leaves open.** Of the tree, combinations are counted, not their price: a combined product may be dense where
its factors are sparse (see *catch-up*). Other experts are reactivated at every step.
"""

import math
import statistics
from dataclasses import dataclass, field

import torch

import oracles
from rtrl._influence.segment_tree import CircularSegmentTree
from rtrl._influence.transition import Transition, compose, identity
from rtrl.report.model import Cell, Table
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.problems import HAYSTACK, Mixture
from rtrl.verification.show import plot, table
from rtrl.verification.speed.reactivation import Reactivation, Schedule, reactivate

MIXTURE = Mixture("dormancy", 4, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Config:
    """The lengths of dormancy, how many reactivations of each are averaged, H of the product that is compared, and what
    is run end to end."""

    lengths: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    reactivations: int = 300
    hidden: int = 6
    end_to_end: tuple[Schedule, ...] = (Schedule(MIXTURE), Schedule(MIXTURE, window=32))


@dataclass(kw_only=True)
class Combinations(Measurements):
    """Length → combinations of the first query, of a second one, and the mean in a stream; length → relative error; and
    what was run end to end."""

    counts: dict[int, tuple[int, int, float]]
    errors: dict[int, float]
    end_to_end: list[Reactivation] = field(default_factory=list)


class CountingTree:
    """A tree over strings of step numbers, as tuples, which counts the combinations that it makes."""

    def __init__(self, capacity: int) -> None:
        self.made = 0
        self.tree: CircularSegmentTree[tuple[int, ...]] = CircularSegmentTree(capacity, self._combine, ())

    def _combine(self, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
        self.made += 1
        return first + second

    def query(self, start: int, stop: int) -> tuple[int, bool]:
        """Return the combinations of a query, and whether its result is in order."""
        before = self.made
        in_order = self.tree.query(start, stop) == tuple(range(start, stop))
        return self.made - before, in_order


def combinations(length: int, reactivations: int) -> tuple[int, int, float, bool]:
    """Return the combinations of a first query, of a second one, the mean in a stream, and whether all were right.

    The ring is half again as long as the dormancy and has wrapped around, so that queries cross its end.
    """
    capacity = length + length // 2 + 1
    counting = CountingTree(capacity)
    for step in range(capacity + length):
        counting.tree.append((step,))
    stop = capacity + length
    first, right = counting.query(stop - length, stop)
    second, again = counting.query(stop - length, stop)
    before, good = counting.made, right and again
    for step in range(stop, stop + reactivations):
        counting.tree.append((step,))
        good &= counting.query(step + 1 - length, step + 1)[1]
    return first, second, (counting.made - before) / reactivations, good


def product_error(length: int, hidden: int, seed: int) -> float:
    """Return the largest relative error of the tree's product of transitions against the product one by one."""
    draw = torch.Generator().manual_seed(seed)
    like = torch.zeros(1, dtype=torch.float64)
    jacobians = torch.randn(length, 1, hidden, hidden, generator=draw, dtype=torch.float64) / hidden**0.5
    adjoints = torch.randn(length, 1, hidden, generator=draw, dtype=torch.float64)
    tree = CircularSegmentTree(length + 2, compose, identity(1, hidden, 1, like))
    pairs = list(zip(jacobians, adjoints, strict=True))
    for pair in pairs[:3] + pairs:  # the ring wraps around
        tree.append(Transition(None, None, *pair, hidden, 1))
    start = len(pairs[:3])
    found = tree.query(start, start + length)
    pieces = zip((found.jacobian, found.adjoint), oracles.ordered_product(pairs), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pieces)


def verdict(m: Combinations) -> Judgement:
    """Judge whether about log₂ n products (at most 2·log₂ n + 2) are enough at the first query, or only when shared."""
    first, second, mean = (all(c[i] <= 2 * math.log2(n) + 2 for n, c in m.counts.items()) for i in range(3))
    if first:
        return Judgement.holds()
    if second and mean:
        return Judgement.holds_when(
            "other reactivations share the inner products: then one takes the products counted here; the first query "
            "after n dormant steps that nothing else shared takes n − 1, once"
        )
    return Judgement.does_not_hold("even shared, a reactivation takes more than 2·log₂ n + 2 products")


def show(m: Combinations) -> Shown:
    """Show the three counts by length of dormancy."""
    n = 100 if 100 in m.counts else max(m.counts)
    first, second, mean = m.counts[n]
    names = ("first query", "inner nodes there", "mean, one reactivated per step")
    columns = {name: {n: count[i] for n, count in m.counts.items()} for i, name in enumerate(names)}
    log = {"log₂ n": {n: math.log2(n) for n in m.counts}}
    rows: list[list[Cell]] = []
    lines: dict[str, dict[int, int]] = {}
    for found in m.end_to_end:
        schedule, mixture = found.schedule, found.schedule.mixture
        before = f"active in the first {schedule.until}" if schedule.until else "never active before"
        name = f"{before}, window {schedule.window}"
        per_step = statistics.median(found.macs.values())
        size: list[Cell] = [
            f"{mixture.n_experts} experts, H = {mixture.hidden}",
            schedule.resumes,
            before,
            schedule.window,
        ]
        rows.append([*size, found.error, per_step, found.catch_up, found.one_by_one])
        lines[name] = found.macs
    worst = max((found.error for found in m.end_to_end), default=math.nan)
    columns_ = [
        "mixture", "reactivated at", "before", "window", "gradient error", "multiply-adds per step",
        "above that at the reactivation", "dormant steps one by one",
    ]  # fmt: skip
    return Shown(
        f"{n} dormant steps: {mean:.1f} products per reactivation where others share them, {second} with all inner "
        f"nodes there, {first} the first time; log₂ n = {math.log2(n):.1f}; an expert reactivated in a learner at step "
        f"{m.end_to_end[0].schedule.resumes if m.end_to_end else 0}: gradient error {worst:.1e}",
        [
            table("Products by length of dormancy", "n", {**columns, **log, "error against one by one": m.errors}),
            Table("End to end in a learner, block 1, float64, one seed", columns_, rows),
        ],
        [
            plot("Products to catch up", "dormant steps", "products", {**columns, **log}, dashed=log, log="xy"),
            plot("Multiply-adds around the reactivation", "step", "multiply-adds", lines),
        ],
        model=f"products over up to {max(m.counts):,} steps; in a learner: "
        + "; ".join(dict.fromkeys(str(row[0]) for row in rows))
        + "; one seed",
    )


@claim(
    "dormancy",
    claimed="a slice dormant for 100 steps is caught up by about log₂ n products",
    threshold="about log₂ n products",
    quick=Config(),
    full=Config(
        (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 3000, 10_000),
        5000,
        16,
        (
            *Config().end_to_end,
            Schedule(MIXTURE, until=0),
            Schedule(HAYSTACK),
            Schedule(MIXTURE, resumes=1000, steps=1024, window=1024),
        ),
    ),
    verdict=verdict,
    show=show,
    question="clock",
    void="the tree or the learner does not keep what it promises",
    small=Config((1, 10, 30), 40, 3, (Schedule(Mixture("small", 2, 2, 2, 4, 4), 2, 20, 28, 16),)),
    noticed_breaks=("no-reuse", "no-catch-up", "forget-dormant-losses", "reverse-products", "drop-expired"),
)
def measure(config: Config, settings: Settings) -> Combinations:
    """Count and compare."""
    m = Combinations(counts={}, errors={})
    for n in config.lengths:
        settings.progress(f"{n} dormant steps")
        first, second, mean, in_order = combinations(n, config.reactivations)
        m.counts[n] = first, second, mean
        if not in_order:
            m.failures.append(f"a query over {n} steps gave another string than the steps in order")
        if second > 2 * math.log2(n + n // 2 + 1) + 2:
            m.failures.append(f"a query over {n} steps takes {second} combinations, more than documented")
        if n <= 1000:
            m.errors[n] = product_error(n, config.hidden, settings.seed)
            if not m.errors[n] <= 1e-12:
                m.failures.append(f"the product of {n} transitions is off by {m.errors[n]:.1e}")
    for schedule in config.end_to_end:
        settings.progress(f"reactivated at step {schedule.resumes}, window {schedule.window}")
        found = reactivate(schedule, settings.seed)
        m.failures += found.differs
        m.end_to_end.append(found)
    return m
