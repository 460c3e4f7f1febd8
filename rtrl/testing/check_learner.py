"""Check a learner."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.testing.check_cell import check_options
from rtrl.testing.isolation import preserve_global_state
from rtrl.testing.learner_checks.listing import learner_checks, run_check
from rtrl.testing.learner_checks.registry import NotJudged
from rtrl.testing.report import Report, check_expected
from rtrl.testing.spec import LearnerSpec, MakeLearner


def check_learner(
    make_learner: MakeLearner | LearnerSpec,
    spec: LearnerSpec | None = None,
    *,
    checks: Collection[str] | None = None,
    seed: int = 0,
    on_fail: Literal["raise", "return"] = "raise",
) -> Report:
    """Run every check of ``learner_checks()`` on a learner, and collect all failures.

    The learner runs along short streams on which implementations have failed, always with copies of cells. Its
    gradients are compared, entry by entry and at the size of rounding errors, with what its law requires: the gradient
    of BPTT, or what a biased learner declares. A failure names the first step after which the gradient is wrong, the
    sample, the parameter and the entry, both values, and the likely mistake.

    Args:
        make_learner: ``make_learner(cell, batch_size)``, or the spec itself.
        spec: what the learner promises; ``LearnerSpec(make_learner)``, exact on every stream, by default.
        checks: the names of the checks to run; all by default.
        seed: of weights, inputs and draws.
        on_fail: ``"raise"`` or ``"return"``.

    Returns:
        The report of all checks.

    Raises:
        ConfigError: an argument is of the wrong kind, or is not the name of a check; the message lists the names.
        CheckFailed: something failed and ``on_fail`` is ``"raise"``; its ``report`` has all failures.

    Cost:
        Some thousand steps of tiny cells; seconds for a learner that takes a millisecond per step.

    Example:
        >>> import rtrl
        >>> from rtrl.testing import LearnerSpec, check_learner
        >>> from rtrl.learners import TBPTT
        >>> spec = LearnerSpec(lambda cell, batch: TBPTT(cell, batch, horizon=3), name="TBPTT(3)")
        >>> report = check_learner(spec, checks=["dense cell"], on_fail="return")
        >>> print(report.failures[0].message.split("; ")[1])
        it looks as if each loss were pulled back through 3 steps only: truncated BPTT
    """
    check_options(seed, on_fail)
    spec = joined(make_learner, spec)
    known = learner_checks()
    chosen = known if checks is None else checked_names(checks, known)
    check_expected(spec.expected_failures, known)
    report = Report(seed=seed, name=spec.name, script=script(make_learner, spec, chosen if checks else None, seed))
    for name in chosen:
        with preserve_global_state(seed):
            try:
                report.failures.extend(run_check(name, spec, seed))
            except NotJudged as reason:
                report.skipped[name] = str(reason)
            else:
                report.checks.append(name)
    report = report.with_expected(spec.expected_failures)
    if not report.passed and checks is None:
        failed = list(dict.fromkeys(failure.check for failure in report.failures))
        report = replace(report, script=script(make_learner, spec, failed, seed))
    if on_fail == "raise":
        report.raise_for_failures()
    return report


def joined(make_learner: Any, spec: LearnerSpec | None) -> LearnerSpec:
    """Join the two arguments to one spec.

    Raises:
        ConfigError: they do not fit together.
    """
    if isinstance(make_learner, LearnerSpec):
        if spec is not None:
            raise ConfigError("pass make_learner and a spec, or the spec alone")
        return make_learner
    if spec is None:
        return LearnerSpec(make_learner)
    if not isinstance(spec, LearnerSpec):
        raise ConfigError(f"spec must be a LearnerSpec, got {type(spec).__name__}")
    return replace(spec, make_learner=make_learner, gradients=None)


def checked_names(checks: Any, known: list[str]) -> list[str]:
    """Sort the chosen checks in the order in which they run.

    Raises:
        ConfigError: there are none, or a name is not that of a check.
    """
    if isinstance(checks, str) or not isinstance(checks, Collection) or not checks:
        raise ConfigError(f"checks must be a list of names of checks, got {checks!r}; there are: {', '.join(known)}")
    for name in checks:
        validation.known("check", name, known)
    return [name for name in known if name in checks]


def script(given: Any, spec: LearnerSpec, checks: list[str] | None, seed: int) -> str:
    """The code that repeats the checks, with an import of the learner if it can be imported."""
    lines = ["from rtrl.testing import check_learner"]
    if isinstance(given, LearnerSpec):
        argument = "spec"
    else:
        module, name = getattr(given, "__module__", ""), getattr(given, "__qualname__", "")
        argument = name if name.isidentifier() else "make_learner"
        if name.isidentifier() and module not in ("", "__main__"):
            lines.append(f"from {module} import {name}")
    chosen = "" if checks is None else f"checks={checks!r}, "
    lines.append(f"check_learner({argument}, {chosen}seed={seed})")
    return "\n".join(lines)
