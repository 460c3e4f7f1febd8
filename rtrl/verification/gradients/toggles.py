"""Each sparsity, so it was claimed, can be switched off on its own. What is each worth?

**How it is measured.** The configurations of the other claims (*quick* and *haystack*; in the full form *speed* too).
A mixture runs over a drawn stream, and the learner is run with everything on, with one thing off, and with all off:
*reads* (every slot counts as read), *writes*, *experts* (every slice of every parameter counts as active), *tree*
(``lazy=False``: nothing is dormant), *blocks* (``block=1``). First the gradients of every setting are compared with
BPTT: in float64 to 1e-10 on a sibling with narrow slots, over three blocks, and in float32 roughly at the
configuration's own size. Then every setting takes one block's steps and delivers all gradients: multiply-adds are
counted as they are dispatched, and seconds are taken in turns, one thread; the median of the ratios of neighbours
stands beside the count. A switch that changes no count in any configuration is not a switch: the claim then does not
hold.

**Why that is fair.** What is switched off is what the cell declares, or an argument of the learner: the cell computes
the same throughout, its own choices recorded once and replayed in every run, and over-declaring is documented to be
slow and right. So a setting that costs less than "nothing off" is a finding: that sparsity costs more than it saves.

**What it leaves open.** The routers are not trained and the streams are drawn. What blocks save by the clock is mostly
what is launched, which a count of multiply-adds does not show. Config *flow* is in *per-step*.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from rtrl.profiling.timing import alternate, median_ratio, medians
from rtrl.report.model import Cell, Plot, Series, Table
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness import problems
from rtrl.verification.harness.measuring import count_macs, times
from rtrl.verification.harness.problems import (
    DECLARE_NOTHING,
    ROUGH,
    LearnerRun,
    Mixture,
    bptt_gradients,
    check_gradients,
    problem,
    record_routing,
)

SWITCHES = ("reads", "writes", "experts", "tree", "blocks")
CHANGED = 1e-3
"""The share by which a switch must change the counted cost, up or down, to count as one."""


@dataclass(frozen=True, slots=True)
class Config:
    """How much is run.

    Attributes:
        mixtures: the configurations.
        block: the learner's block.
        window: the learner's window.
        narrow: d_model of the sibling on which gradients are compared exactly.
        rounds: how many times each side is timed.
    """

    mixtures: tuple[Mixture, ...] = (problems.QUICK, problems.HAYSTACK)
    block: int = 4
    window: int = 8
    narrow: int = 4
    rounds: int = 1

    @property
    def variants(self) -> dict[str, tuple[dict[str, bool], dict[str, Any]]]:
        """What is off → what the cell does not declare, and the options of the learner."""
        usual = {"block": self.block, "window": self.window}
        return {
            "nothing": ({}, usual),
            "reads": ({"reads": False}, usual),
            "writes": ({"writes": False}, usual),
            "experts": ({"experts": False}, usual),
            "tree": ({}, {**usual, "lazy": False}),
            "blocks": ({}, {"block": 1, "window": self.window * self.block}),
            "everything": (DECLARE_NOTHING, {"block": 1, "lazy": False}),
        }


@dataclass(kw_only=True)
class Ablation:
    """One configuration: its P, and by what is off the exact gradient error, multiply-adds and seconds per step, and
    bytes held."""

    mixture: Mixture
    parameters: int
    errors: dict[str, float]
    macs: dict[str, float]
    seconds: dict[str, list[float]]
    held: dict[str, int]

    @property
    def counted(self) -> dict[str, float]:
        """Multiply-adds over those with nothing off."""
        return {name: macs / self.macs["nothing"] for name, macs in self.macs.items()}

    @property
    def clock(self) -> dict[str, float]:
        """Seconds over those with nothing off."""
        return {name: median_ratio(values, self.seconds["nothing"]) for name, values in self.seconds.items()}


@dataclass(kw_only=True)
class Variants(Measurements):
    """The ablation of every configuration."""

    config: Config
    ablations: list[Ablation]

    @property
    def idle(self) -> list[str]:
        """The switches that change the count in no configuration."""
        return [name for name in SWITCHES if all(abs(found.counted[name] - 1) < CHANGED for found in self.ablations)]


def verdict(m: Variants) -> Judgement:
    """Judge whether every setting gives the same gradients, and every switch changes what is counted."""
    if m.failures or not m.ablations:
        return Judgement.does_not_hold("; ".join(m.failures) or "nothing was compared")
    if m.idle:
        return Judgement.does_not_hold(f"switching off {' or '.join(m.idle)} changes no counted cost")
    return Judgement.holds()


def show(m: Variants) -> Shown:
    """Show what each switch costs, by count and by clock."""
    config, parts = m.config, []
    rows: list[list[Cell]] = []
    for found in m.ablations:
        counted, clock, seconds = found.counted, found.clock, medians(found.seconds)
        best = max(SWITCHES, key=lambda name: clock[name])
        parts.append(
            f"{found.mixture.name}: without {best} {times(clock[best])} the time ({times(counted[best])} the count), "
            f"without all {times(clock['everything'])} ({times(counted['everything'])})"
        )
        size: list[Cell] = [found.mixture.name, found.parameters, found.mixture.hidden]
        rows += [
            [*size, name, found.errors[name], macs, counted[name], seconds[name], clock[name], found.held[name]]
            for name, macs in found.macs.items()
        ]
    columns = [
        "config", "P", "H", "off", "gradient error", "multiply-adds per step", "count over nothing off",
        "s per step", "time over nothing off", "bytes held",
    ]  # fmt: skip
    title = (
        f"One thing off: block {config.block}, window {config.window}, one sample, float32, one thread, gradients "
        f"delivered every {config.block} steps (gradient error: float64, slots of {config.narrow})"
    )
    names = list(config.variants)
    series = [
        Series(f"{found.mixture.name}, {what}", list(range(len(names))), [ratios[name] for name in names])
        for found in m.ablations
        for what, ratios in (("multiply-adds", found.counted), ("time", found.clock))
    ]
    heading = "Cost with one thing off, over that with nothing off"
    return Shown(
        f"{len(m.failures)} comparisons fail" if m.failures else "; ".join(parts),
        [Table(title, columns, rows)],
        [Plot(heading, "what is off", "ratio", series, kind="points", log_y=True, x_names=names)],
        headline="Without blocks the same gradients take "
        + " and ".join(f"{times(a.clock['blocks'])} the time (config {a.mixture.name})" for a in m.ablations),
        model="; ".join(f"{a.mixture.name}: H = {a.mixture.hidden}, P = {a.parameters:,}" for a in m.ablations)
        + f"; {2 * config.block} steps, one seed, one thread",
    )


@claim(
    "toggles",
    claimed="each sparsity can be switched off on its own",
    threshold="same gradients, to 1e-10; every switch changes the counted cost",
    quick=Config(),
    full=Config((problems.QUICK, problems.HAYSTACK, problems.SPEED), block=8, narrow=8, rounds=2),
    verdict=verdict,
    show=show,
    question="clock",
    small=Config((Mixture("small", 2, 2, 4, 4, 6),), 2, 2),
    noticed_breaks=(
        "eager",
        "ignore-reads",
        "ignore-writes",
        "ignore-experts",
        "step-by-step",
        "truncate",
        "forget-dormant-losses",
    ),
)
def measure(config: Config, settings: Settings) -> Variants:
    """Run every variant in every configuration, and compare its gradients."""
    m = Variants(config=config, ablations=[])
    for mixture in config.mixtures:
        settings.progress(f"config {mixture.name}, gradients")
        errors, failures = _compare(replace(mixture, d_model=config.narrow), config, settings.seed)
        m.failures += failures
        ablation, failures = _cost(mixture, config, settings, errors)
        m.failures += failures
        m.ablations.append(ablation)
    return m


def _compare(narrow: Mixture, config: Config, seed: int) -> tuple[dict[str, float], list[str]]:
    """Return the error of every variant against BPTT in float64, and what differs."""
    stream = problem(narrow, 3 * config.block, seed, torch.float64)
    expected, recorded = bptt_gradients(stream), record_routing(stream)
    errors, failures = {}, []
    for name, (declared, options) in config.variants.items():
        run = LearnerRun(recorded, {**declared, "recorded": True}, **options)
        run.advance(3 * config.block)
        run.sync()
        compared, failed = check_gradients(run.gradients(), expected, f"{narrow.name}, {name} off")
        errors[name] = compared.error
        failures += failed
    return errors, failures


def _cost(
    mixture: Mixture, config: Config, settings: Settings, errors: Mapping[str, float]
) -> tuple[Ablation, list[str]]:
    """Count and time every variant at the configuration's own size."""
    stream = problem(mixture, 2 * config.block, settings.seed, device=settings.device)
    expected, recorded = bptt_gradients(stream), record_routing(stream)
    macs, held, failures = {}, {}, []
    runs: dict[str, LearnerRun] = {}
    for name, (declared, options) in config.variants.items():
        settings.progress(f"config {mixture.name}, {name} off")
        run = runs[name] = LearnerRun(recorded, {**declared, "recorded": True}, **options)

        def whole(run: LearnerRun = run) -> int:
            run.advance(config.block)
            run.sync()
            return config.block

        whole()  # with a first block behind it, there is influence to move
        macs[name] = count_macs(whole) / config.block
        held[name] = run.held_bytes()
        failures += check_gradients(run.gradients(), expected, f"{mixture.name}, {name} off, float32", ROUGH)[1]
    settings.progress(f"config {mixture.name}, timing")

    def side(run: LearnerRun) -> int:
        run.advance(config.block)
        run.sync()
        return config.block

    sides = {name: (lambda run=run: side(run)) for name, run in runs.items()}
    seconds = alternate(sides, config.rounds, settings.device)
    found = Ablation(
        mixture=mixture, parameters=stream.parameters, errors=dict(errors), macs=macs, seconds=seconds, held=held
    )
    return found, failures
