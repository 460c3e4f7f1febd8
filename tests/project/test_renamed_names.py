"""Names that users could have: the old one still works for one release and warns, or its owner is told the new one."""

import importlib

import pytest
import torch
from helpers.toy_cells import PlainRNN

import rtrl

RENAMED = [
    ("rtrl.cells", "ClosedForm", "AnalyticStep"),
    ("rtrl.profiling.live_bytes", "AliveBytes", "LiveBytes"),
    ("rtrl.report", "Claim", "ClaimResult"),
    ("rtrl.report", "Grid", "Table"),
    ("rtrl.tasks", "Moment", "TaskStep"),
    ("rtrl.tasks", "Stream", "TaskStream"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_warns_and_works(module: str, old: str, new: str) -> None:
    found = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is called {new} now"):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = found.no_such_name


class _OldMethod(PlainRNN):
    def linearize(self, x: torch.Tensor, h: torch.Tensor) -> None:
        raise AssertionError("must not be called")


def test_the_old_name_of_an_analytic_step_is_not_passed_over_in_silence() -> None:
    with pytest.warns(DeprecationWarning, match="analytic_step"):
        rtrl.BlockRTRL(_OldMethod(2, 3), 1)
