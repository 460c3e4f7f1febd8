"""A slice asleep for 100 steps was said to be caught up by about log₂ n products.

**How it is measured.** The segment tree that the learner uses, over a monoid that counts its combinations. For sleeps
of n = 1 … 1000 steps, three numbers: combinations when the tree is asked for the first time; when every inner node is
there already; and, step by step over a long stream in which something that has slept for n steps wakes at every step
(as in a mixture with n/2 experts, top-2), the mean for each wake-up. The result of every query is compared with the
product taken one by one: exactly over strings, where any error of order shows, and in float64 to 1e-12 over the
learner's own transitions of Jacobians.

**Why that is fair.** A first query must touch each of n elements, so that n − 1 combinations are the least that any
method can do; what the tree promises is that others who wake then share them. Which of the three numbers is “the”
cost depends on who else wakes, so all are told.

**What it leaves open.** Combinations are counted, not their price: a combined product may be dense where its factors
are sparse (see *catch-up*).
"""

import math
from dataclasses import dataclass

import torch

import oracles
from rtrl._influence.segment_tree import CircularSegmentTree
from rtrl._influence.transition import Transition, compose, identity
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.threads import one_thread


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sleeps, how many wake-ups of each are averaged, and H of the product that is compared."""

    sleeps: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    wakes: int = 300
    hidden: int = 6


QUICK = Sizes()
FULL = Sizes(sleeps=(1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 3000, 10_000), wakes=5000, hidden=16)


class Counting:
    """A tree over strings of step numbers, as tuples; counts how many combinations it makes."""

    def __init__(self, capacity: int) -> None:
        self.made = 0
        self.tree: CircularSegmentTree[tuple[int, ...]] = CircularSegmentTree(capacity, self._combine, ())

    def _combine(self, earlier: tuple[int, ...], later: tuple[int, ...]) -> tuple[int, ...]:
        self.made += 1
        return earlier + later

    def ask(self, start: int, stop: int) -> tuple[int, bool]:
        """Combinations of a query, and whether its result is in order."""
        before = self.made
        right = self.tree.query(start, stop) == tuple(range(start, stop))
        return self.made - before, right


def combinations(sleep: int, wakes: int) -> tuple[int, int, float, bool]:
    """Combinations of the first query, of a second one, and the mean in a stream; whether all results were right.

    The ring is half again as long as the sleep and has wrapped around, so that queries cross its end.
    """
    capacity = sleep + sleep // 2 + 1
    counting = Counting(capacity)
    for step in range(capacity + sleep):
        counting.tree.append((step,))
    stop = capacity + sleep
    first, right = counting.ask(stop - sleep, stop)
    second, again = counting.ask(stop - sleep, stop)
    before, good = counting.made, right and again
    for step in range(stop, stop + wakes):
        counting.tree.append((step,))
        good &= counting.ask(step + 1 - sleep, step + 1)[1]
    return first, second, (counting.made - before) / wakes, good


def product_error(sleep: int, hidden: int, seed: int) -> float:
    """The largest relative error of the tree's product of transitions against the product one by one."""
    draw = torch.Generator().manual_seed(seed)
    like = torch.zeros(1, dtype=torch.float64)
    jacobians = torch.randn(sleep, 1, hidden, hidden, generator=draw, dtype=torch.float64) / hidden**0.5
    adjoints = torch.randn(sleep, 1, hidden, generator=draw, dtype=torch.float64)
    tree = CircularSegmentTree(sleep + 2, compose, identity(1, hidden, 1, like))
    pairs = list(zip(jacobians, adjoints, strict=True))
    for pair in pairs[:3] + pairs:  # the ring wraps around
        tree.append(Transition(None, None, *pair, hidden, 1))
    start = len(pairs[:3])
    found = tree.query(start, start + sleep)
    phi, owed = oracles.ordered_product(pairs)
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
        for a, b in ((found.jacobian, phi), (found.adjoint, owed))
    ]
    return max(errors)


def judge(counts: dict[int, tuple[int, int, float]]) -> tuple[Verdict, str]:
    """The verdict: about log₂ n, that is at most 2·log₂ n + 2 products, from the first query, or only when shared."""

    def within(place: int) -> bool:
        return all(count[place] <= 2 * math.log2(n) + 2 for n, count in counts.items())

    if within(0):
        return "holds", ""
    if within(1) and within(2):
        return (
            "holds when",
            "others that wake share the inner products: then a wake-up takes the products counted here; the first "
            "query after a sleep of n steps that nobody shared takes n − 1, once",
        )
    return "does not hold", "even shared, a wake-up takes more than 2·log₂ n + 2 products"


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """Count and compare; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    failures, counts, errors = [], {}, {}
    for done, sleep in enumerate(sizes.sleeps):
        progress(f"a sleep of {sleep}", done, len(sizes.sleeps))
        first, second, mean, right = combinations(sleep, sizes.wakes)
        counts[sleep] = (first, second, mean)
        if not right:
            failures.append(f"a query over {sleep} steps gave another string than the steps in order")
        if second > 2 * math.log2(sleep + sleep // 2 + 1) + 2:
            failures.append(f"a query over {sleep} steps takes {second} combinations, more than documented")
        if sleep <= 1000:
            errors[sleep] = product_error(sleep, sizes.hidden, settings.seed)
            if not errors[sleep] <= 1e-12:
                failures.append(f"the product of {sleep} transitions is off by {errors[sleep]:.1e}")
    verdict, condition = judge(counts)
    if failures:
        verdict, condition = "does not hold", "the tree does not keep what it promises"
    told = 100 if 100 in counts else max(counts)
    at = [float(n) for n in counts]
    return Finding(
        f"a sleep of {told}: {counts[told][2]:.1f} products a wake-up where others share them, {counts[told][1]} with "
        f"all inner nodes there, {counts[told][0]} the first time; log₂ n = {math.log2(told):.1f}",
        "about log₂ n products",
        verdict,
        condition,
        failures,
        [
            Table(
                "Products by length of sleep",
                [
                    "n",
                    "first query",
                    "inner nodes there",
                    "mean, one wakes every step",
                    "log₂ n",
                    "error against one by one",
                ],
                [[n, *count, math.log2(n), errors.get(n)] for n, count in counts.items()],
            )
        ],
        [
            Plot(
                "Products to catch up a sleep",
                "steps asleep",
                "products",
                [
                    Series("first query", at, [float(count[0]) for count in counts.values()]),
                    Series("inner nodes there", at, [float(count[1]) for count in counts.values()]),
                    Series("one wakes every step, mean", at, [count[2] for count in counts.values()]),
                    Series("log₂ n", at, [math.log2(n) for n in counts], dashed=True),
                ],
                log_x=True,
                log_y=True,
            )
        ],
        {"combinations": {str(n): list(count) for n, count in counts.items()}},
    )


CLAIM = Claim("dormancy", "a slice asleep for 100 steps is caught up by about log₂ n products", measure)
