"""What a spec may say, how each law refuses a learner that breaks it, and how often it errs."""

import functools
import unittest
from dataclasses import replace
from typing import Any

import pytest
import third_party
import torch
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import Ring, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ConfigError
from rtrl.learners import TBPTT, UORO, SnAp
from rtrl.testing import (
    BoundCheck,
    CellSpec,
    CheckFailed,
    ErrorInput,
    Exact,
    ExactWithin,
    Law,
    LearnerSpec,
    Masked,
    Report,
    Stream,
    Truncated,
    Unbiased,
    bound_checks,
    check_learner,
    learner_checks,
    parametrize_with_checks,
)
from rtrl.testing.laws import student
from rtrl.testing.streams import dense_stream, layered_stream, normal


def report_of(spec: Any, *checks: str, **options: Any) -> Report:
    return check_learner(spec, checks=checks or None, on_fail="return", **options)


def own(learner: Any, law: Law, stream: Stream | None = None) -> LearnerSpec:
    return LearnerSpec(learner, law=law, streams=[dense_stream(0) if stream is None else stream], name="mine")


# ---------------------------------------------------------------- laws


def test_exact_within_a_horizon_holds_there_and_not_beyond() -> None:
    make = functools.partial(TBPTT, horizon=4)
    assert report_of(own(make, ExactWithin(4)), "own streams").passed
    (failure,) = report_of(own(make, ExactWithin(5)), "own streams").failures
    assert failure.step == 4


@pytest.mark.parametrize("sliding", [True, False])
@pytest.mark.parametrize("horizon", [2, 3, 4])
def test_truncated_tells_one_horizon_from_the_next_and_windows_from_chunks(sliding: bool, horizon: int) -> None:
    make = functools.partial(TBPTT, horizon=3, sliding=sliding)
    assert report_of(own(make, Truncated(horizon, sliding)), "own streams").passed == (horizon == 3)
    assert not report_of(own(make, Truncated(3, not sliding)), "own streams").passed
    assert not report_of(own(make, Exact()), "own streams").passed


def ring() -> Stream:
    return Stream(seeded(Ring(2, 4), 0), normal(0, 14, 2, 2), name="ring")


class _Shifted(SnAp):
    """Keeps an entry outside the mask that it declares."""

    def mask(self, name: str) -> Tensor:
        return super().mask(name) & (torch.arange(super().mask(name).shape[1]) != 3)


class _Everything(SnAp):
    """Declares that it keeps everything."""

    def mask(self, name: str) -> Tensor:
        return torch.ones_like(super().mask(name))


def test_masked_refuses_a_mask_that_is_not_the_learners() -> None:
    assert report_of(own(functools.partial(SnAp, order=2), Masked(), ring()), "own streams", "influence").passed
    for wrong in (_Shifted, _Everything):
        report = report_of(own(functools.partial(wrong, order=2), Masked(), ring()), "own streams", "influence")
        assert {failure.check for failure in report.failures} == {"own streams", "influence"}, wrong


def test_masked_takes_the_mask_from_a_function() -> None:
    law = Masked(lambda learner, name: learner.mask(name) & False)
    assert not report_of(own(functools.partial(SnAp, order=1), law, ring()), "own streams").passed


def _scaled(factor: float) -> Any:
    class Scaled(UORO):
        def _pull(self, adjoint: Tensor) -> Tensor:
            return factor * super()._pull(adjoint)

    return Scaled


SHORT = dense_stream(0, batch=1)


def test_unbiased_passes_the_unbiased_and_refuses_what_is_biased_by_much() -> None:
    law = Unbiased(draws=200)
    stream = replace(SHORT, loss=lambda t, y: SHORT.loss(t, y) if t == 2 else None)
    assert report_of(own(UORO, law, stream), "own streams").passed
    for factor in (-1.0, 2.0):
        (failure,) = report_of(own(_scaled(factor), law, stream), "own streams").failures
        assert "mean of 200 draws" in failure.where
        assert "standard errors off" in failure.found
        assert failure.step == 2


def test_unbiased_refuses_what_does_not_draw_at_all() -> None:
    (failure,) = report_of(own(_scaled(0.0), Unbiased(draws=30), SHORT), "own streams").failures
    assert "all draws are equal" in failure.message


def test_unbiased_refuses_what_no_draw_can_tell_from_nothing() -> None:
    def wild(cell: nn.Module, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        exact = third_party.backpropagation(cell, xs, loss)
        return {name: g + 1e4 * torch.randn_like(g) for name, g in exact.items()}

    spec = LearnerSpec(gradients=wild, law=Unbiased(draws=60), streams=[SHORT])
    (failure,) = report_of(spec, "own streams").failures
    assert "use more draws" in failure.message


def _scattered(law: Law, scatter: float) -> Any:
    """A function whose mean is what a law requires, with a scatter relative to the norm of that."""
    means: dict[int, Any] = {}

    def gradients(cell: nn.Module, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        if len(xs) not in means:
            means[len(xs)] = law.reference(Stream(cell, xs, loss), None)
        size = torch.cat([g.flatten() for g in means[len(xs)].values()]).norm()
        return {name: g + scatter * size * torch.randn_like(g) for name, g in means[len(xs)].items()}

    return gradients


def test_unbiased_sees_a_forgotten_past_that_is_small_beside_the_rest() -> None:
    whole = layered_stream(0, steps=9).alone(0)  # its far past is spread over many entries
    stream = replace(whole, loss=lambda t, y: whole.loss(t, y) if t > 6 else None)
    directions = Unbiased(horizon=9, reach=3).directions(stream)
    assert list(directions) == ["the exact gradient", "its part from more than 3 steps back"]
    exact, past = (torch.cat([g.flatten() for g in part.values()]).norm() for part in directions.values())
    far = float(past / exact)

    def passes(mean: Law, scatter: float, reach: int | None) -> Report:
        law = Unbiased(draws=60, horizon=9, reach=reach)
        spec = LearnerSpec(gradients=_scattered(mean, scatter * far), law=law, streams=[stream], name="scattered")
        return report_of(spec, "own streams")

    assert passes(Truncated(3), 1.0, None).passed, "without reach it goes unseen"
    (failure,) = passes(Truncated(3), 1.0, 3).failures
    assert "along its part from more than 3 steps back" in failure.where
    assert passes(Exact(), 1.0, 3).passed
    (failure,) = passes(Exact(), 3.0, 3).failures
    assert "without it would pass as well; use more draws" in failure.message
    assert passes(Exact(), 3.0, 9).passed, "nothing is further back than the stream is long"


def test_the_long_stream_of_an_unbiased_learner_asks_for_the_past() -> None:
    def long(mean: Law) -> Report:
        spec = LearnerSpec(gradients=_scattered(mean, 0.5), law=Unbiased(draws=40), name="scattered")
        return report_of(spec, "long stream")

    assert long(Exact()).passed
    (failure,) = long(Truncated(3)).failures
    assert "three horizons" in failure.message


def test_an_unbiased_verdict_depends_on_the_seed_alone() -> None:
    spec = own(_scaled(2.0), Unbiased(draws=40), SHORT)
    texts = []
    for _ in range(2):
        torch.rand(7)
        texts.append(str(report_of(spec, "own streams", seed=4)))
    assert texts[0] == texts[1]
    assert texts[0] != str(report_of(spec, "own streams", seed=5))


@pytest.mark.parametrize(
    ("z", "freedom", "value"),
    [(1.959964, 30, 2.042272), (2.575829, 60, 2.660283), (1.959964, 120, 1.979930), (3.290527, 30, 3.645959)],
)
def test_students_quantile_is_that_of_the_tables(z: float, freedom: int, value: float) -> None:
    assert student(z, freedom) == pytest.approx(value, rel=1e-5)


def test_the_stated_rate_of_false_alarms_is_kept() -> None:
    """400 000 honest means of normal draws, refused at a stated rate of 2 %: the count is binomial, and within five of
    its standard deviations with a chance of more than 1 − 6e-7."""
    law, runs, tests = Unbiased(draws=30, false_alarm=0.02), 4000, 100
    draws = torch.randn(30, runs, tests, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deviation = draws.mean(dim=0).abs() / (draws.std(dim=0) / 30**0.5)
    alarms = int((deviation > law.quantile(tests)).any(dim=1).sum())
    assert abs(alarms - 0.02 * runs) < 5 * (runs * 0.02 * 0.98) ** 0.5


def test_a_masked_oracle_is_the_recursion_written_out() -> None:
    stream = ring()
    mask = {"recurrent": torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.5}
    found, influences = oracles.dense_rtrl(stream.cell, stream.xs[:5], stream.loss, mask=mask, return_influence=True)
    whole = oracles.dense_rtrl(stream.cell, stream.xs[:5], stream.loss, mask={})
    assert_gradients_equal({"inward": found["inward"]}, {"inward": whole["inward"]})
    assert not torch.equal(found["recurrent"], whole["recurrent"])
    cell: Any = stream.cell
    kept, h = torch.zeros(2, 4, 16, dtype=torch.float64), cell.init_state(2)
    for x in stream.xs[:5]:
        slope = 1 - cell(x, h)[1].detach().square()
        weight = (cell.recurrent * cell.ring).detach()
        immediate = torch.einsum("bi,ir,rc,bc->birc", slope, torch.eye(4).double(), cell.ring, h).reshape(2, 4, 16)
        kept = (slope.unsqueeze(2) * weight @ kept + immediate) * mask["recurrent"]
        h = cell(x, h)[1].detach()
    torch.testing.assert_close(influences[-1]["recurrent"], kept, rtol=1e-12, atol=1e-14)
    for bad in ({"nobody": mask["recurrent"]}, {"recurrent": mask["recurrent"].T}, {"recurrent": torch.ones(4, 16)}):
        with pytest.raises(ValueError, match="mask"):
            oracles.dense_rtrl(stream.cell, stream.xs, stream.loss, mask=bad)


# ---------------------------------------------------------------- specs


def _gru() -> nn.Module:
    return rtrl.cells.from_torch(nn.GRUCell(2, 3)).double()


BAD: list[tuple[str, Any, str]] = [
    ("neither form", lambda: LearnerSpec(), "either make_learner.* or gradients"),
    ("both forms", lambda: LearnerSpec(rtrl.BlockRTRL, gradients=third_party.backpropagation), "either"),
    ("no function", lambda: LearnerSpec(3), "must be functions, got int"),  # type: ignore[arg-type]
    ("no law", lambda: LearnerSpec(rtrl.BlockRTRL, law="exact"), "one of rtrl.testing's laws"),  # type: ignore[arg-type]
    ("a law's class", lambda: LearnerSpec(rtrl.BlockRTRL, law=Exact), "one of"),  # type: ignore[arg-type]
    ("no stream", lambda: LearnerSpec(rtrl.BlockRTRL, streams=[3]), "must hold Streams, got int"),  # type: ignore[list-item]
    ("no error input", lambda: LearnerSpec(rtrl.BlockRTRL, errors=[3]), "hold ErrorInputs"),  # type: ignore[list-item]
    ("a float32 stream", lambda: Stream(_gru().float(), torch.ones(3, 2, 2).double()), "parameter .* call .double"),
    ("float32 inputs", lambda: Stream(_gru(), torch.ones(3, 2, 2)), "xs must be in float64"),
    ("no first state", lambda: Stream(nn.GRUCell(2, 3).double(), torch.ones(3, 2, 2).double()), "init_state"),
    ("no loss function", lambda: Stream(_gru(), torch.ones(3, 2, 2).double(), loss=3), "loss must be a function"),  # type: ignore[arg-type]
    ("resets of another form", lambda: Stream(_gru(), torch.ones(3, 2, 2).double(), resets=torch.ones(3)), "resets"),
    ("too few offsets", lambda: Stream(_gru(), torch.ones(3, 2, 2).double(), offsets=[{}]), "one dict a step, got 1"),
    ("a mask that is none", lambda: Masked(3), "mask must be a function"),  # type: ignore[arg-type]
    ("streams that are none", lambda: LearnerSpec(rtrl.BlockRTRL, streams=None), "must be a list of Streams"),  # type: ignore[arg-type]
    ("a flag that is none", lambda: LearnerSpec(rtrl.BlockRTRL, sparse="no"), "sparse must be True or False"),  # type: ignore[arg-type]
    ("a name that is none", lambda: LearnerSpec(rtrl.BlockRTRL, name=3), "name must be a text"),  # type: ignore[arg-type]
    ("no xs", lambda: Stream(_gru(), torch.ones(3)), r"xs must be a tensor \(T, B"),
    ("no cell", lambda: Stream(3, torch.ones(3, 2, 2)), "cell must be a torch.nn.Module"),  # type: ignore[arg-type]
    ("no horizon", lambda: ExactWithin(0), "horizon must be a positive integer"),
    ("half a horizon", lambda: Truncated(1.5), "horizon must be a positive integer"),  # type: ignore[arg-type]
    ("too few draws", lambda: Unbiased(draws=5), "draws must be an integer of at least 30"),
    ("no reach", lambda: Unbiased(reach=0), "reach must be a positive integer"),
    ("no rate", lambda: Unbiased(false_alarm=0.0), "false_alarm must be a number between 0 and 1"),
    ("a cell in place of its maker", lambda: CellSpec(nn.GRUCell(2, 3), []), "make_cell must be a function"),  # type: ignore[arg-type]
    ("an unknown check", lambda: check_learner(rtrl.BlockRTRL, checks=["dense"]), "no check 'dense'; there are: inter"),
    ("a check for a list", lambda: check_learner(rtrl.BlockRTRL, checks="layers"), "must be a list of names"),
    ("no checks", lambda: check_learner(rtrl.BlockRTRL, checks=[]), "must be a list of names"),
    ("two specs", lambda: check_learner(own(UORO, Exact()), own(UORO, Exact())), "or the spec alone"),
    ("no spec", lambda: check_learner(UORO, 3), "spec must be a LearnerSpec"),  # type: ignore[arg-type]
    ("a wrong seed", lambda: check_learner(UORO, seed=-1), "seed must be"),
    ("a wrong on_fail", lambda: check_learner(UORO, on_fail="warn"), "on_fail"),  # type: ignore[arg-type]
    ("no specs", lambda: bound_checks([]), "at least one"),
    ("one spec for a list", lambda: bound_checks(own(UORO, Exact())), "must be a list"),  # type: ignore[arg-type]
    ("a learner for a spec", lambda: bound_checks([UORO]), "must hold LearnerSpecs"),  # type: ignore[list-item]
    ("one name twice", lambda: bound_checks([own(UORO, Exact()), own(UORO, Exact())]), "two specs are called 'mine'"),
]


@pytest.mark.parametrize(("make", "match"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_bad_specs_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


def with_expected(reasons: Any) -> LearnerSpec:
    return LearnerSpec(
        third_party.cut_at_borders, name="cut", streams=[dense_stream(0)], sparse=False, expected_failures=reasons
    )


def test_an_expected_failure_does_not_count_and_is_shown_with_its_reason() -> None:
    report = report_of(with_expected({"own streams": "it is truncated"}), "own streams", "no loss")
    assert report.passed
    assert "failed as expected: own streams: it is truncated" in str(report)
    assert "passed: no loss" in str(report)
    assert [failure.check for failure in report.expected] == ["own streams"]


@pytest.mark.parametrize(("check", "words"), [("no loss", "but it passes"), ("dense cell", "but it is not judged")])
def test_a_stale_expectation_is_a_failure(check: str, words: str) -> None:
    (failure,) = report_of(with_expected({check: "why not"}), check).failures
    assert failure.check == check
    assert words in failure.message


@pytest.mark.parametrize(
    "reasons", [{"own stream": "a reason"}, {"own streams": ""}, {"own streams": 3}, ["own streams"]]
)
def test_expectations_without_check_or_reason_are_errors(reasons: Any) -> None:
    for run in (lambda spec: check_learner(spec, checks=["own streams"]), lambda spec: bound_checks([spec])):
        with pytest.raises(ConfigError, match="expected_failures"):
            run(with_expected(reasons))


def _refuses_nan(learner: Any) -> None:
    learner.step(torch.full((learner.batch_size, 2), float("nan"), dtype=torch.float64))


def test_error_inputs_must_be_refused_as_declared_and_nothing_lost() -> None:
    def report(make: Any, *errors: ErrorInput) -> Report:
        return report_of(LearnerSpec(make, errors=errors, name="mine"), "error inputs")

    good = ErrorInput("NaN", _refuses_nan, rtrl.errors.NonFiniteError, "NaN")
    assert report(rtrl.BlockRTRL, good).passed
    (failure,) = report(third_party.textbook, good).failures[:1]
    assert "NaN: it is not refused" in failure.message
    (failure,) = report(rtrl.BlockRTRL, ErrorInput("NaN", _refuses_nan, KeyError)).failures
    assert "another error than declared" in failure.message
    (failure,) = report(rtrl.BlockRTRL, ErrorInput("NaN", _refuses_nan, RuntimeError.__base__, "elephant")).failures  # type: ignore[arg-type]
    assert "another error" in failure.message

    def loses(learner: Any) -> None:
        learner.reset()
        raise KeyError("after the damage")

    (failure,) = report(rtrl.BlockRTRL, ErrorInput("a reset", loses, KeyError)).failures
    assert "after it was refused, the gradient is wrong" in failure.message


# ---------------------------------------------------------------- one test a check


def test_bound_checks_are_run_one_by_one() -> None:
    checks = {check.name: check for check in bound_checks([with_expected({"own streams": "truncated"})])}
    assert list(checks) == learner_checks()
    with pytest.raises(unittest.SkipTest, match="has streams of its own"):
        checks["dense cell"]()
    with pytest.raises(CheckFailed, match="blocks of 5 steps"):
        checks["own streams"]()
    assert checks["own streams"].reason == "truncated"
    checks["no loss"]()


def test_an_expected_failure_that_is_not_judged_is_no_skip() -> None:
    (check,) = [c for c in bound_checks([with_expected({"dense cell": "why not"})]) if c.name == "dense cell"]
    with pytest.raises((ConfigError, unittest.SkipTest), match="but it is not judged; take it out") as caught:
        check()
    assert caught.type is ConfigError


def test_bound_checks_of_a_cell_share_one_run() -> None:
    made = []

    def make_cell() -> nn.Module:
        made.append(1)
        return rtrl.cells.from_torch(nn.GRUCell(2, 3)).double()

    checks = bound_checks([CellSpec(make_cell, [torch.ones(2, 2, dtype=torch.float64)], name="gru")])
    for check in checks:
        check()
    assert len(made) == 1
    assert checks[0].id == "gru-returns"


def test_parametrize_marks_expected_failures_strictly() -> None:
    mark = parametrize_with_checks([with_expected({"own streams": "truncated"})]).mark
    params = {param.id: param for param in mark.args[1]}
    assert set(params) == {f"cut-{name}" for name in learner_checks()}
    (xfail,) = params["cut-own streams"].marks
    assert xfail.kwargs["strict"] is True
    assert xfail.kwargs["raises"] is CheckFailed
    assert not params["cut-layers"].marks
    assert all(isinstance(param.values[0], BoundCheck) for param in params.values())
