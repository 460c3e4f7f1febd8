"""Each sparsity, so it was claimed, can be switched off on its own.

**How it is measured.** A mixture (8 slots of 8, 32 experts, top-2, float64) runs over a drawn stream, and the learner
is run with everything on, with one thing off, and with all off: *reads* (every slot counts as read), *writes*,
*experts* (every slice of every parameter counts as active), *tree* (``lazy=False``: nobody sleeps), *blocks*
(``block=1``). Every run's gradients are compared with BPTT to 1e-10, and its multiply-adds counted with the delivery
of all gradients. A run that differs shuts the gate.

**Why that is fair.** What is switched off is what the cell declares, or an argument of the learner: the cell computes
the same throughout, its own choices written down once and laid down in every run, and over-declaring is documented to
be slow and right. With nothing off and with all off stand at the ends of the table.

**What it leaves open.** What each is worth depends on the model; it is one here, and no claim was made about it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from rtrl.verification.claim import Claim, Finding, Progress, Settings, Table, Verdict
from rtrl.verification.harness.problems import NOTHING, Mixture, Run, agree, count, lay_down, problem, times, unrolled
from rtrl.verification.harness.threads import one_thread


@dataclass(frozen=True, slots=True)
class Sizes:
    """The mixture, steps, and the learner's block and window."""

    mixture: Mixture = Mixture("toggles", 8, 4, 8, 8, 32)  # noqa: RUF009
    steps: int = 48
    block: int = 16
    window: int = 8


QUICK = Sizes()
FULL = Sizes(Mixture("toggles", 8, 4, 16, 8, 64), steps=512, block=32, window=16)


def variants(sizes: Sizes) -> dict[str, tuple[dict[str, bool], dict[str, Any]]]:
    """What is off → what the cell declares (the rest it does), and the options of the learner."""
    usual = {"block": sizes.block, "window": sizes.window}
    return {
        "nothing": ({}, usual),
        "reads": ({"reads": False}, usual),
        "writes": ({"writes": False}, usual),
        "experts": ({"experts": False}, usual),
        "tree": ({}, {**usual, "lazy": False}),
        "blocks": ({}, {**usual, "block": 1, "window": sizes.window * sizes.block}),
        "everything": (NOTHING, {"block": 1, "lazy": False}),
    }


def judge(errors: dict[str, float], failures: list[str]) -> tuple[Verdict, str]:
    """The verdict: every switch gives the same gradients."""
    if failures or not errors:
        return "does not hold", "; ".join(failures) or "nothing was compared"
    return "holds", ""


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """The table; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    failures: list[str] = []
    stream = problem(sizes.mixture, sizes.steps, settings.seed, torch.float64, settings.device)
    expected = unrolled(stream)
    laid = lay_down(stream)
    errors, macs, held = {}, {}, {}
    table = variants(sizes)
    for done, (name, (declared, options)) in enumerate(table.items()):
        progress(f"{name} off", done, len(table))
        run = Run(laid, {**declared, "laid": True}, **options)

        def whole(run: Run = run) -> None:
            run.advance(sizes.steps)
            run.deliver()

        macs[name] = count(whole) / sizes.steps
        held[name] = run.held_bytes()
        compared, wrong = agree(run.gradients(), expected, f"{name} off")
        failures += wrong
        errors[name] = compared.error
    verdict, condition = judge(errors, failures)
    usual = macs["nothing"]
    dearest = max((name for name in macs if name not in ("nothing", "everything")), key=lambda name: macs[name])
    return Finding(
        f"{len(table)} of {len(table)} settings give BPTT's gradient, error {max(errors.values()):.1e} at most; "
        f"without {dearest} {times(macs[dearest] / usual)} the cost, without all {times(macs['everything'] / usual)}"
        if not failures
        else f"{len(failures)} comparisons fail",
        "same gradients, to 1e-10",
        verdict,
        condition,
        failures,
        [
            Table(
                f"One thing off, {sizes.steps} steps, block {sizes.block}, window {sizes.window}",
                ["off", "gradient error", "multiply-adds a step", "over nothing off", "bytes held"],
                [[name, errors[name], macs[name], macs[name] / usual, held[name]] for name in table],
            )
        ],
        data={"macs": macs, "errors": errors},
    )


CLAIM = Claim("toggles", "each sparsity can be switched off on its own", measure)
