"""Put what was measured on record, and read what is still valid of an earlier record."""

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import rtrl
from rtrl._utils.code_digest import installed_code
from rtrl.errors import ConfigError
from rtrl.report import load_record
from rtrl.report.model import Cell, ClaimResult, Finding, Record
from rtrl.verification.claim import Settings
from rtrl.verification.harness.subprocesses import physical_bytes
from rtrl.verification.runner import Outcome


def entry(outcome: Outcome) -> ClaimResult:
    """Return what a claim came to, with its words."""
    claim, seconds = outcome.claim, round(outcome.duration_s, 3)
    finding: dict[str, Any] = {part.name: getattr(outcome.finding, part.name) for part in fields(Finding)}
    words = {name: getattr(claim, name) for name in ("id", "claimed", "explanation", "question", "no_break")}
    return ClaimResult(**finding, **words, duration_s=seconds, measured=_now())


def record(entries: Sequence[ClaimResult], settings: Settings, command: str) -> Record:
    """Return the claims with how and where they were measured. ``duration_s`` is the sum over the claims."""
    return Record(
        **_circumstances(settings),
        created=_now(),
        command=command,
        duration_s=round(sum(entry.duration_s or 0.0 for entry in entries), 3),
        claims=list(entries),
    )


def kept(path: Path, settings: Settings) -> list[ClaimResult]:
    """Return the claims of an earlier record that a run with these settings may keep; [] without a file.

    Raises:
        ConfigError: the file is not a record, or its claims were measured by other code, on another machine or with
            other settings; the message says which.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return []
    try:
        old = load_record(path)
    except ConfigError as error:
        raise ConfigError(
            f"{path} holds no results of rtrl verify ({error}); name another file, or omit --resume"
        ) from error
    for name, value in _circumstances(settings).items():
        before = getattr(old, name)
        if name == "versions":  # a commit says less than the digest of the code
            before, value = ({k: v for k, v in versions.items() if k != "commit"} for versions in (before, value))
        if before != value:
            raise ConfigError(
                f"{path} cannot be resumed: its {name} is {before!r}, now it is {value!r}; measure everything again, "
                "without --resume"
            )
    return [replace(claim, kept=True, measured=claim.measured or old.created) for claim in old.claims]


def failures(entries: Sequence[ClaimResult]) -> list[str]:
    """Return every way in which the code does not behave as documented, or that nothing was measured, a line each."""
    found = [f"{entry.id}: {line}" for entry in entries for line in entry.failures]
    return found if entries else ["no claim was measured"]


def _circumstances(settings: Settings) -> dict[str, Any]:
    """Return what a result depends on besides the claim itself."""
    return {
        "code": code(),
        "mode": settings.mode,
        "seed": settings.seed,
        "device": settings.device,
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> dict[str, Cell]:
    """Describe the machine that measures."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": physical_bytes(),
        "os": platform.platform(),
    }


def versions() -> dict[str, Cell]:
    """Return the versions that results depend on; the commit where the package lies in a clone of its repository."""
    return {
        "rtrl": rtrl.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": _commit(Path(rtrl.__file__).parents[1]),
    }


@cache
def code() -> str:
    """Return the digest of the code that this process runs: what is edited while it runs does not count."""
    return installed_code()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
