"""What a claim is: its words, how much is measured, and the functions that measure, judge and show it."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Generic, TypeVar

from rtrl.report.model import Finding, Plot, Question, Table, Verdict

Progress = Callable[[str], None]
"""Called with the name of every piece of work before it begins."""


def _silent(piece: str) -> None:
    return


@dataclass(frozen=True, slots=True)
class Settings:
    """How all claims of a run are measured.

    Attributes:
        full: whether to take the long form: longer streams, more seeds, larger models.
        small: whether to take the small form, a second or so, by which breaks are tried.
        seed: the seed of everything that is drawn.
        device: the torch device to measure on, where a claim leaves it open.
        progress: called with the name of every piece of work before it begins.
    """

    full: bool = False
    seed: int = 0
    device: str = "cpu"
    progress: Progress = field(default=_silent, compare=False, repr=False)
    small: bool = False

    @property
    def mode(self) -> str:
        """The form: "small", "quick" or "full"."""
        return "full" if self.full else "small" if self.small else "quick"


@dataclass(kw_only=True)
class Measurements:
    """Base class of what a claim measures.

    Attributes:
        failures: ways in which the code does not behave as its documentation says, a line each. They make the check
            fail; a claim that does not hold is a finding, not a failure.
    """

    failures: list[str] = field(default_factory=list)


class NotMeasured(Exception):
    """A claim cannot be measured here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a claim holds, and the condition, correction or reason that belongs to the verdict."""

    name: Verdict
    condition: str = ""

    @classmethod
    def holds(cls) -> "Judgement":
        """Return the verdict of a claim that holds as it stands."""
        return cls("holds")

    @classmethod
    def holds_when(cls, condition: str) -> "Judgement":
        """Return the verdict of a claim that needs a condition."""
        return cls("holds when", condition)

    @classmethod
    def does_not_hold(cls, instead: str) -> "Judgement":
        """Return the verdict of a claim that is wrong, with what is true instead."""
        return cls("does not hold", instead)

    @classmethod
    def not_at_claimed_size(cls, found: str) -> "Judgement":
        """Return the verdict of a claim that was measured at another size, with what was found at that size."""
        return cls("not measured at the claimed size", found)


@dataclass(frozen=True, slots=True)
class Shown:
    """What people see of the measurements.

    Attributes:
        result: what was measured, in a few words with its unit.
        tables: the measurements as tables.
        plots: the measurements as pictures.
        headline: the result as one plain sentence for the top of the results page; for its question's main claims.
        model: what was measured on: the model, its P and H, T and the seeds.
    """

    result: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    headline: str = ""
    model: str = ""


C = TypeVar("C")
M = TypeVar("M", bound=Measurements)


@dataclass(frozen=True, slots=True)
class Claim(Generic[C, M]):
    """One claim. Calling it measures; the runner adds threads, time, verdict and record.

    Attributes:
        id: the name on the command line and in the record.
        claimed: what was claimed.
        threshold: what is required of the measurements.
        quick: how much is measured by default.
        full: how much is measured with ``--full``.
        measure: the function that measures.
        verdict: the function that judges the measurements.
        show: the function that shows the measurements.
        void: why the verdict is "does not hold" whenever there are failures; "" leaves the verdict to ``verdict``.
        explanation: how it is measured, why that is fair, and what it leaves open.
        question: the question of the results page that the claim belongs to.
        small: how much is measured in the tests and in the matrix of breaks: a second or so; None for the quick form.
        noticed_breaks: names of breaks (see ``rtrl.verification.breaks``) each of which must change the verdict or the
            failures of the small form.
        no_break: why no break can change the verdict; "" where one can.
    """

    id: str
    claimed: str
    threshold: str
    quick: C
    full: C
    measure: Callable[[C, Settings], M]
    verdict: Callable[[M], Judgement]
    show: Callable[[M], Shown]
    void: str = ""
    explanation: str = ""
    question: Question = ""
    small: C | None = None
    noticed_breaks: tuple[str, ...] = ()
    no_break: str = ""

    def __call__(self, config: C, settings: Settings) -> M:
        """Measure."""
        return self.measure(config, settings)

    def config(self, settings: Settings) -> C:
        """Return how much is measured.

        Args:
            settings: which form; a claim without a small form has its quick one.
        """
        if settings.full:
            return self.full
        return self.small if settings.small and self.small is not None else self.quick

    def judge(self, measurements: M) -> Judgement:
        """Return the verdict of ``measurements``; failures void it where the claim says so."""
        if measurements.failures and self.void:
            return Judgement.does_not_hold(self.void)
        return self.verdict(measurements)

    def finding(self, measurements: M) -> Finding:
        """Judge and show ``measurements``."""
        found, shown = self.judge(measurements), self.show(measurements)
        parts = (measurements.failures, shown.tables, shown.plots, asdict(measurements))
        words = (shown.headline, shown.model)
        return Finding(shown.result, self.threshold, found.name, found.condition, *parts, *words)


def claim(
    id: str,
    *,
    claimed: str,
    threshold: str,
    quick: C,
    full: C,
    verdict: Callable[[M], Judgement],
    show: Callable[[M], Shown],
    void: str = "",
    explanation: str = "",
    question: Question = "",
    small: C | None = None,
    noticed_breaks: tuple[str, ...] = (),
    no_break: str = "",
) -> Callable[[Callable[[C, Settings], M]], Claim[C, M]]:
    """Make a function that measures into a claim; see ``Claim``. The module's docstring is the default explanation."""

    def decorate(measure: Callable[[C, Settings], M]) -> Claim[C, M]:
        text = explanation or sys.modules[measure.__module__].__doc__ or ""
        words = (void, inspect.cleandoc(text), question, small, noticed_breaks, no_break)
        return Claim(id, claimed, threshold, quick, full, measure, verdict, show, *words)

    return decorate
