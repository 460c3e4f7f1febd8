"""Each sparsity, so it was claimed, can be switched off on its own.

**How it is measured.** A mixture (8 slots of 8, 32 experts, top-2, float64) runs over a drawn stream, and the learner
is run with everything on, with one thing off, and with all off: *reads* (every slot counts as read), *writes*,
*experts* (every slice of every parameter counts as active), *tree* (``lazy=False``: nothing is dormant), *blocks*
(``block=1``). Every run's gradients are compared with BPTT to 1e-10, and its multiply-adds counted with the delivery
of all gradients. If the gradients of a run differ, the check fails.

**Why that is fair.** What is switched off is what the cell declares, or an argument of the learner: the cell computes
the same throughout, its own choices recorded once and replayed in every run, and over-declaring is documented to be
slow and right. With nothing off and with all off stand at the ends of the table.

**What it leaves open.** What each is worth depends on the model; it is one here, and no claim was made about it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.measuring import count_macs, times
from rtrl.verification.harness.problems import (
    DECLARE_NOTHING,
    LearnerRun,
    Mixture,
    bptt_gradients,
    check_gradients,
    problem,
    record_routing,
)
from rtrl.verification.show import table


@dataclass(frozen=True, slots=True)
class Config:
    """The mixture, steps, and the learner's block and window."""

    mixture: Mixture = Mixture("toggles", 8, 4, 8, 8, 32)  # noqa: RUF009
    steps: int = 48
    block: int = 16
    window: int = 8

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
            "blocks": ({}, {**usual, "block": 1, "window": self.window * self.block}),
            "everything": (DECLARE_NOTHING, {"block": 1, "lazy": False}),
        }


@dataclass(kw_only=True)
class Variants(Measurements):
    """By what is off: the gradient error, multiply-adds per step, and bytes held."""

    config: Config
    errors: dict[str, float]
    macs: dict[str, float]
    held: dict[str, int]


def verdict(m: Variants) -> Judgement:
    """Judge whether every switch gives the same gradients."""
    if m.failures or not m.errors:
        return Judgement.does_not_hold("; ".join(m.failures) or "nothing was compared")
    return Judgement.holds()


def show(m: Variants) -> Shown:
    """Show what each switch costs."""
    config, n = m.config, len(m.errors)
    ratios = {name: macs / m.macs["nothing"] for name, macs in m.macs.items()}
    dearest = max((name for name in ratios if name not in ("nothing", "everything")), key=lambda name: ratios[name])
    result = (
        f"{n} of {n} settings give BPTT's gradient, error {max(m.errors.values()):.1e} at most; without {dearest} "
        f"{times(ratios[dearest])} the cost, without all {times(ratios['everything'])}"
    )
    columns = {
        "gradient error": m.errors, "multiply-adds per step": m.macs, "over nothing off": ratios, "bytes held": m.held,
    }  # fmt: skip
    title = f"One thing off, {config.steps} steps, block {config.block}, window {config.window}"
    return Shown(f"{len(m.failures)} comparisons fail" if m.failures else result, [table(title, "off", columns)])


@claim(
    "toggles",
    claimed="each sparsity can be switched off on its own",
    threshold="same gradients, to 1e-10",
    quick=Config(),
    full=Config(Mixture("toggles", 8, 4, 16, 8, 64), steps=512, block=32, window=16),
    verdict=verdict,
    show=show,
)
def measure(config: Config, settings: Settings) -> Variants:
    """Run every variant, and compare its gradients."""
    stream = problem(config.mixture, config.steps, settings.seed, torch.float64, settings.device)
    expected = bptt_gradients(stream)
    recorded = record_routing(stream)
    m = Variants(config=config, errors={}, macs={}, held={})
    for name, (declared, options) in config.variants.items():
        settings.progress(f"{name} off")
        run = LearnerRun(recorded, {**declared, "recorded": True}, **options)

        def whole(run: LearnerRun = run) -> None:
            run.advance(config.steps)
            run.sync()

        m.macs[name] = count_macs(whole) / config.steps
        m.held[name] = run.held_bytes()
        compared, failed = check_gradients(run.gradients(), expected, f"{name} off")
        m.failures += failed
        m.errors[name] = compared.error
    return m
