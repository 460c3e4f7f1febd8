"""Catching up was said to be 14 × cheaper after 100 dormant steps and 20 × after 1000, at H = 1024.

**How it is measured.** An expert of 32·H parameters has slept for n steps. It is caught up step by step, by one
product over the whole sleep (its composition included), and by the learner's plan, which chooses node by node between
the two. The influences of all three are compared with full Jacobians applied one by one by the oracle (float64,
1e-12, n up to 300), then multiply-adds are counted as they are dispatched; that ratio does not depend on H, so it is
counted at a small one, and times are taken in turns, one thread, at the largest H that this form has time and memory
for. Twice: over dense steps, and over steps that touch two of sixteen slots, as config *flow* has them.

**Why that is fair.** The tree begins with nothing composed, so that every product is paid for here; in a stream,
others that wake share them. Step by step means the sparse step where the step is sparse: that is what one would do
without a tree. No composed product can save more than a factor n·k / (n − 1 + k), k·H being the parameters, so that
20 × needs k > 20.

**What it leaves open.** Experts with fewer parameters than 14·H or 20·H cannot reach these ratios at all; those of
config *flow* have 16·H.
"""

from dataclasses import dataclass, replace

import torch

from rtrl._influence.history import History
from rtrl.profiling.timing import alternate, median_ratio
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.dormant_slice import Counted, Sleep, Sleeper, counted, worst_error
from rtrl.verification.harness.problems import times
from rtrl.verification.harness.threads import one_thread

CLAIMED = {100: 14.0, 1000: 20.0}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sleeps counted, and at which H each claimed one is timed; k of the experts."""

    sleeps: tuple[int, ...] = (10, 100, 1000)
    timed: tuple[tuple[int, int], ...] = ((100, 128), (1000, 32))
    k: int = 32
    width: int = 2
    rounds: int = 3


QUICK = Sizes()
FULL = Sizes(sleeps=(3, 10, 30, 100, 300, 1000, 3000), timed=((100, 1024), (1000, 256)))


def judge(dense: dict[int, float], sparse: dict[int, float], claimed: dict[int, float]) -> tuple[Verdict, str]:
    """The verdict from the ratios step by step : plan, over dense and over sparse steps."""

    def reached(found: dict[int, float]) -> bool:
        return all(found[n] >= least for n, least in claimed.items() if n in found)

    told = ", ".join(f"{times(value)} at n = {n}" for n, value in sparse.items() if n in claimed)
    if reached(dense) and reached(sparse):
        return "holds", ""
    if reached(dense):
        return (
            "holds when",
            f"the steps are dense and the expert has more than about 20·H parameters; over steps that touch two of "
            f"sixteen slots, replaying them is cheap already, and the plan saves {told}",
        )
    return "does not hold", ", ".join(f"{times(value)} at n = {n}" for n, value in dense.items() if n in claimed)


def timed(sleep: Sleep, rounds: int, few: int = 5) -> float:
    """Seconds of step by step over those of the plan; step by step, ``few`` steps are timed, as each takes the same.

    Copying the influence and putting the leaves back, which each round needs, are timed apart and taken off.
    """
    kept = Sleeper(sleep)
    first, leaves = torch.zeros(1, sleep.slots, sleep.width), kept.history.state_dict()

    def fresh() -> History:
        return History.from_state_dict(leaves, first)

    def plan() -> int:
        kept.history = fresh()
        kept.planned()
        return 1

    def restore() -> int:
        fresh()
        return 1

    def replay() -> int:
        kept.one_by_one(few)
        return few

    def copy() -> int:
        kept.one_by_one(0)
        return 1

    took = alternate({"plan": plan, "restore": restore, "replay": replay, "copy": copy}, rounds)
    copies = took["copy"]
    planned = [max(a - b - c, 1e-9) for a, b, c in zip(took["plan"], took["restore"], copies, strict=True)]
    replayed = [sleep.n * max(a - c / few, 1e-9) for a, c in zip(took["replay"], copies, strict=True)]
    return median_ratio(replayed, planned)


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """Ratios over dense and sparse steps; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    failures = []
    kinds = {"dense": Sleep(0, 8, 1, 8, sizes.k), "sparse": Sleep(0, 16, sizes.width, 2, sizes.k)}
    macs: dict[str, dict[int, Counted]] = {kind: {} for kind in kinds}
    pieces = len(sizes.sleeps) + len(sizes.timed)
    for done, n in enumerate(sizes.sleeps):
        progress(f"a sleep of {n}", done, pieces)
        for kind, sleep in kinds.items():
            error = worst_error(replace(sleep, n=n, k=4, dtype=torch.float64)) if n <= 300 else 0.0
            if not error <= 1e-12:
                failures.append(f"a sleep of {n} {kind} steps is caught up with an error of {error:.1e}")
            macs[kind][n] = counted(replace(sleep, n=n))
            if macs[kind][n].planned > macs[kind][n].one_by_one:
                failures.append(f"the plan for {n} {kind} steps costs more than replaying them")
    seconds: dict[tuple[str, int], tuple[float, int]] = {}
    for done, (n, hidden) in enumerate(sizes.timed):
        progress(f"timing {n} steps", len(sizes.sleeps) + done, pieces)
        for kind, shape in (("dense", (hidden, 1, hidden)), ("sparse", (16, hidden // 16, 2))):
            sleep = Sleep(n, *shape, sizes.k)
            seconds[kind, n] = timed(sleep, sizes.rounds), hidden

    saved = {kind: {n: c.one_by_one / c.planned for n, c in found.items()} for kind, found in macs.items()}
    losing = [n for n, c in macs["sparse"].items() if c.composed > c.one_by_one]
    verdict, condition = judge(saved["dense"], saved["sparse"], CLAIMED)
    if losing:
        condition += (
            f"; one log-depth product over sparse steps loses to replaying them for sleeps up to {max(losing)} "
            f"({times(macs['sparse'][max(losing)].composed / macs['sparse'][max(losing)].one_by_one)} the cost there)"
        )
    if failures:
        verdict, condition = "does not hold", "what is caught up is wrong, so the figures are void"
    told = [n for n in CLAIMED if n in saved["dense"]] or list(saved["dense"])[-1:]
    clock = {kind: {n: value for (k, n), (value, _) in seconds.items() if k == kind} for kind in kinds}
    at = [float(n) for n in sizes.sleeps]
    rows: list[list[str | int | float | None]] = [
        [
            kind,
            n,
            c.one_by_one,
            c.composed,
            c.planned,
            c.one_by_one / c.planned,
            clock[kind].get(n),
            seconds[kind, n][1] if (kind, n) in seconds else None,
        ]
        for kind, found in macs.items()
        for n, c in found.items()
    ]
    return Finding(
        ", ".join(
            f"{times(saved['dense'][n])} at {n} dense steps"
            + (f" ({times(clock['dense'][n])} in time)" if n in clock["dense"] else "")
            + f", {times(saved['sparse'][n])} at {n} sparse"
            for n in told
        ),
        "≥ 14 × at 100, ≥ 20 × at 1000",
        verdict,
        condition,
        failures,
        [
            Table(
                f"Multiply-adds to catch up {sizes.k}·H parameters (H = {kinds['dense'].hidden} dense, "
                f"{kinds['sparse'].hidden} sparse), and times",
                ["steps", "n", "one by one", "one product", "plan", "one by one / plan", "the same in time", "H timed"],
                rows,
            )
        ],
        [
            Plot(
                "What the tree saves against step by step",
                "steps asleep",
                "multiply-adds of one by one over those of the plan",
                [
                    Series("dense steps", at, list(saved["dense"].values())),
                    Series("sparse steps", at, list(saved["sparse"].values())),
                    Series("most that a product can save", at, [n * sizes.k / (n - 1 + sizes.k) for n in at], True),
                ],
                log_x=True,
                log_y=True,
            )
        ],
        {"macs_ratio": {k: {str(n): v for n, v in found.items()} for k, found in saved.items()}},
    )


CLAIM = Claim("catch-up", "14 × cheaper at 100 dormant steps, 20 × at 1000 (H = 1024)", measure)
