"""What ``check_learner`` says of a wrong learner: the check, the first bad step, where, both values, the mistake."""

import copy
import inspect
import pickle
import random
from typing import Any

import numpy as np
import pytest
import third_party
import torch
from torch import Tensor

import oracles
import rtrl.testing
from rtrl.learners import TBPTT
from rtrl.testing import CheckFailed, LearnerSpec, Report, Stream, check_learner, learner_checks
from rtrl.testing.learner_checks.verdict import compare
from rtrl.testing.streams import dense_stream, dormant_stream


def report_of(make: Any, *checks: str, **options: Any) -> Report:
    return check_learner(make, checks=checks or None, on_fail="return", **options)


WRONG = [
    (third_party.off_by_one, "dense cell", 0, "off by one step"),
    (third_party.cut_at_borders, "dense cell", 5, "the borders of blocks of 5 steps: truncated BPTT"),
    (third_party.cut_at_borders, "long stream", 9, "the borders of blocks of 5 steps"),
    (third_party.ignores_dormant_losses, "sparse rows", 2, "losses at dormant steps of a slice were dropped"),
]


@pytest.mark.parametrize(("make", "check", "step", "words"), WRONG)
def test_a_wrong_learner_is_refused_with_the_first_bad_step_and_its_mistake(
    make: Any, check: str, step: int, words: str
) -> None:
    (failure,) = report_of(make, check).failures
    assert (failure.check, failure.step) == (check, step)
    assert words in failure.message


def test_the_values_of_a_failure_are_those_of_the_lone_sample_at_that_step() -> None:
    (failure,) = report_of(third_party.cut_at_borders, "dense cell", seed=3).failures
    assert failure.step == 5
    assert failure.sample is not None
    stream = dense_stream(3).prefix(failure.step + 1).alone(failure.sample)
    exact = oracles.bptt(stream.cell, stream.xs, stream.loss)
    name, _, index = failure.where.removeprefix("parameter ").partition("[")
    element = tuple(int(i) for i in index.rstrip("]").split(", "))
    assert float(failure.expected) == float(exact[name][element])
    assert abs(float(failure.found) - float(failure.expected)) > 1e-6


def test_before_the_first_bad_step_all_is_well() -> None:
    stream = dense_stream(0).prefix(5)
    right = LearnerSpec(third_party.cut_at_borders, streams=[stream])
    assert report_of(right, "own streams").passed
    assert not report_of(LearnerSpec(third_party.cut_at_borders, streams=[dense_stream(0)]), "own streams").passed


class _Broken(third_party.Textbook):
    """One mistake, by name."""

    mistake = ""

    def advanced(self, b: int, influence: Tensor) -> Tensor:
        size = len(influence)
        if self.mistake == "past":
            return torch.zeros_like(influence)
        if self.mistake == "one step":
            influence = torch.zeros_like(influence)
        if self.mistake not in ("transposed", "diagonal"):
            return super().advanced(b, influence)
        rows = [self.pulled(value) for value in self.h_next[b].flatten()]
        dynamics = torch.stack([by_state[b] for by_state, _ in rows])
        dynamics = dynamics.T if self.mistake == "transposed" else dynamics * torch.eye(size)
        return dynamics @ influence + torch.stack([by_theta for _, by_theta in rows])

    def backward(self, loss: Tensor) -> None:
        before = self.gradient
        super().backward(loss)
        last = self.taken == 4
        if self.mistake == "direct":
            self.gradient = self.gradient - self.pulled(loss)[1]
        elif self.mistake == "mean":
            self.gradient = before + (self.gradient - before) / self.batch_size
        elif self.mistake == "dropped" and last:
            self.gradient = before
        elif self.mistake == "twice" and last:
            self.gradient = self.gradient + (self.gradient - before)
        elif self.mistake == "factor":
            self.gradient = before + 0.25 * (self.gradient - before)
        elif self.mistake == "nothing":
            self.gradient = before


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("past", "the state's past were left out"),
        ("one step", "each loss were pulled back through 2 steps only"),
        ("transposed", "the dynamics Jacobian were transposed"),
        ("diagonal", "only the diagonal of the dynamics Jacobian were used"),
        ("direct", "the loss's direct path to the parameters were dropped"),
        ("mean", "samples were averaged, not summed"),
        ("dropped", "the loss of step 3 were dropped"),
        ("twice", "the loss of step 3 were counted twice"),
        ("factor", "the whole gradient were multiplied by 0.25"),
        ("nothing", "nothing were delivered"),
    ],
)
def test_mistakes_are_called_by_their_name(mistake: str, words: str) -> None:
    def make(cell: Any, batch_size: int) -> _Broken:
        learner = _Broken(cell, batch_size)
        learner.mistake = mistake
        return learner

    (failure,) = report_of(make, "dense cell").failures
    assert f"it looks as if {words}" in failure.message


def test_each_loss_pulled_back_through_some_steps_is_told_from_blocks() -> None:
    def sliding(cell: Any, batch_size: int) -> TBPTT:
        return TBPTT(cell, batch_size, 4)

    def chunks(cell: Any, batch_size: int) -> TBPTT:
        return TBPTT(cell, batch_size, 4, sliding=False)

    assert "pulled back through 4 steps only" in report_of(sliding, "dense cell").failures[0].message
    assert "borders of blocks of 4 steps" in report_of(chunks, "dense cell").failures[0].message


def test_a_mistake_that_has_no_name_gets_none() -> None:
    def noisy(cell: Any, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        return {name: g + 1e-3 * g.abs().max() for name, g in third_party.backpropagation(cell, xs, loss).items()}

    (failure,) = report_of(LearnerSpec(gradients=noisy), "dense cell").failures
    assert "looks as if" not in failure.message


def test_samples_that_meet_are_told_from_a_sample_that_is_wrong() -> None:
    def leaking(cell: Any, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        found = third_party.backpropagation(cell, xs, loss)
        return {name: g / xs.shape[1] for name, g in found.items()}

    (failure,) = report_of(LearnerSpec(gradients=leaking), "dense cell").failures
    assert failure.sample is None
    assert "each sample alone is right" in failure.message

    def second(cell: Any, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        marked = xs[:, :, 0].eq(dense_stream(0).xs[0, 1, 0]).any()
        found = third_party.backpropagation(cell, xs, loss)
        return {name: g * (2 if marked else 1) for name, g in found.items()}

    (failure,) = report_of(LearnerSpec(gradients=second), "dense cell").failures
    assert failure.sample == 1


def test_all_failures_are_collected_and_the_script_shows_them_again() -> None:
    with pytest.raises(CheckFailed) as caught:
        check_learner(third_party.off_by_one, seed=2, checks=["dense cell", "layers", "no loss"])
    report = caught.value.report
    assert {failure.check for failure in report.failures} == {"dense cell", "layers"}
    assert report.name == "off_by_one"
    assert "(seed 2)" in str(report)
    assert "from third_party import off_by_one" in report.script
    with pytest.raises(CheckFailed) as again:
        exec(report.script, {})
    assert str(again.value) == str(report)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(report)


def test_the_script_of_a_whole_run_names_the_checks_that_failed() -> None:
    spec = LearnerSpec(third_party.off_by_one, streams=[dense_stream(0, steps=4)], sparse=False)
    report = report_of(spec)
    failed = list(dict.fromkeys(failure.check for failure in report.failures))
    assert f"checks={failed!r}" in report.script
    assert "check_learner(spec, " in report.script
    assert report.checks + list(report.skipped) != []
    assert set(report.checks) | set(report.skipped) == set(learner_checks())


def test_nothing_of_the_callers_changes() -> None:
    stream = Stream(dense_stream(0).cell, dense_stream(0).xs)
    stream.cell.zero_grad()
    held = copy.deepcopy((stream.cell.state_dict(), stream.xs))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(), torch.get_num_threads()  # noqa: NPY002
    report_of(LearnerSpec(third_party.off_by_one, streams=[stream]), "own streams", "early syncs")
    now = torch.get_rng_state(), random.getstate(), np.random.get_state(), torch.get_num_threads()  # noqa: NPY002
    assert torch.equal(before[0], now[0])
    assert repr(before[1:]) == repr(now[1:])
    torch.testing.assert_close((stream.cell.state_dict(), stream.xs), held, rtol=0, atol=0)
    assert all(p.grad is None for p in stream.cell.parameters())


def test_what_raises_is_a_failure_with_the_step() -> None:
    class Tired(third_party.Textbook):
        def step(self, x: Any) -> Any:
            if self.taken == 3:
                raise OverflowError("too tired\nfor this")
            return super().step(x)

    (failure,) = report_of(Tired, "dense cell").failures
    assert failure.message.endswith("step raised OverflowError: too tired")
    assert failure.step == 3


def test_the_root_failure_is_shown_once_with_the_line_that_raised() -> None:
    class Broken(third_party.Textbook):
        def step(self, x: Any) -> Any:
            raise OverflowError("always")

    report = report_of(LearnerSpec(Broken, sparse=False), "dense cell", "layers", "losses at some steps")
    assert len(report.failures) == 3
    text = str(report)
    assert text.count("OverflowError: always") == 1
    assert "2 more fail like this: layers, losses at some steps" in text
    line = inspect.getsourcelines(Broken)[1] + 2
    assert f'{__file__}:{line} in step: raise OverflowError("always")' in text
    assert "learner_checks" not in text, "the frames of the checks are left out"


def test_failures_of_one_likely_mistake_are_shown_once_and_others_by_themselves() -> None:
    class AlsoWithoutLoss(third_party.OffByOne):
        """Delivers a gradient where there was no loss, too."""

        def sync(self) -> None:
            self.gradient = self.gradient + (not bool(self.gradient.any()))
            super().sync()

    spec = LearnerSpec(AlsoWithoutLoss, sparse=False)
    text = str(report_of(spec, "dense cell", "layers", "no loss", "changed parameters"))
    assert text.count("off by one step") == 1
    assert "2 more fail like this: layers, changed parameters" in text
    assert "FAIL no loss" in text


def test_streams_that_prove_nothing_are_refused() -> None:
    silent = Stream(dense_stream(0).cell, dense_stream(0).xs, lambda t, y: None, name="silence")
    (failure,) = report_of(LearnerSpec(third_party.textbook, streams=[silent]), "own streams").failures
    assert "silence: the exact gradient is zero everywhere" in failure.message


def test_different_seeds_draw_different_streams() -> None:
    assert not torch.equal(dense_stream(0).xs, dense_stream(1).xs)
    assert torch.equal(dormant_stream(2).xs, dormant_stream(2).xs)
    assert rtrl.testing.check_learner(rtrl.BlockRTRL, checks=["dense cell"], seed=7).seed == 7


@pytest.mark.parametrize(("error", "passes"), [(1e-13, True), (1e-9, False)])
@pytest.mark.parametrize("name", ["recurrent", "inward.bias"])
def test_the_tolerance_is_rounding_error_of_each_parameter(name: str, error: float, passes: bool) -> None:
    def nearly(cell: Any, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        found = third_party.backpropagation(cell, xs, loss)
        row = found[name].reshape(len(found[name]), -1)[1]
        row[0] += error * row.abs().max()
        return found

    report = report_of(LearnerSpec(gradients=nearly), "dense cell")
    assert report.passed == passes
    assert passes or report.failures[0].where.startswith(f"parameter {name}[1")


def test_a_small_slice_is_held_to_its_own_scale() -> None:
    expected = {"weight": torch.tensor([[1.0, 2.0], [1e-3, 3e-3]], dtype=torch.float64)}
    for error, equal in ((1e-14, True), (1e-12, False)):
        found = {"weight": expected["weight"] + error * torch.tensor([[0.0, 0.0], [1.0, 0.0]])}
        assert (compare(found, expected) is None) == equal
    wrong = compare({"weight": expected["weight"] * torch.nan}, expected)
    assert wrong is not None
    assert (wrong.where, wrong.found, wrong.expected) == ("parameter weight[0, 0]", "nan", "1")
