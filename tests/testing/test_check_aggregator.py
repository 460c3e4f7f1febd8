"""``check_aggregator`` and ``check_monoid``: right ones pass, and each wrong one is caught by the check for it."""

import operator
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import rtrl
from rtrl.errors import ConfigError, WindowError
from rtrl.testing import CheckFailed, Report, check_aggregator, check_monoid


class Plain:
    """The last elements in a list, composed one by one. Right."""

    def __init__(self, capacity: int, combine: Callable[[Any, Any], Any], identity: Any) -> None:
        self.capacity, self.combine, self.identity = capacity, combine, identity
        self.ring: list[Any] = [None] * capacity
        self.stop = 0

    @property
    def oldest(self) -> int:
        return max(0, self.stop - self.capacity)

    def append(self, element: Any) -> None:
        self.ring[self.stop % self.capacity] = element
        self.stop += 1

    def refuse(self, start: int, stop: int) -> None:
        if start > stop or (start < stop and (start < self.oldest or stop > self.stop)):
            raise WindowError("not held")

    def steps(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))

    def join(self, elements: list[Any]) -> Any:
        product = self.copy(self.identity)
        for element in elements:
            product = self.combine(product, element)
        return product

    def copy(self, value: Any) -> Any:
        return list(value) if isinstance(value, list) else value

    def query(self, start: int, stop: int) -> Any:
        self.refuse(start, stop)
        return self.join([self.ring[step % self.capacity] for step in self.steps(start, stop)])


class WrappedNewestFirst(Plain):
    """Composes a range across the wrap-around in the order of the ring."""

    def steps(self, start: int, stop: int) -> list[int]:
        return sorted(range(start, stop), key=lambda step: step % self.capacity)


class Reversed(Plain):
    def steps(self, start: int, stop: int) -> list[int]:
        return list(reversed(range(start, stop)))


class EvictsOneTooEarly(Plain):
    @property
    def oldest(self) -> int:
        return max(0, self.stop - self.capacity + (self.stop > self.capacity))


class EvictsOneTooLate(Plain):
    @property
    def oldest(self) -> int:
        return max(0, self.stop - self.capacity - 1)


class Remembers(Plain):
    """Remembers products by their places, and forgets none of them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.known: dict[tuple[int, int], Any] = {}

    def query(self, start: int, stop: int) -> Any:
        self.refuse(start, stop)
        if start == stop:
            return self.copy(self.identity)
        key = start % self.capacity, (stop - 1) % self.capacity
        if key not in self.known:
            self.known[key] = super().query(start, stop)
        return self.copy(self.known[key])


class EmptyIsTheWindow(Plain):
    def steps(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop) if start < stop else range(self.oldest, self.stop))


class EmptyIsAnError(Plain):
    def join(self, elements: list[Any]) -> Any:
        return super().join(elements) if elements else elements[0]


class FutureIsCut(Plain):
    """A range that reaches beyond the newest step gives what there is."""

    def query(self, start: int, stop: int) -> Any:
        return super().query(start, min(stop, max(self.stop, start)))


class ReversedIsEmpty(Plain):
    def query(self, start: int, stop: int) -> Any:
        return super().query(start, max(start, stop))


class SeamTwice(Plain):
    """The element before the wrap-around is counted twice."""

    def steps(self, start: int, stop: int) -> list[int]:
        steps = list(range(start, stop))
        seam = [i for i, step in enumerate(steps) if i and step % self.capacity == 0]
        return [*steps[: seam[0]], steps[seam[0] - 1], *steps[seam[0] :]] if seam else steps


class PowersOfTwo(Plain):
    """Finds the place of a step by a mask that only fits powers of two."""

    def query(self, start: int, stop: int) -> Any:
        self.refuse(start, stop)
        mask = self.capacity - 1
        ring = [self.ring[step % self.capacity] if stop <= self.capacity else self.ring[step & mask]
                for step in range(start, stop)]  # fmt: skip
        return self.join(ring)


class OneMore(Plain):
    def steps(self, start: int, stop: int) -> list[int]:
        return list(range(start, min(stop + 1, self.stop))) if start < stop else []


class NoneIsEmpty(Plain):
    """Takes None for a place that holds nothing."""

    def join(self, elements: list[Any]) -> Any:
        return super().join([element for element in elements if element is not None])


class OnlyPythonsIntegers(Plain):
    def refuse(self, start: int, stop: int) -> None:
        if type(start) is not int or type(stop) is not int:
            raise WindowError("not an integer")
        super().refuse(start, stop)


class HandsOutTheIdentity(Plain):
    def copy(self, value: Any) -> Any:
        return value


class HandsOutElements(Plain):
    def query(self, start: int, stop: int) -> Any:
        if stop == start + 1 and self.oldest <= start < self.stop:
            return self.ring[start % self.capacity]
        return super().query(start, stop)


class AfterARefusal(Plain):
    """A refused range leaves the ring one step behind."""

    def refuse(self, start: int, stop: int) -> None:
        try:
            super().refuse(start, stop)
        except WindowError:
            self.ring = deque(self.ring)  # type: ignore[assignment]
            self.ring.rotate(1)  # type: ignore[attr-defined]
            raise


def aggregate(make: Any, **options: Any) -> Report:
    return check_aggregator(make, capacities=[1, 3, 4, 6], on_fail="return", **options)


@pytest.mark.parametrize("make", [rtrl.CircularSegmentTree, Plain])
def test_a_right_aggregator_passes(make: Any) -> None:
    report = aggregate(make, raises=WindowError)
    assert report.passed, str(report)
    assert len(report.checks) == 8


WRONG = [
    (WrappedNewestFirst, "wrap-around", "the right elements in the wrong order"),
    (Reversed, "order", "the right elements in the wrong order"),
    (EvictsOneTooEarly, "wrap-around", "raised WindowError"),
    (EvictsOneTooLate, "steps not held", "not held is not refused"),
    (Remembers, "queries in between", "it includes elements that were overwritten"),
    (EmptyIsTheWindow, "empty ranges", "an empty range is not the identity"),
    (EmptyIsAnError, "empty ranges", "it raised IndexError"),
    (FutureIsCut, "steps not held", "not held is not refused"),
    (ReversedIsEmpty, "steps not held", "not held is not refused"),
    (SeamTwice, "wrap-around", "counted more than once"),
    (PowersOfTwo, "wrap-around", ""),
    (OneMore, "order", "elements outside the range are included"),
    (NoneIsEmpty, "None", "None as a value of the monoid"),
    (OnlyPythonsIntegers, "NumPy integers", "integers of NumPy"),
    (HandsOutTheIdentity, "results", "the caller changed it"),
    (HandsOutElements, "results", "the caller changed it"),
    (AfterARefusal, "steps not held", "after a range was refused"),
]


@pytest.mark.parametrize(("make", "check", "words"), WRONG, ids=[make.__name__ for make, *_ in WRONG])
def test_a_wrong_aggregator_is_caught(make: Any, check: str, words: str) -> None:
    failures = {failure.check: failure for failure in aggregate(make).failures}
    assert check in failures
    assert words in failures[check].message
    assert "capacity" in failures[check].where


def test_the_first_failure_names_the_range_and_both_products() -> None:
    with pytest.raises(CheckFailed, match="FAIL wrap-around") as caught:
        check_aggregator(WrappedNewestFirst, capacities=[3])
    failure = caught.value.report.failures[0]
    assert failure.where == "capacity 3, 4 appended, range 1 … 4"
    assert (failure.found, failure.expected) == ("(3, 1, 2)", "(1, 2, 3)")


def test_an_aggregator_of_another_form_is_adapted_by_functions() -> None:
    report = check_aggregator(
        lambda capacity, combine, identity: Plain(capacity, combine, identity).__dict__,
        lambda held, element: _from(held, "append", element),
        lambda held, start, stop: _from(held, "query", start, stop),
        capacities=[2, 3],
    )
    assert report.passed


def _from(held: dict[str, Any], method: str, *args: Any) -> Any:
    plain = Plain.__new__(Plain)
    plain.__dict__ = held
    return getattr(plain, method)(*args)


def test_the_declared_type_of_exception_is_required() -> None:
    (failure,) = aggregate(Plain, raises=KeyError).failures
    assert failure.message == "another error than declared"


def test_what_raises_is_a_failure_of_its_check() -> None:
    failures = aggregate(lambda capacity, combine, identity: 3).failures
    assert all("raised AttributeError" in failure.message for failure in failures)
    assert len(failures) == 8


BAD: list[tuple[Any, str]] = [
    (lambda: check_aggregator(3), "make must be a function"),  # type: ignore[arg-type]
    (lambda: check_aggregator(Plain, 3), "append must be a function"),  # type: ignore[arg-type]
    (lambda: check_aggregator(Plain, capacities=[]), "at least one"),
    (lambda: check_aggregator(Plain, capacities=[0]), "positive integer"),
    (lambda: check_aggregator(Plain, raises=3), "type of exceptions"),  # type: ignore[arg-type]
    (lambda: check_monoid(3, 0, [1]), "combine must be a function"),  # type: ignore[arg-type]
    (lambda: check_monoid(operator.add, 0, []), "at least one"),
]


@pytest.mark.parametrize(("call", "match"), BAD)
def test_bad_arguments_are_refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        call()


# ---------------------------------------------------------------- our own tree


def test_the_tree_takes_numpy_integers_and_none() -> None:
    tree: rtrl.CircularSegmentTree[Any] = rtrl.CircularSegmentTree(
        np.int64(3), lambda a, b: None if a is None or b is None else a + b, "", start=np.int32(2)
    )
    for element in ("a", None, "b", "c"):
        tree.append(element)
    assert tree.query(np.int64(4), np.uint8(6)) == "bc"
    assert tree.query(3, 4) is None
    assert tree.query(3, 6) is None
    assert type(tree.capacity) is type(tree.stop) is int
    with pytest.raises(WindowError, match="must be integers, got True"):
        tree.query(True, 4)
    with pytest.raises(WindowError, match=r"must be integers, got .*3\.0"):
        tree.query(np.float64(3.0), 4)  # type: ignore[arg-type]


def test_the_tree_computes_none_once() -> None:
    made = []
    tree: rtrl.CircularSegmentTree[Any] = rtrl.CircularSegmentTree(4, lambda a, b: made.append(1), None)
    for _ in range(4):
        tree.append(None)
    for _ in range(3):
        assert tree.query(0, 4) is None
    assert len(made) == 3


def test_what_the_tree_hands_out_is_the_callers() -> None:
    tree: rtrl.CircularSegmentTree[torch.Tensor] = rtrl.CircularSegmentTree(2, torch.matmul, torch.eye(2))
    for scale in (1.0, 2.0, 3.0):
        tree.append(scale * torch.eye(2))
    for start in (1, 2, 3):
        right = tree.query(start, 3).clone()
        tree.query(start, 3).zero_()
        assert torch.equal(tree.query(start, 3), right)
        assert bool(right.any())


def test_a_product_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    options = ({}, {"store": lambda number, value: value})
    for option in options:
        tree: rtrl.CircularSegmentTree[torch.Tensor] = rtrl.CircularSegmentTree(2, torch.matmul, torch.eye(2), **option)
        tree.append(2 * weight)
        if option:
            assert tree.query(0, 1).grad_fn is not None
        else:
            with pytest.raises(ConfigError, match=r"cannot be copied.*Pass store=lambda"):
                tree.query(0, 1)


# ---------------------------------------------------------------- monoids


def test_the_affine_maps_of_dormant_slices_are_a_monoid() -> None:
    draw = torch.Generator().manual_seed(0)
    elements = [
        (torch.randn(3, 3, generator=draw, dtype=torch.float64), torch.randn(3, generator=draw, dtype=torch.float64))
        for _ in range(4)
    ]

    def combine(first: Any, second: Any) -> Any:
        return second[0] @ first[0], first[1] + second[1] @ first[0]

    identity = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert check_monoid(combine, identity, elements).notes == []

    def without_the_factor(first: Any, second: Any) -> Any:
        return second[0] @ first[0], first[1] + second[1]

    report = check_monoid(lambda a, b: combine(b, a), identity, elements)  # the other order is a monoid, too
    assert report.passed
    assert check_monoid(without_the_factor, identity, elements).passed, "associative all the same"

    def transposed(first: Any, second: Any) -> Any:
        return second[0] @ first[0], first[1] + first[0] @ second[1]

    (failure,) = check_monoid(transposed, identity, elements, on_fail="return").failures
    assert failure.check == "associativity"


def test_each_axiom_is_checked() -> None:
    def failed(combine: Any, identity: Any, elements: Any) -> set[str]:
        return {f.check for f in check_monoid(combine, identity, elements, on_fail="return").failures}

    assert failed(operator.add, 0, [1, 2, 3]) == set()
    assert failed(operator.add, 1, [1, 2, 3]) == {"identity"}
    assert failed(operator.sub, 0, [1, 2, 3]) == {"identity", "associativity"}
    assert failed(lambda a, b: a if a else b, 0, [1, 2, 3]) == set()
    lists = [[1], [2]]
    assert failed(operator.iadd, [], lists) == {"arguments"}
    assert lists == [[1], [2]], "the elements of the caller stay as they are"
    assert failed(lambda a, b: (a + b).float(), torch.zeros(1).double(), [torch.ones(1).double()]) >= {"identity"}
    assert failed(lambda a, b: 1 / 0, 0, [1]) == {"arguments"}


def test_elements_that_commute_prove_nothing_about_order() -> None:
    (note,) = check_monoid(operator.add, 0, [1, 2]).notes
    assert "cannot show an error of order" in note
    assert check_monoid(operator.add, "", ["a", "b"]).notes == []


def test_many_elements_are_tried_by_drawn_triples() -> None:
    calls = []

    def add(a: str, b: str) -> str:
        calls.append(1)
        return a + b

    assert check_monoid(add, "", [str(i) for i in range(40)], seed=3).seed == 3
    assert len(calls) < 6000


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (1.0, 1.0 + 1e-13, True),
        (1.0, 1.0 + 1e-9, False),
        (1, 1.0, False),
        ({"a": np.ones(2)}, {"a": np.ones(2) + 1e-13}, True),
        ({"a": np.ones(2)}, {"b": np.ones(2)}, False),
        ([torch.ones(2)], [torch.ones(3)], False),
        (torch.tensor([1]), torch.tensor([2]), False),
        (float("nan"), float("nan"), False),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), False),
    ],
)
def test_equal_means_up_to_rounding(first: Any, second: Any, equal: bool) -> None:
    report = check_monoid(lambda a, b: second if a is first else b, None, [first], on_fail="return")
    assert report.passed == equal
