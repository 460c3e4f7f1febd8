"""Claims measured with faults planted on purpose: which verdicts each fault changes. A claim that none changes is deaf.

A verdict *changes* if its name does, if there are failures now, or if the measurement ends with an error. What a claim
says in its condition may change without that.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtrl.errors import ConfigError
from rtrl.report import load_record
from rtrl.report.model import ClaimResult
from rtrl.verification import breaks, record, runner
from rtrl.verification.claim import Claim, Settings


@dataclass(frozen=True, slots=True)
class Attempt:
    """A claim measured with a break.

    Attributes:
        broken: the name of the break.
        verdict: the verdict with it.
        failure: the first failure with it, or the error that ended the measurement; "" for none.
        noticed: whether the verdict changed.
    """

    broken: str
    verdict: str
    failure: str
    noticed: bool


def attempt(claim: Claim[Any, Any], found: ClaimResult, broken: str, settings: Settings) -> Attempt:
    """Measure a claim with a break.

    Args:
        claim: the claim.
        found: what it came to without the break, with the same settings.
        broken: the name of the break.
        settings: how it is measured.

    Raises:
        ConfigError: there is no such break.
    """
    breaks.find(broken)
    (outcome,) = runner.measure([claim], settings, broken=broken)
    now = outcome.finding
    noticed = now.verdict != found.verdict or bool(now.failures) != bool(found.failures)
    return Attempt(broken, now.verdict, next(iter(now.failures), ""), noticed)


def added(found: ClaimResult, new: Attempt) -> ClaimResult:
    """Return what a claim came to, with one attempt more."""
    details = {**found.data.get("breaks", {}), new.broken: {"verdict": new.verdict, "failure": new.failure}}
    return replace(
        found,
        tried=[*found.tried, new.broken],
        noticed=[*found.noticed, *([new.broken] if new.noticed else [])],
        data={**found.data, "breaks": details},
    )


def attempts(path: Path) -> dict[str, dict[str, Any]]:
    """Return claim → "tried" and "noticed", from a file of results of the code that runs.

    Raises:
        ConfigError: the file is not a record, or is of other code.
    """
    matrix = load_record(path)
    if matrix.code != record.code():
        raise ConfigError(
            f"{path} is of other code ({matrix.code or 'unknown'}, now {record.code()}); measure it again by rtrl "
            f"verify --matrix --small --json {path}"
        )
    return {found.id: {"tried": found.tried, "noticed": found.noticed} for found in matrix.claims if found.tried}


def missing(found: ClaimResult, chosen: Collection[str]) -> list[str]:
    """Return which of the chosen breaks a claim was not measured with; none for a claim that was not measured."""
    return [] if found.verdict == "not measured" else [name for name in chosen if name not in found.tried]


def deaf(claim: Claim[Any, Any], found: ClaimResult, *, whole: bool) -> list[str]:
    """Return what is wrong with a claim that was measured with breaks, a line each.

    Args:
        claim: the claim.
        found: what it came to, alone and with breaks.
        whole: whether it was measured with every break.
    """
    if found.verdict == "not measured":
        return []
    wrong = [
        f"the break {name} does not change the verdict, {found.verdict!r}"
        for name in claim.noticed_breaks
        if name in found.tried and name not in found.noticed
    ]
    if claim.no_break and found.noticed:
        wrong.append(f"it says that no break can change the verdict; {found.noticed[0]} does")
    if whole and not found.noticed and not claim.no_break:
        wrong.append("no break changes the verdict, and it does not say why")
    return wrong
