"""A red oracle voids the number, and a bar that is missed is heard: the benchmarks can fail."""

from types import SimpleNamespace
from typing import Any

import agreement
import jax_rivals
import pytest
import torch
from bars import BARS, Bar
from measuring import Measurement
from rivals import Unrolled


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    agreement.check_agreement.cache_clear()
    agreement.check_jax_agreement.cache_clear()


@pytest.mark.parametrize("side", ["Ours", "Textbook", "Unrolled"])
def test_a_side_that_truncates_is_red(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays so: what has raised is not remembered as checked."""
    monkeypatch.setattr(agreement, side, lambda problem, *_, **__: Unrolled(problem, 1))
    for _ in range(2):
        with pytest.raises(AssertionError, match="gradients differ"):
            agreement.check_agreement("rnn")
    monkeypatch.undo()
    agreement.check_agreement("rnn")


@pytest.mark.skipif(not jax_rivals.available, reason=jax_rivals.REASON)
@pytest.mark.parametrize("function", ["rtrl", "bptt"])
def test_jax_that_truncates_is_red(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(theta: Any, h: Any, xs: Any, targets: Any) -> tuple[Any, Any]:
        return jax_rivals.bptt(theta, h, xs[-1:], targets[-1:])

    monkeypatch.setattr(agreement, function, truncated)
    with pytest.raises(AssertionError, match="gradients differ"):
        agreement.check_jax_agreement()


def test_a_rough_comparison_still_sees_what_is_wrong() -> None:
    right = {"w": torch.tensor([1.0, 2.0])}
    agreement.assert_roughly_equal({"w": right["w"] * 1.0001}, right)
    with pytest.raises(AssertionError):
        agreement.assert_roughly_equal({"w": right["w"] * 1.01}, right)
    with pytest.raises(AssertionError, match="proves nothing"):
        agreement.assert_roughly_equal(right, {"w": torch.zeros(2)})


def settle(size: str, clock: bool, **measured: float) -> dict[str, Any]:
    """What is stored, whether or not it is then refused."""
    benchmark = SimpleNamespace(extra_info={})
    names = {name.replace("_", "."): value for name, value in measured.items()}
    try:
        Measurement(benchmark, size, clock).settle(names)
    except AssertionError as missed:
        return {**benchmark.extra_info, "missed": str(missed)}
    return benchmark.extra_info


def test_a_count_is_judged_in_every_run_and_a_time_at_full_size_alone() -> None:
    assert "missed" not in settle("small", False, rnn_fewer=6.0)
    assert "rnn.fewer: 5 × fewer" in settle("small", False, rnn_fewer=5.0)["missed"]
    assert "the bar is ≥ 40" in settle("full", False, rnn_fewer=39.0)["missed"]
    assert "missed" not in settle("small", True, rnn_faster=1.0)
    assert "rnn.faster" in settle("full", True, rnn_faster=99.0)["missed"]
    assert "missed" not in settle("full", True, rnn_faster=100.0)
    assert "stream.rss" in settle("full", False, stream_rss=1.02)["missed"]


def test_what_misses_its_bar_is_in_the_results_and_nan_misses_every_bar() -> None:
    assert settle("full", True, rnn_faster=99.0)["measured"] == {"rnn.faster": 99.0}
    assert "missed" in settle("full", True, rnn_faster=float("nan"), cells_rnn=float("nan"))


def test_every_control_must_break_the_bar_above_it() -> None:
    """A bar and its control accept no common number but the bound."""
    above: Bar | None = None
    for name, bar in BARS.items():
        if not bar.control:
            above = bar
            continue
        assert above is not None
        assert bar.kind == above.kind, name
        assert bar.relation != above.relation, name
        for size in ("small", "full"):
            bound, control = above.bound(size), bar.bound(size)
            if bound is not None and control is not None:
                assert control >= bound if bar.relation == "≥" else control <= bound, name
