"""One test per check, for pytest, the command line or a loop."""

import functools
import unittest
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rtrl.errors import ConfigError
from rtrl.testing.cell_checks.core import cell_checks
from rtrl.testing.check_cell import check_cell
from rtrl.testing.check_learner import check_learner
from rtrl.testing.learner_checks.listing import learner_checks
from rtrl.testing.report import CheckFailed, Report, check_expected, stale
from rtrl.testing.spec import CellSpec, LearnerSpec

Spec = LearnerSpec | CellSpec


@dataclass(frozen=True, eq=False)
class BoundCheck:
    """One check of one spec; call it to run the check.

    Attributes:
        spec: of a learner or a cell.
        name: of the check.
        seed: of all random numbers.
    """

    spec: Spec
    name: str
    seed: int
    _reports: Callable[[str], Report]

    @property
    def reason(self) -> str | None:
        """The reason why it is expected to fail; None if it is not."""
        return self.spec.expected_failures.get(self.name)

    @property
    def id(self) -> str:
        """The spec's name and the check's."""
        return f"{self.spec.name}-{self.name}"

    def report(self) -> Report:
        """Run the check and report; expected failures count as failures here."""
        return self._reports(self.name)

    def __call__(self) -> None:
        """Run the check.

        Raises:
            CheckFailed: it failed.
            SkipTest: it does not apply; pytest reports it as skipped.
            ConfigError: it was expected to fail, but does not apply; remove the expectation.
        """
        report = self.report()
        if self.name in report.skipped and self.reason is not None:
            raise ConfigError(f"{self.spec.name}: {self.name} {stale(self.reason, 'it is not judged')}")
        if self.name in report.skipped:
            raise unittest.SkipTest(f"not judged, {report.skipped[self.name]}")
        report.raise_for_failures()


def bound_checks(specs: Sequence[Spec], seed: int = 0) -> list[BoundCheck]:
    """List all checks of all specs.

    Args:
        specs: ``LearnerSpec``s and ``CellSpec``s.
        seed: of all random numbers.

    Returns:
        One ``BoundCheck`` per spec and check; call it to run the check.

    Raises:
        ConfigError: there are no specs, an item is not a spec, two specs have one name, or an expected failure is not
            the name of a check.
    """
    if isinstance(specs, LearnerSpec | CellSpec) or not isinstance(specs, Sequence) or not specs:
        raise ConfigError(f"specs must be a list of LearnerSpecs and CellSpecs, at least one, got {specs!r}")
    found: list[BoundCheck] = []
    for spec in specs:
        if not isinstance(spec, LearnerSpec | CellSpec):
            raise ConfigError(f"specs must hold LearnerSpecs and CellSpecs, got {type(spec).__name__}")
        known = learner_checks() if isinstance(spec, LearnerSpec) else cell_checks()
        check_expected(spec.expected_failures, known)
        reports = functools.partial(_learner_report, spec, seed) if isinstance(spec, LearnerSpec) else _Once(spec, seed)
        found += [BoundCheck(spec, name, seed, reports) for name in known]
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two specs are called {twice[0]!r}; give them different names: name=...")
    return found


def _learner_report(spec: LearnerSpec, seed: int, name: str) -> Report:
    return check_learner(replace(spec, expected_failures={}), checks=[name], seed=seed, on_fail="return")


class _Once:
    """Run the checks of a cell together, because they depend on each other, and return the report of each."""

    def __init__(self, spec: CellSpec, seed: int) -> None:
        self._spec, self._seed = spec, seed

    @functools.cached_property
    def _whole(self) -> Report:
        cell = self._spec.make_cell()
        inputs = self._spec.inputs(cell) if callable(self._spec.inputs) else self._spec.inputs
        return check_cell(cell, inputs, state=self._spec.state, seed=self._seed, on_fail="return")

    def __call__(self, name: str) -> Report:
        whole = self._whole
        return Report(
            [failure for failure in whole.failures if failure.check == name],
            [name] if name in whole.checks else [],
            {name: whole.skipped[name]} if name in whole.skipped else {},
            whole.notes,
            whole.seed,
            self._spec.name,
            whole.script,
        )


def parametrize_with_checks(specs: Sequence[Spec], *, seed: int = 0) -> Any:
    """Decorate a pytest function that takes ``check`` and calls it: it becomes one test per spec and check.

    Checks that do not apply are skipped with the reason. Expected failures are strict ``xfail``s: it is an error if
    they pass.

    Args:
        specs: ``LearnerSpec``s and ``CellSpec``s.
        seed: of all random numbers.

    Raises:
        ConfigError: as ``bound_checks``.
        ImportError: pytest is not installed.

    Example:
        >>> import rtrl
        >>> from rtrl.testing import LearnerSpec, parametrize_with_checks
        >>> @parametrize_with_checks([LearnerSpec(rtrl.BlockRTRL)])
        ... def test_conformance(check):
        ...     check()
    """
    import pytest

    def case(check: BoundCheck) -> Any:
        xfail = pytest.mark.xfail(reason=check.reason or "", strict=True, raises=CheckFailed)
        return pytest.param(check, id=check.id, marks=[] if check.reason is None else [xfail])

    return pytest.mark.parametrize("check", [case(check) for check in bound_checks(specs, seed)])
