"""The result of a run of checks, and its text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rtrl.errors import ConfigError, RTRLError


@dataclass(frozen=True, slots=True)
class ParameterVerdict:
    """Whether the gradient of one parameter is right.

    Attributes:
        name: of the parameter.
        error: the largest relative error after the whole stream.
        step: the first step after which it is wrong; None if it is right.
        factor: found / expected of a wrong parameter, if the ratio is the same for all entries.
    """

    name: str
    error: float
    step: int | None = None
    factor: float | None = None

    def __str__(self) -> str:
        """Return the parameter, the first wrong step, the error and a constant factor."""
        if self.step is None:
            return self.name
        times = "" if self.factor is None else f", × {self.factor:.6g} everywhere"
        return f"{self.name} from step {self.step} on (error {self.error:.2g}{times})"


_SHOWN = 6  # the number of parameters that a failure names


@dataclass(frozen=True, slots=True)
class Failure:
    """One way in which a cell or a learner breaks a promise, at the first place that shows it.

    Attributes:
        check: the name of the check.
        message: what is wrong and what to do.
        step: the first step that shows it; None if it does not belong to a step.
        sample: the first sample that shows it; None if it does not belong to a sample.
        where: the row, entry or parameter.
        found: the wrong value.
        expected: the right value.
        traceback: where an exception was raised, one line per call.
        parameters: what is right and wrong, by parameter, where that is known.
    """

    check: str
    message: str
    step: int | None = None
    sample: int | None = None
    where: str = ""
    found: str = ""
    expected: str = ""
    traceback: str = ""
    parameters: tuple[ParameterVerdict, ...] = ()

    @property
    def place(self) -> str:
        """The step, the sample and the entry, in words."""
        numbered = (("step", self.step), ("sample", self.sample))
        parts = [f"{what} {number}" for what, number in numbered if number is not None]
        return ", ".join([*parts, *([self.where] if self.where else [])])

    def __str__(self) -> str:
        """Return what is wrong, the place with both values, the wrong and the right parameters, and where an exception
        was raised, on lines of their own."""
        values = f"found {self.found}, expected {self.expected}" if self.found or self.expected else ""
        detail = ": ".join(part for part in (self.place, values) if part)
        wrong = sorted((p for p in self.parameters if p.step is not None), key=lambda p: (p.step, -p.error))
        right = [p for p in self.parameters if p.step is None]
        lines = [detail, _listed("wrong", wrong), _listed("right", right), *self.traceback.splitlines()]
        return "\n     ".join([f"FAIL {self.check}: {self.message}", *(line for line in lines if line)])

    @property
    def root(self) -> str:
        """What failures of one cause share: the place of the exception, or the likely mistake; empty if unknown."""
        mistake = self.message.partition(LIKELY)[2]
        return self.traceback or mistake.partition(", up to step")[0].partition(" (in sample")[0]


LIKELY = "it looks as if "
"""The words before the likely mistake in a message."""


def failure_texts(failures: Sequence[Failure]) -> list[str]:
    """Return the text of each failure; of failures of one cause only the first, and the names of the other checks.

    Example:
        >>> failures = [Failure(name, "step raised ValueError", traceback="learner.py:7 in step") for name in "abc"]
        >>> print(failure_texts(failures)[0])
        FAIL a: step raised ValueError
             learner.py:7 in step
             2 more fail like this: b, c
    """
    like: dict[str, list[Failure]] = {}
    for number, failure in enumerate(failures):
        like.setdefault(failure.root or str(number), []).append(failure)
    texts = []
    for first, *others in like.values():
        names = ", ".join(dict.fromkeys(failure.check for failure in others))
        verb = "fails" if len(others) == 1 else "fail"
        texts.append(str(first) + (f"\n     {len(others)} more {verb} like this: {names}" if others else ""))
    return texts


def _listed(what: str, parameters: Sequence[ParameterVerdict]) -> str:
    more = f", and {len(parameters) - _SHOWN} more" if len(parameters) > _SHOWN else ""
    return f"{what}: {', '.join(map(str, parameters[:_SHOWN]))}{more}" if parameters else ""


class Found(NamedTuple):
    """The fields of a ``Failure`` without the name of the check, which yields it."""

    message: str
    step: int | None = None
    sample: int | None = None
    where: str = ""
    found: str = ""
    expected: str = ""
    traceback: str = ""
    parameters: Any = ()  # a tuple of ParameterVerdict


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of ``check_cell`` or ``check_learner``.

    Attributes:
        failures: all failures, in the order of the checks.
        checks: the names of the checks that were run.
        skipped: the reason of each check that could not be judged, by name.
        notes: facts that are allowed, but slow or worth knowing.
        seed: of all random numbers.
        name: of what was checked.
        script: the code that repeats the checks.
        expected: failures that the spec declares with a reason; they do not count.

    Example:
        >>> report = Report([Failure("finite", "NaN in y", step=3)], ["finite"], seed=7, script="check_cell(cell, xs)")
        >>> report.passed
        False
        >>> print(report)
        1 of 1 checks failed (seed 7)
        FAIL finite: NaN in y
             step 3
        To see it again:
            check_cell(cell, xs)
    """

    failures: list[Failure] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    name: str = ""
    script: str = ""
    expected: list[Failure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are no failures but expected ones."""
        return not self.failures

    def __str__(self) -> str:
        """Return the count, the failures, those of one cause once, what was skipped, the notes, and how to repeat the
        checks."""
        failed = {failure.check for failure in self.failures}
        lines = [
            f"{self.name}{': ' if self.name else ''}{len(failed)} of {len(failed.union(self.checks))} checks failed "
            f"(seed {self.seed})"
        ]
        lines += failure_texts(self.failures)
        if self.skipped:
            reasons: dict[str, list[str]] = {}
            for name, reason in self.skipped.items():
                reasons.setdefault(reason, []).append(name)
            lines += [f"not judged, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        lines += [f"failed as expected: {failure.check}: {failure.message}" for failure in self.expected]
        lines += [f"note: {note}" for note in self.notes]
        if failed:
            lines += ["To see it again:", *(f"    {line}" for line in self.script.splitlines())]
        else:
            judged = [name for name in self.checks if name not in {failure.check for failure in self.expected}]
            lines.append(f"passed: {', '.join(judged)}")
        return "\n".join(lines)

    def raise_for_failures(self) -> None:
        """Raise an exception if there are failures.

        Raises:
            CheckFailed: there are; its text is the whole report.
        """
        if self.failures:
            raise CheckFailed(self)

    def with_expected(self, reasons: Mapping[str, str]) -> "Report":
        """Move the failures of the checks in ``reasons`` to ``expected``.

        A check in ``reasons`` that did not fail is a failure itself, so that an outdated declaration is noticed.
        """
        unexpected = [failure for failure in self.failures if failure.check not in reasons]
        known = [
            replace(failure, message=f"{reasons[failure.check]} ({failure.message})")
            for failure in self.failures
            if failure.check in reasons
        ]
        failed = {failure.check for failure in self.failures}
        for check, reason in reasons.items():
            if check in self.checks and check not in failed:
                unexpected.append(Failure(check, stale(reason, "it passes")))
            elif check in self.skipped:
                unexpected.append(Failure(check, stale(reason, "it is not judged")))
        return replace(self, failures=unexpected, expected=known)


def stale(reason: str, instead: str) -> str:
    """The message about an expected failure that did not occur."""
    return f"was expected to fail ({reason}), but {instead}; take it out of expected_failures"


def check_expected(reasons: object, known: list[str]) -> None:
    """Check that expected failures map names of checks to reasons.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(reasons, Mapping):
        raise ConfigError(f"expected_failures must map names of checks to reasons, got {type(reasons).__name__}")
    for name, reason in reasons.items():
        if name not in known:
            raise ConfigError(f"expected_failures names {name!r}, which is not a check; there are: {', '.join(known)}")
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigError(f"expected_failures[{name!r}] must be a reason in words, got {reason!r}")


class CheckFailed(RTRLError, AssertionError):
    """A cell or a learner failed checks.

    Attributes:
        report: all failures.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[type["CheckFailed"], tuple[Report]]:
        """Rebuild the exception from its report, so that it can be pickled."""
        return type(self), (self.report,)
