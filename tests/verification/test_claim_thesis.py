"""The claim about a sparse mixture on a long stream: its verdict from planted outcomes, and its parts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rtrl.learners import TBPTT
from rtrl.verification.thesis import sides
from rtrl.verification.thesis.signal import Signal
from rtrl.verification.thesis.sparse_stream import Config, Sides, measure


def outcome(rtrl: float = 1.0, tbptt: float = 0.25, steps: int = 100_000, **changes: Any) -> Sides:
    trained = [sides.Trained("", 9, {steps: value}, {steps: 1.0}, 9, 2.0, value) for value in (rtrl, tbptt, 0.8)]
    config = Config(training=sides.Training(steps=steps))
    m = Sides(config=config, rtrl=trained[:1], tbptt=trained[1:2], dense=trained[2:], horizon=130)
    return replace(m, routing=[sides.Routing(0.9, 50, 1, 0.5)], **changes)


@pytest.mark.parametrize(
    ("m", "verdict", "words"),
    [
        (outcome(), "holds when", "longer than the horizon that the bytes buy (130). The dense cell of equal cost"),
        (outcome(rtrl=0.9), "does not hold", "BlockRTRL answers 90.0 %"),
        (outcome(tbptt=0.5), "does not hold", "truncated BPTT of the same bytes answers 50.0 %"),
        (outcome(horizon=172), "not measured", "reaches over the gap of 172"),
        (outcome(steps=5000), "not measured at the claimed size", "after 5,000 steps BlockRTRL answers 100.0 %"),
        (outcome(failures=["inexact"]), "does not hold", "gradients of the mixture are not exact"),
    ],
)
def test_verdicts(m: Sides, verdict: str, words: str) -> None:
    found = measure.judge(m)
    assert (found.name, words in found.condition) == (verdict, True), found


def test_the_signal_is_asked_for_after_the_gap() -> None:
    signal = Signal(gap=5)
    steps = [step for _, step in zip(range(2 * signal.steps), signal.stream(3, 0), strict=False)]
    assert [t for t, step in enumerate(steps) if step.is_first] == [0, signal.steps]
    assert [t % signal.steps for t, step in enumerate(steps) if step.target is not None] == [6, 6]
    assert torch.equal(steps[0].x[:, :4].argmax(dim=1), steps[6].target)
    assert not any(step.x[:, :4].any() for step in steps[1 : signal.steps])


def test_the_horizon_is_the_longest_within_the_bytes() -> None:
    training = sides.Training(Signal(gap=9), batch_size=2)
    cell = sides.Mixture(d_model=2, n_slots=2, n_experts=4).cell(training.signal, 0)
    held = {k: sides.held_bytes(TBPTT(cell, 2, k), training.signal, k + 4) for k in (9, 10)}
    assert sides.horizon_within(held[9], cell, training) == sides.horizon_within(held[10] - 1, cell, training) == 9
