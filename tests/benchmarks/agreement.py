"""Correctness first: all sides of a comparison give the same gradients, or no number is reported.

In float64, at a small size and over more steps than a block has, element by element at the tolerance of the whole
suite. In float32, at the size that is timed, only roughly: that shows that the right thing was timed, and no more.
"""

from collections.abc import Mapping
from functools import cache

import torch
from jax_rivals import Scan, available, bptt, float64, rtrl
from problems import PLAIN, Problem, dense, layers, mixture, plain
from rivals import Ours, Sequences, Textbook, Unrolled
from torch import Tensor

import oracles
from rtrl.testing import assert_gradients_equal, worst_difference

STEPS, BLOCK = 17, 5  # three blocks and a part of one
ROUGH = 1e-3


def small(kind: str) -> Problem:
    """The problem that the exact comparison is made on."""
    if kind == "mixture":
        return mixture(6, 5, 6, steps=STEPS, dtype=torch.float64)
    if kind in PLAIN:
        return plain(kind, 4, 3, steps=STEPS, dtype=torch.float64)
    if "+" in kind or kind == "feedback":
        return layers(kind, 3, 2, steps=STEPS, dtype=torch.float64)
    return dense(kind, 9, 7, steps=STEPS, dtype=torch.float64)


@cache
def check_agreement(kind: str) -> None:
    """Ours in blocks, by steps and by sequences, the textbook and the unrolled graph against the oracle, in float64.

    What raises is not cached: every benchmark of a wrong side fails.
    """
    problem = small(kind)
    expected = oracles.bptt(problem.cell, problem.xs, problem.loss)
    sides: list[Ours | Textbook | Unrolled] = [
        *(Ours(problem, block=block) for block in (1, BLOCK, STEPS)),
        Sequences(problem, block=BLOCK),
        Textbook(problem),
        Unrolled(problem, STEPS),
    ]
    for side in sides:
        side.advance(STEPS)
        assert_gradients_equal(side.gradients(), expected)


@cache
def check_jax_agreement(kind: str = "rnn") -> None:
    """Both scans in JAX against the same oracle, in float64."""
    assert available
    problem = small(kind)
    expected = oracles.bptt(problem.cell, problem.xs, problem.loss)
    with float64():
        for function in (rtrl, bptt):
            side = Scan(function, problem, STEPS)
            side.advance()
            assert_gradients_equal(side.gradients(), expected)


def assert_roughly_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """A sanity check in float32, not a proof: within a thousandth of a parameter's largest entry."""
    difference = worst_difference(actual, expected, group="tensor", nonzero="each")
    assert difference.error <= ROUGH, difference
