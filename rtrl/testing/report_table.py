"""Render reports as a table for the shell, and as a record for a program."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from rtrl.testing.pytest_nodes import BoundCheck
from rtrl.testing.report import Failure, Report, failure_texts


class CheckResult:
    """The outcome of one check of one spec.

    Attributes:
        outcome: "passed", "failed", "expected failure" or "not judged".
        failures: those that count.
    """

    def __init__(self, check: BoundCheck, report: Report) -> None:
        reasons = {} if check.reason is None else {check.name: check.reason}
        judged = report.with_expected(reasons)
        self.spec, self.check, self.seed, self.failures = check.spec.name, check.name, report.seed, judged.failures
        self.outcome, self.detail = "passed", ""
        if judged.failures:
            self.outcome = "failed"
            self.detail = judged.failures[0].place or ("" if check.reason is None else judged.failures[0].message)
        elif judged.expected:
            self.outcome, self.detail = "expected failure", str(check.reason)
        elif check.name in report.skipped:
            self.outcome, self.detail = "not judged", report.skipped[check.name]

    def record(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "spec": self.spec,
            "check": self.check,
            "outcome": self.outcome,
            "detail": self.detail,
            "seed": self.seed,
            "failures": [_record(failure) for failure in self.failures],
        }


def _record(failure: Failure) -> dict[str, Any]:
    """A failure as JSON values; an error that is not finite is None."""
    record = dataclasses.asdict(failure)
    for verdict in record["parameters"]:
        for key in ("error", "factor"):
            if verdict[key] is not None and not math.isfinite(verdict[key]):
                verdict[key] = None
    return record


_COLOURS = {"passed": "green", "failed": "bold red", "expected failure": "yellow", "not judged": "dim"}


def table(results: Sequence[CheckResult]) -> Table:
    """Make a table with one line per check."""
    shown = Table("spec", "check", "verdict", "where, or why")
    before = ""
    for result in results:
        name = result.spec if result.spec != before else ""
        colour = _COLOURS[result.outcome]
        shown.add_row(name, result.check, f"[{colour}]{result.outcome}[/]", escape(result.detail))
        before = result.spec
    return shown


def failures(results: Sequence[CheckResult]) -> str:
    """Return the failures of each spec in full, those of one cause once."""
    by_spec: dict[str, list[Failure]] = {}
    for result in results:
        by_spec.setdefault(result.spec, []).extend(result.failures)
    return "\n".join(f"{spec}: {text}" for spec, failed in by_spec.items() for text in failure_texts(failed))


def summary(results: Sequence[CheckResult]) -> str:
    """Count the results by outcome."""
    counts = {outcome: sum(v.outcome == outcome for v in results) for outcome in _COLOURS}
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
