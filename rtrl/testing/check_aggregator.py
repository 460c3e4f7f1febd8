"""Check an aggregator: the last n elements of any monoid, and ordered products of any range of them."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rtrl._utils import validation
from rtrl._utils.formatting import first_line
from rtrl.errors import ConfigError
from rtrl.testing.check_cell import check_options
from rtrl.testing.check_monoid import add_first_failures
from rtrl.testing.report import Found, Report

Make = Callable[[int, Callable[[Any, Any], Any], Any], Any]
_CAPACITIES = (1, 2, 3, 4, 5, 7, 8, 12)


class _Aggregator:
    """An aggregator under test beside the list of all elements that it was given."""

    def __init__(self, check: "_Check", capacity: int, combine: Callable[[Any, Any], Any], identity: Any) -> None:
        self._append, self._query = check.append, check.query
        self.capacity, self.combine, self.identity = capacity, combine, identity
        self.held = check.make(capacity, combine, identity)
        self.elements: list[Any] = []

    @property
    def stop(self) -> int:
        return len(self.elements)

    @property
    def oldest(self) -> int:
        return max(0, self.stop - self.capacity)

    def append(self, element: Any) -> None:
        self._append(self.held, element)
        self.elements.append(element)

    def query(self, start: Any, stop: Any) -> Any:
        return self._query(self.held, start, stop)

    def expected(self, start: int, stop: int) -> Any:
        """The product one by one, of this class's own list."""
        product = self.identity
        for element in self.elements[start:stop]:
            product = self.combine(product, element)
        return product

    def where(self, start: int, stop: int) -> str:
        return f"capacity {self.capacity}, {self.stop} appended, range {start} … {stop}"

    def wrong(self, start: int, stop: int, message: str) -> Iterator[Found]:
        """The failure of one range, if there is one."""
        expected = self.expected(start, stop)
        try:
            found = self.query(start, stop)
        except Exception as error:
            yield Found(f"{message}: it raised {first_line(error)}", where=self.where(start, stop))
            return
        if type(found) is not type(expected) or found != expected:
            hint = self._hint(found, expected)
            yield Found(message + hint, None, None, self.where(start, stop), f"{found!r:.200}", f"{expected!r:.200}")

    def wrong_ranges(self, message: str) -> Iterator[Found]:
        """The failure of the first wrong one of all ranges that are held and not empty."""
        for start in range(self.oldest, self.stop):
            for stop in range(start + 1, self.stop + 1):
                for found in self.wrong(start, stop, message):
                    yield found
                    return

    def _hint(self, found: Any, expected: Any) -> str:
        """Words about a wrong product of the free monoid."""
        if not isinstance(found, tuple) or not isinstance(expected, tuple):
            return ""
        if sorted(found) == sorted(expected):
            return "; the right elements in the wrong order"
        if any(element < self.oldest for element in found):
            return "; it includes elements that were overwritten"
        if len(set(found)) < len(found):
            return "; an element is counted more than once"
        if set(found) < set(expected):
            return "; elements are missing"
        return "; elements outside the range are included"


class _Check:
    """The functions of the caller, and the checks by name."""

    def __init__(self, make: Make, append: Any, query: Any, capacities: Sequence[int], raises: Any) -> None:
        self.make, self.append, self.query = make, append, query
        self.capacities, self.raises = capacities, raises

    def free(self, capacity: int) -> _Aggregator:
        """An empty aggregator of tuples of step numbers, joined end to end: nothing that differs is equal there."""
        return _Aggregator(self, capacity, operator.add, ())

    def filled(self, capacity: int, appended: int) -> _Aggregator:
        aggregator = self.free(capacity)
        for step in range(appended):
            aggregator.append((step,))
        return aggregator

    def order(self) -> Iterator[Found]:
        """Every range, while nothing has been overwritten."""
        for capacity in self.capacities:
            for appended in range(1, capacity + 1):
                yield from self.filled(capacity, appended).wrong_ranges("a product before anything is overwritten")

    def wrap_around(self) -> Iterator[Found]:
        """Every range, at each place of the ring, in aggregators that were not asked before."""
        for capacity in self.capacities:
            for appended in range(capacity + 1, 3 * capacity + 2):
                yield from self.filled(capacity, appended).wrong_ranges("a product after elements were overwritten")

    def queries_in_between(self) -> Iterator[Found]:
        """Every range after every append to one aggregator: what it remembers must not outlive its elements."""
        for capacity in self.capacities:
            aggregator = self.free(capacity)
            for step in range(3 * capacity + 2):
                aggregator.append((step,))
                yield from aggregator.wrong_ranges("a product after earlier queries")

    def empty_ranges(self) -> Iterator[Found]:
        """The identity, wherever the range is."""
        for capacity in self.capacities:
            for appended in (0, 1, capacity, 2 * capacity + 1):
                aggregator = self.filled(capacity, appended)
                for step in range(aggregator.oldest, aggregator.stop + 1):
                    yield from aggregator.wrong(step, step, "an empty range is not the identity")

    def steps_not_held(self) -> Iterator[Found]:
        """What was overwritten, what is yet to come and reversed ranges are refused; products stay right."""
        for capacity in self.capacities:
            for appended in (0, capacity - 1, capacity, 2 * capacity + 1):
                aggregator = self.filled(capacity, appended)
                oldest, stop = aggregator.oldest, aggregator.stop
                bad = [(oldest, stop + 1), (stop, stop + 1), (oldest - 1, stop), (oldest - 1, oldest)]
                bad += [(oldest - capacity, stop - capacity)] if stop > oldest else []
                bad += [(stop, oldest)] if stop > oldest else []
                for start, end in bad:
                    yield from self._refused(aggregator, start, end)
                yield from aggregator.wrong_ranges("a product after a range was refused")

    def _refused(self, aggregator: _Aggregator, start: int, stop: int) -> Iterator[Found]:
        held = f"steps {aggregator.oldest} … {aggregator.stop - 1} are held"
        expected = f"{self.raises.__name__}, because {held if aggregator.stop else 'nothing is held'}"
        where = aggregator.where(start, stop)
        try:
            found = repr(aggregator.query(start, stop))
        except Exception as error:
            if not isinstance(error, self.raises):
                yield Found("another error than declared", None, None, where, first_line(error), expected)
        else:
            yield Found("a range that is not held is not refused", None, None, where, f"{found:.200}", expected)

    def none(self) -> Iterator[Found]:
        """None as an element that makes a product None, and None as the identity."""
        monoids = ((_absorbing, "", ("a", None, "b")), (_adjoined, None, ("a", None, "b", None, None)))
        for capacity in self.capacities:
            for combine, identity, elements in monoids:
                aggregator = _Aggregator(self, capacity, combine, identity)
                for step in range(2 * capacity + 3):
                    aggregator.append(elements[step % len(elements)])
                    for start in range(aggregator.oldest, aggregator.stop + 1):
                        yield from aggregator.wrong(start, aggregator.stop, "None as a value of the monoid")

    def numpy_integers(self) -> Iterator[Found]:
        """The ends of a range may be NumPy's integers."""
        for capacity in self.capacities:
            aggregator = self.filled(capacity, 2 * capacity + 1)
            start, stop = np.int64(aggregator.oldest), np.int32(aggregator.stop)
            yield from aggregator.wrong(start, stop, "the ends of the range are integers of NumPy")  # type: ignore[arg-type]

    def results(self) -> Iterator[Found]:
        """A caller may change what a query returned; later products stay as they are."""
        for capacity in self.capacities:
            aggregator = _Aggregator(self, capacity, operator.add, [])
            for step in range(2 * capacity + 1):
                aggregator.append([step])
                for start in range(aggregator.oldest, aggregator.stop + 1):
                    before = self.query(aggregator.held, start, aggregator.stop)
                    right = list(before)
                    before.append("changed by the caller")
                    after = self.query(aggregator.held, start, aggregator.stop)
                    if after != right:
                        message = "a query hands out an object that the aggregator keeps: the caller changed it"
                        where = aggregator.where(start, aggregator.stop)
                        yield Found(message, None, None, where, f"{after!r:.200}", f"{right!r:.200}")
                        return


def _absorbing(first: str | None, second: str | None) -> str | None:
    return None if first is None or second is None else first + second


def _adjoined(first: str | None, second: str | None) -> str | None:
    return second if first is None else first if second is None else first + second


def check_aggregator(
    make: Make,
    append: Callable[[Any, Any], object] = lambda aggregator, element: aggregator.append(element),
    query: Callable[[Any, int, int], Any] = lambda aggregator, start, stop: aggregator.query(start, stop),
    *,
    capacities: Sequence[int] = _CAPACITIES,
    raises: type[Exception] = Exception,
    on_fail: Literal["raise", "return"] = "raise",
) -> Report:
    """Check that an aggregator returns the product of every range of its last n elements, in order.

    It is run on the free monoid: elements are tuples of step numbers, and a product joins them end to end. There, two
    products are equal only if they have the same elements in the same order, so that every error of order, range or
    memory shows.

    Args:
        make: ``make(capacity, combine, identity)`` returns an empty aggregator of the last ``capacity`` elements;
            ``combine(first, second)`` is the product of the monoid, the earlier factor first.
        append: ``append(aggregator, element)`` adds an element; the first one belongs to step 0. By default, the
            aggregator's method ``append``.
        query: ``query(aggregator, start, stop)`` returns the product of the elements of steps ``start`` … ``stop − 1``.
            By default, the aggregator's method ``query``.
        capacities: the numbers of elements to try; not only powers of two.
        raises: the type of the exception for ranges that are not held.
        on_fail: ``"raise"`` or ``"return"``.

    Returns:
        The report of all checks.

    Raises:
        ConfigError: an argument is of the wrong kind.
        CheckFailed: something failed and ``on_fail`` is ``"raise"``; its ``report`` has all failures.

    Example:
        >>> import rtrl
        >>> check_aggregator(rtrl.CircularSegmentTree, raises=rtrl.errors.WindowError).passed
        True
    """
    check_options(0, on_fail)
    for what, function in (("make", make), ("append", append), ("query", query)):
        if not callable(function):
            raise ConfigError(f"{what} must be a function, got {type(function).__name__}")
    if not isinstance(raises, type) or not issubclass(raises, Exception):
        raise ConfigError(f"raises must be a type of exceptions, got {raises!r}")
    if isinstance(capacities, str) or not isinstance(capacities, Sequence) or not capacities:
        raise ConfigError(f"capacities must be a list of positive integers, at least one, got {capacities!r}")
    for capacity in capacities:
        validation.integer("each of capacities", capacity)
    check = _Check(make, append, query, capacities, raises)
    named: dict[str, Callable[[], Iterator[Found]]] = {
        "order": check.order,
        "wrap-around": check.wrap_around,
        "queries in between": check.queries_in_between,
        "empty ranges": check.empty_ranges,
        "steps not held": check.steps_not_held,
        "None": check.none,
        "NumPy integers": check.numpy_integers,
        "results": check.results,
    }
    script = "from rtrl.testing import check_aggregator\ncheck_aggregator(make, append, query)"
    report = Report(name=getattr(make, "__name__", type(make).__name__), script=script)
    add_first_failures(report, named)
    if on_fail == "raise":
        report.raise_for_failures()
    return report
