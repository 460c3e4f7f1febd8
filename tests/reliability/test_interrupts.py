"""A fault at any moment of a call leaves a learner exact, or refusing until it is restored, and the process as it was.

Places are few here and all in the nightly run, where a fault strikes at every tensor operation.
"""

import random

import pytest
from helpers.injected_faults import KINDS, strike

WHERE = ("operations", "calls", "lines")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["dense", "rows", "slices", "one step"])
def test_a_fault_anywhere_leaves_a_learner_exact_or_refusing(name: str, where: str) -> None:
    count, _, wrong = strike(name, where, lambda total: random.Random(where).sample(range(1, total + 1), 2))
    assert count == 2 and wrong == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", KINDS)
def test_a_fault_at_every_tensor_operation(name: str) -> None:
    count, refused, wrong = strike(name, "operations", lambda total: range(1, total + 1))
    assert count > 500 and refused < count / 2 and wrong == []


@pytest.mark.nightly
@pytest.mark.parametrize("where", ["calls", "lines"])
@pytest.mark.parametrize("name", KINDS)
def test_an_interrupt_at_many_moments(name: str, where: str) -> None:
    count, refused, wrong = strike(name, where, lambda total: range(1, total + 1, 29))
    assert count > 100 and refused < count / 2 and wrong == []
