"""An update of the parameters after every step, where what is launched is all: against TBPTT(1) of the same cell, and
against exact RTRL of an element-wise LSTM written by hand."""

from collections.abc import Callable
from typing import Any

from counting import dispatches
from every_step import ElementwiseLSTMByHand, EveryStep, OneStepBPTT, Ours, check_every_step
from measuring import Measurement, one_thread
from problems import MODULES, Problem, dense, plain

from rtrl.profiling.timing import alternate, median_ratio, medians

SIDES: dict[str, Callable[[Problem], EveryStep]] = {"TBPTT(1)": OneStepBPTT, "by hand": ElementwiseLSTMByHand}
RUNS: dict[str, list[tuple[str, int]]] = {
    "TBPTT(1)": [("rnn", 16), ("rnn", 32), ("gru", 16), ("gru", 32), ("minGRU", 128), ("RTU", 128)],
    "by hand": [("eLSTM", 128), ("eLSTM", 512)],
}
STEPS = 50


def problem(kind: str, hidden: int) -> Problem:
    return dense(kind, hidden) if kind in MODULES else plain(kind, hidden, 32)


def test_an_update_after_every_step(measurement: Measurement, benchmark: Any) -> None:
    measured: dict[str, float] = {}
    operations: dict[str, float] = {}
    facts: dict[str, str | float] = {}
    for name, runs in RUNS.items():
        for kind, hidden in runs:
            for make in (Ours, SIDES[name]):
                check_every_step(make, kind)
            posed = problem(kind, hidden if measurement.size == "full" else 8)
            pair = Ours(posed), SIDES[name](posed)
            for side in pair:
                side.advance(3)
            if name == "TBPTT(1)":
                bar = "updates.operations" if kind in MODULES else "updates.operations.rows"
                operations[bar] = max(operations.get(bar, 0.0), dispatches(pair[0], 4) / dispatches(pair[1], 4))
            if measurement.clock:
                with one_thread():
                    times = alternate(
                        {
                            side: (lambda run=run: run.advance(STEPS))
                            for side, run in zip(("ours", name), pair, strict=True)
                        },
                        3 * measurement.sizes.rounds,
                    )
                measured[f"updates.{kind}.{hidden}"] = median_ratio(times["ours"], times[name])
                each = ", ".join(f"{side} {1e3 * value:.3g}" for side, value in medians(times).items())
                facts[f"ms per step, {kind}, H = {hidden}"] = each
    measured |= operations
    benchmark.pedantic(pair[0].advance, args=(1,), rounds=3)
    measurement.settle(measured, threads_of_these_times=1, **facts)
