"""Learners of one dtype, one batch size, one loss or one cell: what their specs say, and what they hear without."""

from typing import Any

import pytest
import third_party
import torch
from test_wrong_learners import Whole
from torch import Tensor, nn

import rtrl
from rtrl.errors import ConfigError
from rtrl.testing import LearnerSpec, Report, check_learner, streams_for
from rtrl.testing.streams import dense_stream, squares


def report_of(spec: Any, *checks: str) -> Report:
    return check_learner(spec, checks=checks, on_fail="return")


class Single(Whole):
    """Takes float32 only."""

    def __init__(self, cell: Any, batch_size: int) -> None:
        assert all(p.dtype == torch.float32 for p in cell.parameters())
        super().__init__(cell, batch_size)

    def step(self, x: Any) -> Any:
        assert x.dtype == torch.float32
        return super().step(x)


class OneHundredthOff(Single):
    def backward(self, loss: Tensor) -> None:
        super().backward(1.01 * loss)


QUICK = ("interface", "dense cell", "cell unchanged", "save and load", "losses with a penalty", "drawn mixtures")


def test_a_learner_of_float32_is_held_to_the_gradient_in_float64() -> None:
    spec = LearnerSpec(Single, sparse=False, dtype=torch.float32)
    report = report_of(spec, *QUICK, "float32")
    assert report.passed, report
    assert set(report.checks) == set(QUICK)
    assert "all checks run in float32" in report.skipped["float32"]
    assert not report_of(LearnerSpec(Single, sparse=False), "dense cell").passed
    assert not report_of(LearnerSpec(OneHundredthOff, sparse=False, dtype=torch.float32), "dense cell").passed


def test_influences_in_float32_are_compared_too() -> None:
    for make, passes in ((rtrl.BlockRTRL, True), (_DoubledInfluence, False)):
        spec = LearnerSpec(make, sparse=False, dtype=torch.float32)
        assert report_of(spec, "influence").passed == passes


class _DoubledInfluence(rtrl.BlockRTRL):
    def influence(self, name: str) -> Tensor:
        return 2 * super().influence(name)


class OfFour(Whole):
    """Takes batches of four only."""

    def __init__(self, cell: Any, batch_size: int) -> None:
        assert batch_size == 4
        super().__init__(cell, batch_size)


class MeanOfFour(OfFour):
    def counted(self, b: int) -> Any:
        return 0.25


def test_a_learner_of_one_batch_size_meets_no_other() -> None:
    checks = ("interface", "dense cell", "unusual parameters", "resets of several samples")
    assert report_of(LearnerSpec(OfFour, sparse=False, batch=4), *checks).checks == list(checks)
    assert not report_of(LearnerSpec(OfFour, sparse=False), "dense cell").passed


def test_each_sample_alone_is_right_is_said_only_where_it_was_tried() -> None:
    class Mean(Whole):
        def counted(self, b: int) -> Any:
            return 1 / self.batch_size

    (failure,) = report_of(LearnerSpec(Mean, sparse=False), "dense cell").failures
    assert "each sample alone is right" in failure.message
    (failure,) = report_of(LearnerSpec(MeanOfFour, sparse=False, batch=4), "dense cell").failures
    assert "alone" not in failure.message
    assert failure.sample is None


class OfOneLoss(Whole):
    """Computes its loss itself."""

    def step(self, x: Any) -> Any:
        self.output = super().step(x)
        return self.output

    def backward(self, loss: Tensor) -> None:
        super().backward(squares(self.taken - 1, self.output))


def test_a_learner_of_one_loss_meets_no_other() -> None:
    spec = LearnerSpec(OfOneLoss, sparse=False, losses="own")
    report = report_of(spec, "dense cell", "losses of all scales", "no loss", "drawn mixtures")
    assert report.checks == ["dense cell", "drawn mixtures"]
    assert 'losses="own"' in report.skipped["no loss"]
    assert not report_of(LearnerSpec(OfOneLoss, sparse=False), "losses of all scales").passed


class OfItsOwnCell(rtrl.BlockRTRL):
    """Ignores the cell that it is given."""

    def __init__(self, cell: nn.Module, batch_size: int) -> None:
        super().__init__(_gru(self.width), batch_size)

    width = 3


class OfACellOfTheSameForm(OfItsOwnCell):
    width = 2


def _gru(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return rtrl.cells.from_torch(nn.GRUCell(width, 2)).double()


def _of_gru(cell: Any, batch_size: int) -> Any:
    assert cell.cell.weight_hh is not None
    return rtrl.BlockRTRL(cell, batch_size)


@pytest.mark.parametrize("make", [OfItsOwnCell, OfACellOfTheSameForm, _of_gru])
def test_a_learner_of_one_cell_hears_at_once_that_it_needs_streams(make: Any) -> None:
    report = report_of(LearnerSpec(make, sparse=False), "interface", "layers")
    assert report.failures[0].check == "interface"
    assert "streams=rtrl.testing.streams_for(make_cell)" in report.failures[0].message


def test_a_learner_that_uses_no_cell_of_others_hears_that_no_gradient_arrives() -> None:
    def elsewhere(cell: Any, batch_size: int) -> Any:
        learner = rtrl.BlockRTRL(cell, batch_size)
        copied = [p.detach().clone() for p in cell.parameters()]
        learner.sync = lambda: [p.zero_() for p in copied]  # type: ignore[method-assign, assignment]
        return learner

    (failure,) = report_of(LearnerSpec(elsewhere, sparse=False), "interface").failures
    assert "no parameter of the cell given to make_learner has a .grad" in failure.message


def test_streams_of_a_cell_are_long_wide_and_reset() -> None:
    streams = streams_for(_gru)
    assert {stream.batch_size for stream in streams} >= {1, 5}
    assert max(stream.steps for stream in streams) >= 150
    assert any(stream.resets is not None for stream in streams)
    report = report_of(LearnerSpec(_of_gru, streams=streams), "interface", "own streams", "drawn mixtures")
    assert report.passed and len(report.checks) == 3
    assert {stream.batch_size for stream in streams_for(_gru, batch=4)} == {4}


def test_a_learner_without_resets_is_not_given_the_streams_with_resets() -> None:
    spec = LearnerSpec(third_party.textbook, streams=streams_for(_gru)[1:4], sparse=False)
    assert report_of(spec, "own streams", "losses at some steps").passed
    only = LearnerSpec(third_party.textbook, streams=streams_for(_gru)[3:4], sparse=False)
    assert "learner has no reset" in report_of(only, "own streams").skipped["own streams"]


def test_inputs_that_cannot_be_guessed_are_asked_for() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def init_state(self, batch_size: int) -> Tensor:
            return self.weight.new_zeros(batch_size, 2)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(x @ self.weight + h)
            return h, h

    with pytest.raises(ConfigError, match="give make_xs"):
        streams_for(Hidden)
    streams = streams_for(Hidden, lambda steps, batch: torch.ones(steps, batch, 3, dtype=torch.float64))
    assert report_of(LearnerSpec(rtrl.BlockRTRL, streams=streams), "own streams").passed


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LearnerSpec(Whole, dtype=torch.float16), "dtype must be torch.float64 or torch.float32"),
        (lambda: LearnerSpec(Whole, losses="mine"), 'losses must be "any" or "own"'),  # type: ignore[arg-type]
        (lambda: LearnerSpec(Whole, batch=0), "batch must be a positive integer"),
        (lambda: LearnerSpec(Whole, batch=2, streams=[dense_stream(0)]), "'dense' has a batch of 5"),
        (lambda: streams_for(nn.GRUCell(2, 3)), "make_cell must be a function"),  # type: ignore[arg-type]
        (lambda: streams_for(lambda: 3), "must return a torch.nn.Module"),  # type: ignore[arg-type, return-value]
    ],
)
def test_what_is_no_such_spec_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()
