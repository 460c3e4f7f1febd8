"""Small cells, where the arithmetic is nothing and what is launched a step is all: against an eager BPTT of the same
cell, over the same blocks: of 16·H steps, over which what is launched once a block is spread out."""

from typing import Any

from agreement import assert_roughly_equal, check_agreement
from counting import dispatches
from measuring import Measurement
from problems import MODULES, dense
from rivals import Ours, Unrolled

from rtrl.profiling.timing import alternate, median_ratio, medians


def test_a_step_of_a_small_cell(measurement: Measurement, benchmark: Any) -> None:
    size = measurement.sizes.cells
    block = 16 * size
    measured: dict[str, float] = {}
    operations: dict[str, list[float]] = {}
    facts: dict[str, float] = {}
    for kind in MODULES:
        check_agreement(kind)
        problem = dense(kind, size)
        ours, eager, stepwise = Ours(problem, block=block), Unrolled(problem, block), Ours(problem, block=1)
        ours.advance(block)
        eager.advance(block)
        assert_roughly_equal(ours.gradients(), eager.gradients())
        stepwise.advance(2)
        operations[kind] = [dispatches(ours, block), dispatches(stepwise, 4), dispatches(eager, block)]
        if measurement.clock:
            times = alternate(
                {
                    "ours": lambda ours=ours: ours.advance(block),
                    "eager": lambda eager=eager: eager.advance(block),
                },
                3 * measurement.sizes.rounds,
            )
            measured[f"cells.{kind}"] = median_ratio(times["ours"], times["eager"])
            facts.update({f"µs per step, {kind}, {side}": 1e6 * value for side, value in medians(times).items()})
    measured["cells.operations"] = max(ours / eager for ours, _, eager in operations.values())
    measured["cells.control"] = min(stepwise / eager for _, stepwise, eager in operations.values())
    benchmark.pedantic(ours.advance, args=(block,), rounds=3)
    facts.update({f"operations per step, {kind}, ours": ours for kind, (ours, _, _) in operations.items()})
    facts.update({f"operations per step, {kind}, eager": eager for kind, (_, _, eager) in operations.items()})
    measurement.settle(measured, H=size, block=block, **facts)
