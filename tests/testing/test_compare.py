"""The comparator: it finds the worst entry by the scale of its group, and refuses a reference that proves nothing."""

import math

import pytest
import torch
from torch import Tensor

from rtrl.testing import NotComparable, assert_gradients_equal, assert_influences_equal, worst_difference
from rtrl.testing.compare import FLOOR, RELATIVE

REFERENCE = {
    "w": torch.tensor([[1.0, 2.0], [1e-3, 2e-3]], dtype=torch.float64),
    "b": torch.tensor(5.0, dtype=torch.float64),
}


def changed(name: str, index: tuple[int, ...], by: float) -> dict[str, Tensor]:
    found = {n: value.clone() for n, value in REFERENCE.items()}
    found[name][index] += by
    return found


def test_equal_tensors_have_no_error() -> None:
    found = worst_difference(changed("b", (), 0), REFERENCE)
    assert (found.error, found.n_compared) == (0, 5)


@pytest.mark.parametrize(("group", "scale"), [("slice", 2e-3), ("column", 2e-3), ("tensor", 2.0)])  # of entry (1, 0)
def test_an_error_is_relative_to_the_largest_entry_of_its_group(group: str, scale: float) -> None:
    groups = {"w": group}
    found = worst_difference(changed("w", (1, 0), 1e-6), REFERENCE, group=lambda name: groups.get(name, "tensor"))
    assert found.error == pytest.approx(1e-6 / scale)
    assert (found.place, found.actual, found.expected) == ("w[1, 0]", pytest.approx(1e-3 + 1e-6), 1e-3)


def test_a_small_error_in_a_small_slice_is_not_hidden_by_a_large_slice() -> None:
    assert_gradients_equal(changed("w", (0, 0), 1e-11), REFERENCE)
    with pytest.raises(AssertionError, match=r"gradients differ.*w\[1, 0\]"):
        assert_gradients_equal(changed("w", (1, 0), 1e-11), REFERENCE)


def test_a_group_that_cancels_is_compared_by_the_floor_of_its_tensor_and_of_all() -> None:
    expected = {"w": torch.tensor([[1.0], [0.0]]), "tiny": torch.tensor([1e-12])}
    found = {"w": torch.tensor([[1.0], [1e-9]]), "tiny": torch.tensor([2e-12])}
    assert worst_difference(found, expected).error == pytest.approx(1.0)
    assert worst_difference(found, expected, floor_of_all=1e-6).error == pytest.approx(1e-9 / FLOOR)
    assert worst_difference(found, expected, floor=0).place == "w[1, 0]"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    found = worst_difference(changed("w", (0, 1), bad), REFERENCE)
    assert (found.error, found.place) == (math.inf, "w[0, 1]")


def test_an_error_where_the_reference_is_zero_is_infinite() -> None:
    zero = {"w": torch.zeros(2)}
    assert worst_difference(zero, zero, nonzero="none").error == 0
    assert worst_difference({"w": torch.tensor([0, 1e-30])}, zero, nonzero="none").error == math.inf


def test_influences_are_compared_column_by_column() -> None:
    expected = {"w": torch.tensor([[[1.0, 1e-3], [0.0, 0.0]]], dtype=torch.float64)}
    found = {"w": expected["w"].clone()}
    found["w"][0, 1, 0] = RELATIVE / 2
    assert_influences_equal(found, expected)
    found["w"][0, 1, 1] = RELATIVE / 2
    with pytest.raises(AssertionError, match=r"w\[0, 1, 1\]"):
        assert_influences_equal(found, expected)


def test_complex_entries_are_compared_by_their_size() -> None:
    expected = {"w": torch.tensor([3 + 4j])}
    assert worst_difference({"w": torch.tensor([3 + 4.5j])}, expected).error == pytest.approx(0.1)


ZERO = {"w": torch.zeros(2), "b": torch.ones(1)}


@pytest.mark.parametrize(
    ("found", "expected", "nonzero", "words"),
    [
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, "any", "only one side has a, b"),
        ({}, {}, "any", "empty"),
        ({"a": torch.ones(0)}, {"a": torch.ones(0)}, "none", "empty"),
        ({"a": torch.ones(2)}, {"a": torch.ones(1)}, "any", "shape"),
        ({"a": torch.ones(1)}, {"a": torch.tensor([math.inf])}, "any", "not finite"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, "any", "zero everywhere"),
        (ZERO, ZERO, "each", "the reference of w is zero"),
    ],
)
def test_what_proves_nothing_is_refused(
    found: dict[str, Tensor], expected: dict[str, Tensor], nonzero: str, words: str
) -> None:
    with pytest.raises(NotComparable, match=words):
        worst_difference(found, expected, nonzero=nonzero)  # type: ignore[arg-type]


def test_one_tensor_that_is_not_zero_is_enough_by_default() -> None:
    assert worst_difference(ZERO, ZERO).error == 0
