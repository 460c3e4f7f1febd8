"""The two tools that break functions: what they find, what they refuse, what they leave behind."""

import functools
import inspect
from collections.abc import Callable

import pytest
from breaking import StaleEntry, replaced, swapped


def total(prices: list[float], rate: float = 0.5, *, most: float = 100.0) -> float:
    """What is to be paid."""
    paid = 0.0
    for price in prices:
        if price > 0:
            paid += round(price * (1 + rate), ndigits=2)
    return min(paid, most)


# fmt: off
def total_in_other_words(costs: list[float], tax: float = 0.5, *, top: float = 100.0) -> float:
    acc = 0.0
    for c in costs:
        if (c
                > 0):
              acc += round(
                    c*(1 +tax),
                    ndigits = 2,)  # rounded
    return (min( acc, top ))
# fmt: on


def logged(function: Callable[..., float]) -> Callable[..., float]:
    @functools.wraps(function)
    def wrapper(*args: object) -> float:
        return function(*args)

    return wrapper


class Till:
    """Whatever a function can be of a class."""

    money = 2

    @logged
    def decorated(self) -> float:
        return self.money + 1

    @staticmethod
    def static(value: int) -> int:
        return value + 1

    @property
    def seen(self) -> int:
        return self.money + 1


BOTH = pytest.mark.parametrize("function", [total, total_in_other_words])


@BOTH
def test_a_form_is_found_whatever_the_layout_and_the_names(function: Callable[..., float]) -> None:
    assert function([1, -1, 2]) == 4.5
    with swapped(function, "PRICE * (1 + RATE)", "PRICE * (1 - RATE)"):
        assert function([1, -1, 2]) == 1.5
    with swapped(function, "for PRICE in PRICES:\n    ...", "for PRICE in PRICES[1:]:\n    ..."):
        assert function([1, -1, 2]) == 3.0
    with swapped(function, "if PRICE > 0:\n    ...", ""):
        assert function([1, -1, 2]) == 0.0
    with swapped(function, "SUM += PRICE", "SUM += PRICE\nSUM += 1"):
        assert function([1, -1, 2]) == 6.5
    with swapped(function, "return RESULT", "after = RESULT + 1\nreturn after"):
        assert function([1, -1, 2]) == 5.5
    assert function([1, -1, 2]) == 4.5


@BOTH
def test_other_arguments_are_found_and_kept(function: Callable[..., float]) -> None:
    with swapped(function, "round(PRICE, ...)", "5 + round(PRICE, ...)"):
        assert function([1.111], 0.0) == 6.11
    with swapped(function, "ROUND(..., ndigits=2)", "ROUND(..., ndigits=1)"):
        assert function([1.111], 0.0) == 1.1
    with pytest.raises(StaleEntry):
        swapped(function, "round(PRICE)", "PRICE").__enter__()


def test_a_form_that_is_there_twice_is_stale_where_one_is_expected() -> None:
    def of(a: int, most: int) -> int:
        return min(a, most) + min(a + 1, most)

    with pytest.raises(StaleEntry, match=r"of has 2 places of this form, not 1: min\(VALUE, most\)"):
        swapped(of, "min(VALUE, most)", "VALUE").__enter__()
    with pytest.raises(StaleEntry, match="1 places of this form, not 2"):
        swapped(of, "min(a, most)", "a", count=2).__enter__()
    with swapped(of, "min(VALUE, most)", "VALUE", count=2):
        assert of(5, 3) == 11
    assert of(5, 3) == 6


def test_a_name_that_occurs_twice_stands_for_the_same() -> None:
    def of(a: int, b: int) -> int:
        return a * a + a * b

    with swapped(of, "LEFT * LEFT", "LEFT"):
        assert of(3, 5) == 18
    with pytest.raises(StaleEntry, match="2 places"):
        swapped(of, "LEFT * RIGHT", "LEFT").__enter__()
    with swapped(of, "LEFT * LEFT + LEFT * RIGHT", "RIGHT"):
        assert of(3, 5) == 5


def test_constants_and_attributes_are_told_apart() -> None:
    def of(self: Till) -> object:
        return self.money, 1, "AB", True

    with swapped(of, "self.NAME", "10 * self.NAME"):
        assert of(Till()) == (20, 1, "AB", True)
    with swapped(of, "1", "2"):
        assert of(Till()) == (2, 2, "AB", True)
    with swapped(of, '"AB"', '"CD"'):
        assert of(Till()) == (2, 1, "CD", True)
    with pytest.raises(StaleEntry, match="0 places"):
        swapped(of, '"XY"', '"CD"').__enter__()
    with pytest.raises(StaleEntry, match="0 places"):
        swapped(of, "self.other", "1").__enter__()


def test_every_kind_of_function_of_a_class_can_be_broken() -> None:
    till = Till()
    for function, call in (
        (Till.decorated, till.decorated),
        (Till.static, lambda: till.static(2)),
        (Till.seen, lambda: till.seen),
    ):
        with swapped(function, "VALUE + 1", "VALUE - 1"):
            assert call() == 1
        with replaced(function, lambda original: lambda *args: 10 * original(*args)):
            assert call() == 30
        assert call() == 3


def test_a_replacement_is_called_wherever_the_function_is_known() -> None:
    known = total
    with replaced(total, lambda original: lambda prices, **options: original(prices[:1], **options)):
        assert known([3, 4]) == 4.5 and known([3, 4], most=2) == 2
        assert list(inspect.signature(known).parameters) == ["prices", "rate", "most"]
    assert known([3, 4]) == 10.5


def test_a_function_is_whole_again_after_an_error() -> None:
    code = total.__code__
    for break_ in (replaced(total, lambda original: original), swapped(total, "min(PAID, MOST)", "MOST")):
        with pytest.raises(ZeroDivisionError), break_:
            1 / 0  # noqa: B018
        assert total.__code__ is code and not hasattr(total, "__signature__")


def test_code_with_a_closure_is_refused() -> None:
    rate = 2
    with pytest.raises(AssertionError, match="closure"):
        replaced(lambda: rate, lambda original: original).__enter__()
