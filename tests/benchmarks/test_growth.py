"""How counts grow, fitted over the sizes of everything: the state, the parameters, time, the block, the experts.

The growth with the number of dormant experts is in ``test_lazy.py``. Every fit has a control that must break its bound.
"""

from typing import Any

import numpy as np
import torch
from agreement import check_agreement
from counting import exponent, graph_bytes, macs
from measuring import Measurement, curve
from mixtures import undeclared
from problems import Problem, dense, mixture
from rivals import Ours, Unrolled

MACS = "multiply-adds per step"


def steady(problem: Problem, steps: int, **options: Any) -> float:
    """Multiply-adds a step, over ``steps`` steps after as many that are not counted."""
    side = Ours(problem, **options)
    side.advance(steps)
    return macs(side, steps)


def test_over_the_state(measurement: Measurement, benchmark: Any) -> None:
    """P is 2·H² here: H·P is H³, and H²·P is H⁴."""
    check_agreement("rnn")
    sizes = measurement.sizes.growth
    blocks = [steady(dense("rnn", size), size, block=size) for size in sizes]
    stepwise = [steady(dense("rnn", size), 2, block=1) for size in sizes]
    measured = {"growth.H": exponent(sizes, blocks), "growth.H.control": exponent(sizes, stepwise)}
    benchmark.pedantic(Ours(dense("rnn", sizes[0]), block=sizes[0]).advance, args=(sizes[0],), rounds=3)
    measurement.settle(
        measured,
        curve("tanh RNN, inputs = H", "H", sizes, MACS, {"block = H": blocks, "block = 1": stepwise}),
    )


def test_over_the_parameters(measurement: Measurement, benchmark: Any) -> None:
    """More inputs, the same state."""
    check_agreement("rnn")
    hidden, inputs = 16, (32, 64, 128, 256)
    problems = [dense("rnn", hidden, width) for width in inputs]
    parameters = [problem.parameters for problem in problems]
    blocks = [steady(problem, hidden, block=hidden) for problem in problems]
    stepwise = [steady(problem, 2, block=1) for problem in problems]
    measured = {
        "growth.P": exponent(parameters, blocks),
        "growth.P.slope": float(np.polyfit(parameters, blocks, 1)[0]) / hidden,
        "growth.P.control": float(np.polyfit(parameters, stepwise, 1)[0]) / hidden,
    }
    benchmark.pedantic(Ours(problems[0], block=hidden).advance, args=(hidden,), rounds=3)
    measurement.settle(
        measured,
        curve(
            f"tanh RNN, H = {hidden}, more inputs",
            "P",
            parameters,
            MACS,
            {"block = H": blocks, "block = 1": stepwise},
        ),
    )


def test_over_time(measurement: Measurement, benchmark: Any) -> None:
    """Exact gradients after every block: BPTT goes back to the beginning each time."""
    check_agreement("gru")
    hidden, block, counts = 12, 8, measurement.sizes.growth_blocks
    problem = dense("gru", hidden, steps=block * (max(counts) + 1))
    ours, total, held = Ours(problem, block=block), 0.0, {}
    ours.advance(block)  # the first block has no influence to move, and looks once at what the cell is
    totals, again = [], []
    for blocks in range(1, max(counts) + 1):
        total += block * macs(ours, block)
        if blocks in counts:
            totals.append(total)
            held[blocks] = sum(ours.learner.retained_bytes().values())
    graphs = [graph_bytes(Unrolled(problem, block * blocks), block * blocks) for blocks in counts]
    spent = 0.0
    for blocks in range(1, max(counts) + 1):
        steps = block * blocks
        spent += steps * macs(Unrolled(problem, steps), steps)
        if blocks in counts:
            again.append(spent)
    steps, ours_bytes = [block * blocks for blocks in counts], list(held.values())
    measured = {
        "growth.T": exponent(steps, totals),
        "growth.T.control": exponent(steps, again),
        "growth.bytes": round(exponent(steps, ours_bytes), 9),
        "growth.bytes.control": exponent(steps, graphs),
    }
    benchmark.pedantic(ours.advance, args=(block,), rounds=3)
    measurement.settle(
        measured,
        curve(f"GRU, H = {hidden}", "T", steps, "bytes held", {"ours": ours_bytes, "BPTT": graphs}),
        curve(
            f"GRU, H = {hidden}, gradients every {block} steps",
            "T",
            steps,
            "multiply-adds in all",
            {"ours": totals, "BPTT": again},
        ),
    )


def test_over_the_block(measurement: Measurement, benchmark: Any) -> None:
    """H²·P is spent once per block, and the rest does not depend on the block: a + b/block."""
    check_agreement("rnn")
    hidden = 72  # below 65, blocks are swept by a scan: more multiply-adds in fewer launches
    blocks = (2, 4, 8, 16, 36, 72, 144)  # a block of one step takes less: it is processed in a way of its own
    problem = dense("rnn", hidden)
    counted = np.array([steady(problem, max(2, block), block=block) for block in blocks])
    inverse = 1 / np.array(blocks)
    slope, constant = np.polyfit(inverse, counted, 1)
    measured = {
        "growth.block": float(np.abs(counted / (constant + slope * inverse) - 1).max()),
        "growth.block.slope": float(slope) / (hidden**2 * problem.parameters),
    }
    benchmark.pedantic(Ours(problem, block=hidden).advance, args=(hidden,), rounds=3)
    measurement.settle(measured, curve(f"tanh RNN, H = {hidden}", "block", blocks, MACS, {"ours": counted.tolist()}))


def test_over_the_experts(measurement: Measurement, benchmark: Any) -> None:
    """Each step uses two, however many there are. The mixture chooses as it likes."""
    check_agreement("mixture")
    sizes, block, steps = (16, 45, 128), 8, 16
    problems = [mixture(8, 4, size, steps=2 * steps, dtype=torch.float64) for size in sizes]
    sparse = [steady(problem, steps, block=block, window=64) for problem in problems]
    dense_counts = [steady(undeclared(problem), 2, block=1) for problem in problems]
    measured = {"growth.experts": exponent(sizes, sparse), "growth.experts.control": exponent(sizes, dense_counts)}
    benchmark.pedantic(Ours(problems[0], block=block).advance, args=(block,), rounds=3)
    measurement.settle(
        measured,
        curve(
            "Mixture, d_model 8, 4 slots",
            "experts",
            sizes,
            MACS,
            {"declared": sparse, "nothing declared, block = 1": dense_counts},
        ),
    )
