"""Measure a selection of claims."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rtrl.verification.claim import Claim, Finding, Progress, Settings


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a claim came to, and how long that took."""

    claim: Claim
    finding: Finding
    duration_s: float


def measure(
    chosen: Sequence[Claim],
    settings: Settings,
    progress: Progress | None = None,
    each: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Measure claims one after the other.

    What a claim raises is a failure of that claim; the others go on. Random numbers are seeded anew for each, and the
    number of threads is put back, so that a claim measures the same alone and among others.

    Args:
        chosen: the claims. settings: for all of them.
        progress: told of every piece of work: "claim: piece", how many claims are done and how many there are.
        each: given every outcome as soon as it is there.
    """
    outcomes = []
    threads = torch.get_num_threads()
    for done, claim in enumerate(chosen):

        def tell(piece: str, _done: int, _pieces: int, done: int = done, name: str = claim.id) -> None:
            if progress is not None:
                progress(f"{name}: {piece}", done, len(chosen))

        tell("begins", 0, 1)
        gc.collect()  # what one claim leaves behind is no part of the next one's memory
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            try:
                finding = claim.measure(settings, tell)
            except Exception as error:
                finding = raised(error)
            finally:
                torch.set_num_threads(threads)
        outcomes.append(Outcome(claim, finding, time.perf_counter() - began))
        if each is not None:
            each(outcomes[-1])
    return outcomes


def raised(error: Exception) -> Finding:
    """The finding of a claim that could not be measured because of an error: it fails, whatever it would have found."""
    said = f"{type(error).__name__}: {error}"
    return Finding("", "", "not measured", f"it raised {said}", failures=[said])
