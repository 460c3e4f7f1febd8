"""Reading and writing 128 of 1024 rows was said to take (1024/128)² = 64 × fewer operations, and 896 × with the tree.

**How it is measured.** One step of an influence of H = 1024 rows is taken with the full Jacobian and with the
row-sparse one that reads and writes two of sixteen slots of 64: the results are compared, multiply-adds counted, and
both timed in turns on one thread. For the tree, an expert of 16·H parameters (as config *flow* has them) sleeps for n
such steps; full Jacobians one by one stand against the learner's plan, compositions included, for n up to 10⁴. Counts
depend on the number of slots alone, so these are taken with slots of two, and the influences caught up are compared
with the oracle (n up to 300).

**Why that is fair.** 896 is 64 × 14, as if both savings multiplied. They compete: a product over many steps touches
every slot, and the sparser the steps, the less there is for it to save. Only what a run takes counts here.

**What it leaves open.** Linearising the step and what is born in it cost extra, about as much for every method; they
are in *per-step*.
"""

from dataclasses import dataclass
from functools import partial

import torch

from rtrl._influence.transition import Transition
from rtrl.profiling.timing import alternate, median_ratio
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.dormant_slice import Sleep, Sleeper, worst_error
from rtrl.verification.harness.problems import count, times
from rtrl.verification.harness.threads import one_thread

ROWS, TREE = 64.0, 896.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Slots, their width and how many are touched; columns of the influence that is moved; the sleeps, and k."""

    slots: int = 16
    width: int = 64
    touched: int = 2
    columns: int = 128
    sleeps: tuple[int, ...] = (10, 100, 1000)
    k: int = 16
    small: int = 2
    rounds: int = 7


QUICK = Sizes()
FULL = Sizes(columns=4096, sleeps=(1, 10, 30, 100, 300, 1000, 3000, 10_000), rounds=15)


def judge(rows: float, tree: dict[int, float]) -> tuple[Verdict, str]:
    """The verdict from the ratio of one step and, by length of sleep, that with the tree."""
    if rows < ROWS:
        return "does not hold", f"one step takes {times(rows)} fewer"
    reached = [n for n, value in sorted(tree.items()) if value >= TREE]
    hundred = f"at n = 100 it is {times(tree[100])}" if 100 in tree else ""
    if reached and reached[0] <= 100:
        return "holds", ""
    if reached:
        return "holds when", f"896 × needs a sleep of about {reached[0]} steps; {hundred}, since the savings compete"
    most = max(tree.values())
    return (
        "holds when",
        f"the 64 × of the rows are meant; with the tree it is at most {times(most)} up to n = {max(tree)}; {hundred}: "
        "the savings compete, they do not multiply",
    )


def _step(sizes: Sizes) -> tuple[Transition, Transition, torch.Tensor]:
    """The same step as full and as row-sparse Jacobian, and an influence."""
    sparse = Sleep(1, sizes.slots, sizes.width, sizes.touched).leaf(0)
    hidden = sizes.slots * sizes.width
    jacobian = torch.eye(hidden)
    assert sparse.rows is not None
    places = (sparse.rows[0, :, None] * sizes.width + torch.arange(sizes.width)).flatten()
    jacobian[places] = 0.0
    jacobian[places[:, None], places] = sparse.jacobian[0]
    full = Transition(None, None, jacobian[None], torch.zeros(1, hidden), sizes.slots, sizes.width)
    return full, sparse, torch.randn(1, hidden, sizes.columns)


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """One step and many; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    failures = []
    progress("one step", 0, len(sizes.sleeps) + 1)
    full, sparse, influence = _step(sizes)
    error = float((full.apply(influence) - sparse.apply(influence)).abs().max() / influence.abs().max())
    if not error <= 1e-5:
        failures.append(f"the row-sparse step is off by {error:.1e} in float32")
    full_macs, sparse_macs = (count(partial(step.apply, influence)) for step in (full, sparse))
    if sparse_macs != (sizes.touched * sizes.width) ** 2 * sizes.columns:
        failures.append(f"a row-sparse step took {sparse_macs} multiply-adds, not W·R·p")

    def go(step: Transition) -> int:
        step.apply(influence)
        return 1

    took = alternate({"full": lambda: go(full), "sparse": lambda: go(sparse)}, sizes.rounds)
    clock = median_ratio(took["full"], took["sparse"])

    tree: dict[int, float] = {}
    replay: dict[int, float] = {}
    for done, n in enumerate(sizes.sleeps):
        progress(f"a sleep of {n}", done + 1, len(sizes.sleeps) + 1)
        sleep = Sleep(n, sizes.slots, sizes.small, sizes.touched, sizes.k)
        if n <= 300:
            wrong = worst_error(Sleep(n, sizes.slots, sizes.small, sizes.touched, 2, torch.float64))
            if not wrong <= 1e-12:
                failures.append(f"a sleep of {n} steps is caught up with an error of {wrong:.1e}")
        dense = n * sleep.hidden**2 * sleep.k * sleep.hidden
        sleeper = Sleeper(sleep)
        tree[n] = dense / count(sleeper.planned)
        replay[n] = dense / (n * (sizes.touched * sizes.small) ** 2 * sleep.k * sleep.hidden)
    rows = full_macs / sparse_macs
    verdict, condition = judge(rows, tree)
    if failures:
        verdict, condition = "does not hold", "results differ, so the figures are void"
    told = 100 if 100 in tree else max(tree)
    at = [float(n) for n in tree]
    return Finding(
        f"{times(rows)} fewer multiply-adds a step ({times(clock)} less time); with the tree {times(tree[told])} at "
        f"n = {told}, {times(tree[max(tree)])} at n = {max(tree)}",
        "64 ×; 896 × with the tree",
        verdict,
        condition,
        failures,
        [
            Table(
                f"One step, H = {sizes.slots * sizes.width}, {sizes.columns} columns",
                ["Jacobian", "multiply-adds", "s"],
                [["full", full_macs, min(took["full"])], ["row-sparse", sparse_macs, min(took["sparse"])]],
            ),
            Table(
                "Full Jacobians one by one over …, multiply-adds",
                ["n", "row-sparse, one by one", "row-sparse with the tree"],
                [[n, replay[n], tree[n]] for n in tree],
            ),
        ],
        [
            Plot(
                "Fewer multiply-adds than full Jacobians one by one",
                "steps asleep",
                "ratio",
                [
                    Series("rows and tree", at, list(tree.values())),
                    Series("rows alone", at, list(replay.values())),
                    Series("claimed with the tree", at, [TREE] * len(at), dashed=True),
                ],
                log_x=True,
                log_y=True,
            )
        ],
        {"macs_ratio_rows": rows, "time_ratio_rows": clock, "macs_ratio_tree": {str(n): v for n, v in tree.items()}},
    )


CLAIM = Claim("read-write", "(1024/128)² = 64 × fewer operations; 896 × with the tree", measure)
