"""The old name of a cell's own derivatives is still understood, or its owner is told the new one."""

import pytest
import torch
from helpers.toy_cells import PlainRNN

import rtrl


def test_the_old_name_of_the_class_warns_and_works() -> None:
    with pytest.warns(DeprecationWarning, match="AnalyticStep"):
        assert rtrl.cells.ClosedForm is rtrl.cells.AnalyticStep
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rtrl.cells.no_such_name


class _OldMethod(PlainRNN):
    def linearize(self, x: torch.Tensor, h: torch.Tensor) -> None:
        raise AssertionError("must not be called")


def test_the_old_name_of_the_method_is_not_passed_over_in_silence() -> None:
    with pytest.warns(DeprecationWarning, match="analytic_step"):
        rtrl.BlockRTRL(_OldMethod(2, 3), 1)
