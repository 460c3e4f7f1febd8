"""The old names of modules still import, with a warning that says the new one."""

import importlib

import pytest
from helpers import fresh_process

import rtrl
from rtrl._utils.renamed_modules import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_imports_and_says_the_new_one(old: str) -> None:
    script = (
        "import importlib, sys, warnings, rtrl\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    module = importlib.import_module({old!r})\n"
        "print([str(w.message) for w in caught if w.category is DeprecationWarning])\n"
    )
    assert f"{old} is called {MOVED[old]} now" in fresh_process.run(script).stdout


def test_what_an_old_module_had_is_what_the_new_one_has() -> None:
    with pytest.warns(DeprecationWarning, match=r"rtrl\.learners"):
        old = importlib.import_module("rtrl.baselines")
    assert old.BPTT is rtrl.learners.BPTT
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = old.no_such_name


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rtrl.never_was")
