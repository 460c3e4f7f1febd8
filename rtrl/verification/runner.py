"""Measure claims: one thread, seeded random numbers, the time taken, and errors that end one claim and not the run."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rtrl.report.model import Finding
from rtrl.verification.breaks import planted
from rtrl.verification.claim import Claim, Measurements, NotMeasured, Settings

Report = Callable[[str, int], None]
"""Called before every piece of work with its name, and how many claims are done."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a claim came to, how long that took, and what was measured (None if nothing was)."""

    claim: Claim[Any, Any]
    finding: Finding
    duration_s: float
    measurements: Measurements | None = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread. For small tensors a second one makes times scatter: at every barrier the first waits for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_one(
    claim: Claim[Any, Any], settings: Settings, config: Any = None, *, broken: str | None = None
) -> Outcome:
    """Measure one claim, with one thread and seeded random numbers.

    Args:
        claim: the claim.
        settings: how it is measured.
        config: how much is measured; None for the claim's own form by the settings.
        broken: the name of a break that is planted meanwhile; None for none.

    Raises:
        ConfigError: there is no such break.
        Exception: the claim raises it; not for ``NotMeasured``.
    """
    gc.collect()  # what the claim before left behind must not count as memory of this one
    began = time.perf_counter()
    measurements = None
    with torch.random.fork_rng(devices=[]), one_thread(), planted(*filter(None, [broken])):
        torch.manual_seed(settings.seed)
        try:
            measurements = claim(config or claim.config(settings), settings)
            finding = claim.finding(measurements)
        except NotMeasured as reason:
            finding = Finding("—", claim.threshold, "not measured", str(reason))
    return Outcome(claim, finding, time.perf_counter() - began, measurements)


def measure(
    chosen: Sequence[Claim[Any, Any]],
    settings: Settings,
    report: Report | None = None,
    each: Callable[[Outcome], None] | None = None,
    *,
    broken: str | None = None,
) -> list[Outcome]:
    """Measure claims one after the other. An exception is a failure of its claim; the others go on.

    Args:
        chosen: the claims.
        settings: how they are measured.
        report: called before every piece of work.
        each: called with every outcome as soon as it is there.
        broken: the name of a break that is planted while each of them is measured; None for none.
    """
    outcomes = []
    for done, claim in enumerate(chosen):

        def progress(piece: str, done: int = done, name: str = claim.id) -> None:
            if report is not None:
                report(f"{name}: {piece}", done)

        progress("begins")
        began = time.perf_counter()
        try:
            outcome = measure_one(claim, replace(settings, progress=progress), broken=broken)
        except Exception as error:
            outcome = Outcome(claim, _raised(error), time.perf_counter() - began)
        outcomes.append(outcome)
        if each is not None:
            each(outcome)
    return outcomes


def _raised(error: Exception) -> Finding:
    message = f"{type(error).__name__}: {error}"
    return Finding("", "", "not measured", f"it raised {message}", failures=[message])
