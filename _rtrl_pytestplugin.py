"""The pytest plugin: ``pytest --rtrl-spec=package.module:spec`` runs the conformance checks of a user's own spec.

A module of its own, outside the package, so that a pytest that does not use it never imports PyTorch.
"""

from __future__ import annotations

import re
import unittest
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rtrl.testing import BoundCheck


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rtrl", "conformance checks of online learners and recurrent cells")
    group.addoption(
        "--rtrl-spec",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE:NAME",
        help="run the checks of this LearnerSpec, CellSpec, list of them, make_cell() or make_learner(cell, "
        "batch_size); may be repeated; no test file is needed",
    )
    group.addoption("--rtrl-seed", type=int, default=0, metavar="N", help="the seed of all that the checks draw (0)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """With a spec and no files named, the specs alone are run: nothing else is collected."""
    if config.getoption("--rtrl-spec") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add one node a check, before any are deselected."""
    targets: list[str] = config.getoption("--rtrl-spec")
    if not targets:
        return
    from rtrl.errors import RTRLError
    from rtrl.testing import bound_checks
    from rtrl.testing.targets import load, specs_of

    try:
        specs = [spec for target in targets for spec in specs_of(load(target), target)]
        checks = bound_checks(specs, config.getoption("--rtrl-seed"))
    except RTRLError as error:
        raise pytest.UsageError(f"--rtrl-spec: {error}") from error
    groups: dict[str, SpecNode] = {}
    for check in checks:
        name = re.sub(r"\s+|::|[\[\]/]", " ", check.spec.name).strip()  # what node ids are made of
        if name not in groups:
            groups[name] = SpecNode.from_parent(session, name=name, nodeid=f"rtrl::{name}")
        items.append(CheckItem.from_parent(groups[name], name=check.name, check=check))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which no check was judged has proved nothing."""
    if not session.config.getoption("--rtrl-spec") or hasattr(session.config, "workerinput") or exitstatus:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats: dict[str, list[Any]] = getattr(reporter, "stats", {})
    if session.config.getoption("collectonly", False):
        return
    if not any(stats.get(outcome) for outcome in ("passed", "failed", "xfailed", "xpassed", "error")):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


class SpecNode(pytest.Collector):
    """A spec; its checks are added to the session as they are."""

    def collect(self) -> Iterable[pytest.Item]:
        return []


class CheckItem(pytest.Item):
    """One check of a spec."""

    def __init__(self, *, check: BoundCheck, **options: Any) -> None:
        super().__init__(**options)
        self.check = check
        if check.reason is not None:
            from rtrl.testing import CheckFailed

            self.add_marker(pytest.mark.xfail(reason=check.reason, strict=True, raises=CheckFailed))

    def runtest(self) -> None:
        try:
            self.check()
        except unittest.SkipTest as reason:
            pytest.skip(str(reason))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The report alone: where the package was when it noticed says nothing."""
        from rtrl.testing import CheckFailed

        return str(excinfo.value) if excinfo.errisinstance(CheckFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        return "rtrl", None, f"{self.check.spec.name}: {self.check.name}"
