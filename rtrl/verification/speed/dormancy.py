"""A slice dormant for 100 steps was said to be caught up by about log₂ n products.

**How it is measured.** The segment tree that the learner uses, over a monoid that counts its combinations. For
dormancies of n = 1 … 1000 steps, three numbers: combinations when the tree is queried for the first time; when every
inner node is there already; and, step by step over a long stream in which something that was dormant for n steps is
reactivated at every step (as in a mixture with n/2 experts, top-2), the mean per reactivation. The result of every
query is compared with the product taken one by one: exactly over strings, where any error of order shows, and in
float64 to 1e-12 over the learner's own transitions of Jacobians.

**Why that is fair.** A first query must touch each of n elements, so that n − 1 combinations are the least that any
method can do; what the tree promises is that other reactivations then share them. Which of the three numbers is “the”
cost depends on what else is reactivated, so all are reported.

**What it leaves open.** Combinations are counted, not their price: a combined product may be dense where its factors
are sparse (see *catch-up*).
"""

import math
from dataclasses import dataclass

import torch

import oracles
from rtrl._influence.segment_tree import CircularSegmentTree
from rtrl._influence.transition import Transition, compose, identity
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.show import plot, table


@dataclass(frozen=True, slots=True)
class Config:
    """The lengths of dormancy, how many reactivations of each are averaged, and H of the product that is compared."""

    lengths: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    reactivations: int = 300
    hidden: int = 6


@dataclass(kw_only=True)
class Combinations(Measurements):
    """Length → combinations of the first query, of a second one, and the mean in a stream; length → relative error."""

    counts: dict[int, tuple[int, int, float]]
    errors: dict[int, float]


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
    return Shown(
        f"{n} dormant steps: {mean:.1f} products per reactivation where others share them, {second} with all inner "
        f"nodes there, {first} the first time; log₂ n = {math.log2(n):.1f}",
        [table("Products by length of dormancy", "n", {**columns, **log, "error against one by one": m.errors})],
        [plot("Products to catch up", "dormant steps", "products", {**columns, **log}, dashed=log, log="xy")],
    )


@claim(
    "dormancy",
    claimed="a slice dormant for 100 steps is caught up by about log₂ n products",
    threshold="about log₂ n products",
    quick=Config(),
    full=Config((1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 3000, 10_000), reactivations=5000, hidden=16),
    verdict=verdict,
    show=show,
    void="the tree does not keep what it promises",
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
    return m
