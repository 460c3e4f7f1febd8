"""Small cells with their sequences at hand: ``unroll`` takes a block at once, against jitted RTRL in JAX and eager
BPTT."""

from typing import Any

import jax_rivals
from agreement import assert_roughly_equal, check_agreement, check_jax_agreement
from counting import dispatches
from measuring import Measurement
from problems import dense
from rivals import Sequences, Unrolled

from rtrl.profiling.timing import alternate, median_ratio, medians


def test_sequences_at_hand(measurement: Measurement, benchmark: Any) -> None:
    size = measurement.sizes.cells
    block = (16 if measurement.clock else 4) * size
    measured: dict[str, float] = {}
    operations: list[float] = []
    facts: dict[str, str | float] = {}
    for kind in ("rnn", "gru"):
        check_agreement(kind)
        problem = dense(kind, size, steps=block)
        ours, eager = Sequences(problem, block=block), Unrolled(problem, block)
        for side in (ours, eager):
            side.advance(block)
        assert_roughly_equal(ours.gradients(), eager.gradients())
        operations.append(dispatches(ours, block) / dispatches(eager, block))
        if not measurement.clock:
            continue
        sides = {"ours": lambda s=ours: s.advance(block), "eager": lambda s=eager: s.advance(block)}
        if jax_rivals.available:
            check_jax_agreement(kind)
            sides["RTRL in JAX"] = jax_rivals.Scan(jax_rivals.rtrl, problem, block).advance
        times = alternate(sides, measurement.sizes.rounds)
        measured[f"unroll.{kind}.eager"] = median_ratio(times["ours"], times["eager"])
        if jax_rivals.available:
            measured[f"unroll.{kind}.jax"] = median_ratio(times["RTRL in JAX"], times["ours"])
        facts[f"µs per step, {kind}"] = ", ".join(f"{name} {1e6 * s:.3g}" for name, s in medians(times).items())
    measured["unroll.operations"] = max(operations)
    benchmark.pedantic(ours.advance, args=(block,), rounds=3)
    measurement.settle(measured, H=size, block=block, **facts)
