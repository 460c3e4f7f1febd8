"""Dense cells against textbook RTRL: a tanh network in blocks of H steps, and a GRU in blocks of 4·H."""

from typing import Any

import pytest
from agreement import assert_roughly_equal, check_agreement
from bars import BARS
from counting import exponent, macs, textbook_macs
from measuring import Measurement, curve
from problems import Problem, dense, plain
from rivals import Ours, Product, Textbook, Unrolled

from rtrl.profiling.timing import alternate, median_ratio, medians


def bound(problem: Problem, block: int) -> float:
    """H·P·(1 + H/block) + H³, the multiply-adds of a step."""
    size = problem.hidden
    return size * problem.parameters * (1 + size / block) + size**3


def textbook_formula(problem: Problem) -> int:
    """The multiply-adds of a textbook step, without its Jacobians and its loss: H²·P to move S, H·P to contract it."""
    return problem.hidden * problem.parameters * (problem.hidden + 1)


def check_sanity(problem: Problem, block: int) -> None:
    """Float32, at the size that is timed: over a border of blocks, and three steps of the textbook."""
    for side, steps in ((Ours(problem, block=block), block + block // 4), (Textbook(problem), 3)):
        unrolled = Unrolled(problem, steps)
        side.advance(steps)
        unrolled.advance(steps)
        assert_roughly_equal(side.gradients(), unrolled.gradients())


@pytest.mark.parametrize("kind", ["rnn", "gru"])
def test_the_textbook_costs_what_the_formula_says(kind: str) -> None:
    """The formula stands for the count where counting would take too long; the Jacobians are left out, in favour of
    the textbook."""
    for hidden in (8, 24):
        problem = dense(kind, hidden)
        side = Textbook(problem)
        side.advance(1)
        linearised, moved = textbook_macs(side)
        assert moved == hidden**2 * problem.parameters
        contracted = hidden * problem.parameters
        assert contracted < linearised < contracted + 3 * hidden * problem.parameters
        assert textbook_formula(problem) < linearised + moved


def test_a_tanh_network(measurement: Measurement, benchmark: Any) -> None:
    check_agreement("rnn")
    size = measurement.sizes.rnn
    problem = dense("rnn", size)
    check_sanity(problem, size)

    ours, stepwise = Ours(problem, block=size), Ours(problem, block=1)
    ours.advance(size)
    stepwise.advance(2)
    counted, dense_counted = macs(ours, size), macs(stepwise, 2)
    measured = {
        "rnn.fewer": textbook_formula(problem) / counted,
        "rnn.formula": counted / bound(problem, size),
        "rnn.control": dense_counted / bound(problem, size),
    }
    facts: dict[str, str | float] = {"H": size, "P": problem.parameters, "multiply-adds per step": counted}
    if measurement.clock:
        textbook = Textbook(problem)
        products = {
            "S": Product(size, size, problem.parameters),
            "immediate": Product(size * size, size, size),
            "J": Product(size, size, size),
        }
        times = alternate(
            {
                "ours": lambda: ours.advance(size),
                "textbook": lambda: textbook.advance(2),
                **{name: (lambda p=p: p.advance(4)) for name, p in products.items()},
            },
            measurement.sizes.rounds,
        )
        best = [min(times[name][i] for name in products) for i in range(measurement.sizes.rounds)]
        measured["rnn.faster"] = median_ratio(times["textbook"], times["ours"])
        measured["rnn.limit"] = bound(problem, size) * median_ratio(best, times["ours"])
        medians_s = medians(times)
        facts.update({f"ms per step, {name}": 1e3 * medians_s[name] for name in ("ours", "textbook")})
        facts["10⁹ operations per second in a matrix product"] = 2e-9 / min(medians_s[name] for name in products)
    benchmark.pedantic(ours.advance, args=(size,), rounds=3)
    measurement.settle(measured, **facts)


def test_a_tanh_network_that_a_user_wrote(measurement: Measurement, benchmark: Any) -> None:
    check_agreement("tanh")
    size = measurement.sizes.rnn
    problem = plain("tanh", size)
    check_sanity(problem, size)
    ours, module = Ours(problem, block=size), Ours(dense("rnn", size), block=size)
    for side in (ours, module):
        side.advance(size)
    measured = {"user.macs": macs(ours, size) / macs(module, size)}
    facts: dict[str, str | float] = {"H": size, "P": problem.parameters}
    if measurement.clock:
        textbook = Textbook(problem)
        product = Product(size, size, problem.parameters)
        times = alternate(
            {
                "ours": lambda: ours.advance(size),
                "from_torch": lambda: module.advance(size),
                "textbook": lambda: textbook.advance(2),
                "product": lambda: product.advance(4),
            },
            measurement.sizes.rounds,
        )
        measured["user.faster"] = median_ratio(times["textbook"], times["ours"])
        measured["user.limit"] = bound(problem, size) * median_ratio(times["product"], times["ours"])
        measured["user.module"] = median_ratio(times["ours"], times["from_torch"])
        seconds = medians(times)
        facts.update({f"ms per step, {name}": 1e3 * seconds[name] for name in ("ours", "from_torch", "textbook")})
    benchmark.pedantic(ours.advance, args=(size,), rounds=3)
    measurement.settle(measured, **facts)


def test_a_gru(measurement: Measurement, benchmark: Any) -> None:
    """At several sizes, so that the growth of the time can be fitted, too."""
    check_agreement("gru")
    sizes = measurement.sizes.gru
    measured: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"ours": [], "textbook": []}
    for size in sizes:
        problem = dense("gru", size)
        block = 4 * size
        check_sanity(problem, block)
        ours = Ours(problem, block=block)
        ours.advance(block)
        if measurement.clock:
            textbook = Textbook(problem)
            times = alternate(
                {
                    "ours": lambda ours=ours, block=block: ours.advance(block),
                    "textbook": lambda t=textbook: t.advance(2),
                },
                measurement.sizes.rounds,
            )
            if f"gru.faster.{size}" in BARS:
                measured[f"gru.faster.{size}"] = median_ratio(times["textbook"], times["ours"])
            for name, values in medians(times).items():
                seconds[name].append(values)
    if measurement.clock:
        measured["gru.time"] = exponent(sizes, seconds["ours"])
        measured["gru.time.control"] = exponent(sizes, seconds["textbook"])
    stepwise = Ours(problem, block=1)
    stepwise.advance(2)
    measured["gru.fewer"] = textbook_formula(problem) / macs(ours, block)
    measured["gru.control"] = textbook_formula(problem) / macs(stepwise, 2)
    benchmark.pedantic(ours.advance, args=(block,), rounds=3)
    series = [curve("GRU, inputs = H", "H", sizes, "seconds per step", seconds)] if measurement.clock else []
    measurement.settle(measured, *series, H=sizes, block="4·H")
