"""What a run of checks found, and how it is said."""

from dataclasses import dataclass, field

from rtrl.errors import RTRLError


@dataclass(frozen=True, slots=True)
class Failure:
    """One way in which a cell breaks its contract, at the first place where it was seen.

    Attributes:
        check: the name of the check. message: what is wrong and what to do.
        step, sample: where it was first seen; None if it is of no single step or sample.
        where: the row, element or parameter. found, expected: the two values.
    """

    check: str
    message: str
    step: int | None = None
    sample: int | None = None
    where: str = ""
    found: str = ""
    expected: str = ""

    def __str__(self) -> str:
        """Two lines: what is wrong, and where with both values."""
        place = [
            f"{what} {number}" for what, number in (("step", self.step), ("sample", self.sample)) if number is not None
        ]
        values = f"found {self.found}, expected {self.expected}" if self.found or self.expected else ""
        detail = ": ".join(
            part for part in (", ".join([*place, *([self.where] if self.where else [])]), values) if part
        )
        return f"FAIL {self.check}: {self.message}" + (f"\n     {detail}" if detail else "")


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of ``check_cell``.

    Attributes:
        failures: all of them, in the order of the checks. checks: names of the checks that were run.
        skipped: names of those that could not be judged, because what they rest on failed.
        notes: what is allowed, but slow or worth knowing.
        seed: of the generic points. own_state: whether the first state was given as ``state=``.

    >>> report = Report([Failure("finite", "NaN in y", step=3)], ["finite"], seed=7)
    >>> report.passed
    False
    >>> print(report)
    1 of 1 checks failed (seed 7)
    FAIL finite: NaN in y
         step 3
    To see it again:
        from rtrl.testing import check_cell
        check_cell(make_cell(), inputs, seed=7)
    """

    failures: list[Failure] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    own_state: bool = False

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def script(self) -> str:
        """What to run to see it again; ``make_cell`` and ``inputs`` are the caller's own."""
        state = "state=state, " if self.own_state else ""
        return f"from rtrl.testing import check_cell\ncheck_cell(make_cell(), inputs, {state}seed={self.seed})"

    def __str__(self) -> str:
        """Readable lines: the count, every failure, what was skipped, notes, and how to see it again."""
        failed = {failure.check for failure in self.failures}
        lines = [f"{len(failed)} of {len(self.checks)} checks failed (seed {self.seed})"]
        lines += [str(failure) for failure in self.failures]
        if self.skipped:
            lines.append(f"not judged, because what they rest on failed: {', '.join(self.skipped)}")
        lines += [f"note: {note}" for note in self.notes]
        if failed:
            lines += ["To see it again:", *(f"    {line}" for line in self.script.splitlines())]
        else:
            lines.append(f"passed: {', '.join(self.checks)}")
        return "\n".join(lines)

    def raise_for_failures(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            CheckFailed: with the whole report as its text.
        """
        if self.failures:
            raise CheckFailed(self)


class CheckFailed(RTRLError, AssertionError):
    """A cell failed checks; ``report`` holds them all."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[type["CheckFailed"], tuple[Report]]:
        """Made anew of its report, so that it travels between processes."""
        return type(self), (self.report,)
