"""The suite proves its own teeth: every bug is caught, every check catches one, and the code as it is passes all."""

import functools
import inspect
import itertools
import re
from contextlib import ExitStack

import pytest
from breaking import StaleEntry, replaced, swapped
from catalogue import BUGS, Bug
from checks import CHECKS, gru_report, mixture_report

from rtrl.testing.learner_checks import listing, mixture, verdict

NO_BUG = (
    "NameError|SyntaxError|UnboundLocal|ImportError|has no attribute|"
    r"positional argument|keyword argument|multiple values for argument"  # the signature is another one
)


def only_whether_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a check of a learner at its first failure, and leave out what it would find out about it: where the gradient
    turns wrong, of which sample, by which mistake, after which shortest schedule. Slow, and tested elsewhere."""
    monkeypatch.setattr(verdict, "_diagnosis", lambda *args: "")
    monkeypatch.setattr(verdict, "_wrong_sample", lambda *args: (None, None, False))
    monkeypatch.setattr(verdict._Search, "_first", lambda search, is_wrong: search._candidates[-1])
    monkeypatch.setattr(mixture, "shrunk", lambda schedule, fails: list(schedule))
    for name, check in listing.CHECKS.items():
        monkeypatch.setitem(listing.CHECKS, name, lambda subject, check=check: itertools.islice(check(subject), 1))


CELL_REPORTS = ([functools.cache(report) for report in (mixture_report, gru_report)],)  # of the code as it is


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.number:02d} {bug.name}")
def test_a_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    only_whether_it_fails(monkeypatch)
    with ExitStack() as broken:
        for break_ in bug.breaks:
            broken.enter_context(break_())
        try:
            CHECKS[bug.check]()
        except (Exception, pytest.fail.Exception) as noticed:
            text = f"{type(noticed).__name__}: {noticed}"
        else:
            pytest.fail(f"{bug.check} does not notice: {bug.name}")
    assert not re.search(NO_BUG, text), f"the edit is no bug: {text}"


def test_the_28_bugs_of_others_are_there() -> None:
    assert {bug.number for bug in BUGS} >= set(range(1, 29))


@pytest.mark.parametrize("name", CHECKS)
def test_the_code_as_it_is_passes(name: str) -> None:
    CHECKS[name](*(CELL_REPORTS if name.startswith("cell: ") else ()))


def test_every_check_catches_a_bug() -> None:
    assert {bug.check for bug in BUGS} == set(CHECKS)


def test_every_number_is_there_once() -> None:
    assert [bug.number for bug in BUGS] == list(range(1, len(BUGS) + 1))


def test_a_stale_entry_is_noticed() -> None:
    with pytest.raises(StaleEntry, match="layers_by_hand has 0 places of this form"):
        swapped(CHECKS["layers_by_hand"], "no_such_call(...)", "pass").__enter__()


@pytest.mark.parametrize("tool", [replaced, swapped])
def test_the_code_is_whole_again_afterwards(tool: object) -> None:
    for break_ in (break_ for bug in BUGS for break_ in bug.breaks if break_.func is tool):
        function = break_.args[0]
        function = inspect.unwrap(function.fget if isinstance(function, property) else function)
        code, names, signature = function.__code__, set(function.__dict__), inspect.signature(function)
        with break_():
            assert function.__code__ is not code
            assert inspect.signature(function) == signature
        assert function.__code__ is code and set(function.__dict__) == names


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.number:02d}")
def test_no_entry_is_stale(bug: Bug) -> None:
    """In a second for all, where a function's form has changed."""
    for break_ in bug.breaks:
        with break_():
            pass
