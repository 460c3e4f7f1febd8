"""How much cheaper sparse updates are than full ones: what the claims about speed share."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from rtrl.profiling.timing import alternate, median_ratio
from rtrl.verification.claim import Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.problems import (
    NOTHING,
    ROUGH,
    Mixture,
    Run,
    agree,
    count,
    problem,
    times,
    unrolled,
)
from rtrl.verification.harness.threads import one_thread

SIDES: dict[str, tuple[dict[str, Any], dict[str, bool] | None]] = {
    "sparse": ({}, None),
    "lazy=False": ({"lazy": False}, None),
    "full": ({}, NOTHING),
}
"""Side → (options of the learner besides block and window, what the cell declares: None for all that it touches)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run.

    Attributes:
        mixture: the configuration. steps, window: of the counted stream.
        small: d_model of the sibling on which gradients are compared exactly, and the number of experts varied.
        chunk, rounds: steps a round of what is timed (full updates take one), and rounds.
        experts, sleep_steps: numbers of experts over which lazy is compared with lazy=False, and for how many steps.
    """

    mixture: Mixture
    steps: int
    window: int = 32
    small: int = 8
    chunk: int = 8
    rounds: int = 3
    experts: tuple[int, ...] = (16, 64, 128)
    sleep_steps: int = 96


def judge(full: float, lazy: float, claimed: float, sweep: dict[int, float], time: float) -> tuple[Verdict, str]:
    """The verdict from counted ratios.

    Args:
        full: full updates over sparse ones. lazy: lazy=False over lazy=True. claimed: the ratio that was claimed.
        sweep: number of experts → the second ratio. time: full updates over sparse ones, by the clock.
    """
    slow = f"; by the clock even full RTRL is only {times(time)}, since little is computed and much launched"
    clock = slow if time < claimed else ""
    if full < claimed:
        return "does not hold", f"even against full RTRL over all parameters it is {times(full)}"
    if lazy >= claimed:
        return ("holds when", f"multiply-adds are counted{clock}") if clock else ("holds", "")
    reached = [n for n, value in sorted(sweep.items()) if value >= claimed]
    more = (
        f"reached from {reached[0]} experts on (counted at a small d_model)"
        if reached
        else f"not reached up to {max(sweep)} experts either ({times(max(sweep.values()))} at most)"
        if sweep
        else "not reached"
    )
    return (
        "holds when",
        f"“full updates” means full RTRL, every parameter through the full Jacobian; of the ratio, sleep alone "
        f"(lazy=False, the same sparse Jacobians) gives {times(lazy)}, and there {times(claimed)} is {more}{clock}",
    )


def measure(sizes: Sizes, claimed: float, settings: Settings, progress: Progress) -> Finding:
    """Compare, count and time the sides."""
    with one_thread():
        return _measure(sizes, claimed, settings, progress)


def _measure(sizes: Sizes, claimed: float, settings: Settings, progress: Progress) -> Finding:
    failures: list[str] = []
    progress("gradients of all sides", 0, 4)
    sibling = problem(replace(sizes.mixture, d_model=sizes.small), sizes.steps, settings.seed, torch.float64)
    expected = unrolled(sibling)
    worst = 0.0
    for name, (options, told) in SIDES.items():
        side = Run(sibling, told, block=1, window=sizes.window, **options)
        side.advance(sizes.steps)
        side.deliver()
        compared, wrong = agree(side.gradients(), expected, f"{name}, float64")
        failures += wrong
        worst = max(worst, compared.error)

    progress("counting", 1, 4)
    stream = problem(sizes.mixture, sizes.steps, settings.seed, device=settings.device)
    rough = unrolled(stream)
    counted: dict[str, float] = {}
    counting = {"sparse": 1, "lazy=False": 1} | ({"sparse, blocks of 16": 16} if settings.full else {})
    for name, block in counting.items():
        options, told = SIDES[name.split(",")[0]]
        side = Run(stream, told, block=block, window=sizes.window, **options)

        def whole(side: Run = side) -> None:
            side.advance(sizes.steps)
            side.deliver()

        counted[name] = count(whole) / sizes.steps
        failures += agree(side.gradients(), rough, f"{name}, float32", ROUGH)[1]
    brief = stream.first(3)
    full = Run(brief, NOTHING, block=1)
    full.advance(2)  # the first step has no influence to move; a block closes at the next step
    counted["full"] = count(lambda: full.advance(1))
    full.deliver()
    failures += agree(full.gradients(), unrolled(brief), "full, float32", ROUGH)[1]
    least = sizes.mixture.hidden**2 * stream.parameters
    if not least <= counted["full"] <= 1.5 * least:
        failures.append(f"full updates took {counted['full']:.3g} multiply-adds a step, H²·P is {least:.3g}")

    progress("timing", 2, 4)
    sides = {}
    for name, (options, told) in SIDES.items():
        run = full if name == "full" else Run(stream, told, block=1, window=sizes.window, **options)
        steps = 1 if name == "full" else sizes.chunk
        sides[name] = partial(run.advance, steps)
    seconds = alternate(sides, sizes.rounds, settings.device)

    progress("more experts", 3, 4)
    sweep = {}
    for experts in sizes.experts:
        crowd = problem(
            replace(sizes.mixture, d_model=sizes.small, n_experts=experts), sizes.sleep_steps, settings.seed
        )
        pair = []
        for name in ("lazy=False", "sparse"):
            side = Run(crowd, block=1, window=sizes.sleep_steps, **SIDES[name][0])
            side.advance(sizes.sleep_steps // 3)
            pair.append(count(partial(side.advance, sizes.sleep_steps * 2 // 3)))
        sweep[experts] = pair[0] / pair[1]

    by_full, by_lazy = counted["full"] / counted["sparse"], counted["lazy=False"] / counted["sparse"]
    timed = {name: median_ratio(seconds[name], seconds["sparse"]) for name in ("full", "lazy=False")}
    verdict, condition = judge(by_full, by_lazy, claimed, sweep, timed["full"])
    if failures:
        verdict, condition = "does not hold", "gradients differ, so the figures are void"
    rows: list[list[str | int | float | None]] = []
    for name, macs in counted.items():
        s = sorted(seconds[name])[len(seconds[name]) // 2] if name in seconds else None
        rows.append([name, macs, macs / counted["sparse"], s, timed.get(name)])
    return Finding(
        f"{times(by_full)} fewer multiply-adds than full RTRL ({times(timed['full'])} less time), "
        f"{times(by_lazy)} than lazy=False alone ({times(timed['lazy=False'])})",
        f"≥ {claimed} ×",
        verdict,
        condition,
        failures,
        [
            Table(
                f"Config {sizes.mixture.name}, {sizes.steps} steps, block 1, float32, one thread",
                ["side", "multiply-adds a step", "over sparse", "s a step", "time over sparse"],
                rows,
            ),
            Table(
                f"lazy=False over lazy=True, multiply-adds, d_model {sizes.small}",
                ["experts", "ratio"],
                [[n, value] for n, value in sweep.items()],
            ),
        ],
        [
            Plot(
                "What sleep alone saves",
                "experts",
                "multiply-adds of lazy=False over lazy=True",
                [
                    Series("counted", [float(n) for n in sweep], list(sweep.values())),
                    Series("claimed", [float(n) for n in sweep], [claimed] * len(sweep), dashed=True),
                ],
                log_x=True,
            )
        ],
        {
            "macs_ratio_full": by_full, "macs_ratio_lazy": by_lazy, "time_ratio_full": timed["full"],
            "time_ratio_lazy": timed["lazy=False"], "gradient_error": worst, "macs": counted,
        },
    )  # fmt: skip
