"""The tanh network beside what one would otherwise pick: jitted JAX, RTRL and backpropagation through time, in one run.

Compiling is not timed. JAX's operations are not counted: without a clock, only the gradients are compared.
"""

from typing import Any

import jax_rivals
import pytest
from agreement import assert_roughly_equal, check_agreement, check_jax_agreement
from measuring import Measurement, curve
from problems import dense
from rivals import Ours, Textbook, Unrolled

from rtrl.profiling.timing import alternate, median_ratio, medians


@pytest.mark.skipif(not jax_rivals.available, reason=jax_rivals.REASON)
def test_jitted_jax(measurement: Measurement, benchmark: Any) -> None:
    check_agreement("rnn")
    check_jax_agreement()
    measured: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    sizes = measurement.sizes.peers
    for size in sizes:
        problem = dense("rnn", size, steps=size)
        steps = measurement.sizes.peer_steps.get(size, size)
        ours = Ours(problem, block=size)
        if not measurement.clock:
            break
        rtrl = jax_rivals.Scan(jax_rivals.rtrl, problem, steps)
        bptt = jax_rivals.Scan(jax_rivals.bptt, problem, size)
        for scan in (rtrl, bptt):
            unrolled = Unrolled(problem, scan.advance())
            unrolled.advance(scan.steps)
            assert_roughly_equal(scan.gradients(), unrolled.gradients())
        ours.advance(size)
        assert_roughly_equal(ours.gradients(), unrolled.gradients())
        textbook, eager = Textbook(problem), Unrolled(problem, size)
        times = alternate(
            {
                "ours": lambda ours=ours, size=size: ours.advance(size),
                "RTRL in JAX": rtrl.advance,
                "BPTT in JAX": bptt.advance,
                "textbook RTRL": lambda textbook=textbook: textbook.advance(2),
                "BPTT": lambda eager=eager, size=size: eager.advance(size),
            },
            measurement.sizes.rounds,
        )
        measured[f"jax.{size}"] = median_ratio(times["RTRL in JAX"], times["ours"])
        for name, value in medians(times).items():
            seconds.setdefault(name, []).append(value)
    benchmark.pedantic(ours.advance, args=(size,), rounds=3)
    series = [curve("tanh RNN, inputs = H", "H", sizes, "seconds per step", seconds)] if seconds else []
    measurement.settle(measured, *series, H=sizes)
