"""Measure a selection of claims and put the results on record."""

import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import rtrl
from rtrl.claims.claim import Claim, Finding, Progress, Settings

SCHEMA = 1
"""The form of ``record``; it changes whenever a reader of the old form would misread the new one."""


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


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Every way in which the code does not behave as documented, "claim: what"; also that nothing was measured."""
    found = [f"{outcome.claim.id}: {line}" for outcome in outcomes for line in outcome.finding.failures]
    return found if outcomes else ["no claim was measured"]


def record(outcomes: Sequence[Outcome], settings: Settings, command: str, duration_s: float) -> dict[str, Any]:
    """Everything that was found, as plain JSON values: numbers that are not finite become None."""
    whole = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "mode": "full" if settings.full else "quick",
        "seed": settings.seed,
        "machine": machine(),
        "versions": versions(),
        "duration_s": round(duration_s, 3),
        "claims": [
            {
                "id": outcome.claim.id,
                "claimed": outcome.claim.claimed,
                **asdict(outcome.finding),
                "duration_s": round(outcome.duration_s, 3),
            }
            for outcome in outcomes
        ],
    }
    plain_whole: dict[str, Any] = plain(whole)
    return plain_whole


def plain(value: Any) -> Any:
    """Containers of JSON values, tuples as lists, numbers that are not finite as None.

    Raises:
        TypeError: something else is among them.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain JSON value: {value!r}")


def machine() -> dict[str, Any]:
    """The machine that measures."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "os": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """What the results depend on; the commit where the package lies in a clone of its repository."""
    return {
        "rtrl": rtrl.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": _commit(Path(rtrl.__file__).parents[1]),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
