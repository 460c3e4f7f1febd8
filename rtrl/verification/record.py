"""What was measured, on record: plain JSON values, and what of an earlier record still stands."""

import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import rtrl
from rtrl.errors import ConfigError
from rtrl.report.model import SCHEMA
from rtrl.report.save import plain
from rtrl.verification.claim import Settings
from rtrl.verification.runner import Outcome

Entry = dict[str, Any]
"""One claim on record."""


def entry(outcome: Outcome) -> Entry:
    """A claim, its explanation, and everything that was found."""
    found: Entry = plain(
        {
            "id": outcome.claim.id,
            "claimed": outcome.claim.claimed,
            "explanation": inspect.getdoc(sys.modules[outcome.claim.measure.__module__]) or "",
            **asdict(outcome.finding),
            "duration_s": round(outcome.duration_s, 3),
        }
    )
    return found


def record(entries: Sequence[Entry], settings: Settings, command: str) -> dict[str, Any]:
    """The claims, and how and where they were measured. ``duration_s`` is the sum over the claims."""
    return {
        **_circumstances(settings),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "duration_s": round(sum(found["duration_s"] for found in entries), 3),
        "claims": list(entries),
    }


def kept(path: Path, settings: Settings) -> list[Entry]:
    """The claims in an earlier record, [] if there is none.

    Raises:
        ConfigError: the file is no record, or its claims were measured by other code, on another machine, in another
        form or with another seed; it says which, and to leave ``--resume`` away.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        return []
    try:
        old = json.loads(text)
        entries: list[Entry] = [dict(found) for found in old["claims"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} holds no results of rtrl verify; name another file, or leave --resume away"
        ) from error
    for name, value in _circumstances(settings).items():
        if old.get(name) != value:
            raise ConfigError(
                f"{path} cannot be gone on with: its {name} is {old.get(name)!r}, now it is {value!r}; measure anew, "
                "without --resume"
            )
    return entries


def failures(entries: Sequence[Entry]) -> list[str]:
    """Every way in which the code does not behave as documented, "claim: what"; also that nothing was measured."""
    found = [f"{claim['id']}: {line}" for claim in entries for line in claim["failures"]]
    return found if entries else ["no claim was measured"]


def _circumstances(settings: Settings) -> dict[str, Any]:
    """All that a result depends on beside the claim itself."""
    return {
        "schema": SCHEMA,
        "mode": "full" if settings.full else "quick",
        "seed": settings.seed,
        "device": settings.device,
        "machine": machine(),
        "versions": versions(),
    }


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
