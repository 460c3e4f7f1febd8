"""A ring of the last n elements of any monoid, with ordered range products."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from rtrl.errors import ConfigError, WindowError

T = TypeVar("T")


class CircularSegmentTree(Generic[T]):
    """The last ``capacity`` elements over any monoid; any range of them is composed in order with O(log n) combines.

    Equation: ``query(a, b) = x_a ∘ x_{a+1} ∘ … ∘ x_{b−1}``, where ``combine(earlier, later)`` is ∘, associative and not
    necessarily commutative. Steps are counted from 0 for the first element ever appended (or from ``start``).

    Args:
        capacity: how many elements are held, any number ≥ 1.
        combine: ``(earlier, later) -> T``; must not change its arguments.
        identity: the value of an empty range.
        start: the step number of the first element.
        keep: ``keep(node, span, value) -> value`` is asked where an element is to be kept: ``node`` in 0 … 2·capacity −
            2 names the place, ``span`` how many steps it covers at most. By default the value itself is kept.

    Raises:
        ConfigError: ``capacity`` is not a positive integer.

    Cost: appending is O(1) without a combine. A query takes at most ``2·log2(capacity) + 2`` combines to join its
        parts, besides the inner nodes under it that nobody has needed since their leaves changed: those are computed
        once and remembered. Memory: at most ``2·capacity − 1`` elements.

    >>> tree = CircularSegmentTree(3, lambda a, b: a + b, "")
    >>> for letter in "abcde":
    ...     tree.append(letter)
    >>> tree.query(2, 5), tree.query(3, 3), len(tree)
    ('cde', '', 3)
    """

    def __init__(
        self,
        capacity: int,
        combine: Callable[[T, T], T],
        identity: T,
        *,
        start: int = 0,
        keep: Callable[[int, int, T], T] | None = None,
    ) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ConfigError(f"capacity must be a positive integer, got {capacity!r}")
        if not isinstance(start, int) or isinstance(start, bool):
            raise ConfigError(f"start must be an integer, got {start!r}")
        self.capacity = capacity
        self._combine, self._identity, self._keep = combine, identity, keep
        self._first, self._stop = start, start
        # Node 0 spans all places of the ring. A node is current while the step that its first place held when it was
        # computed is still there: places are overwritten in order, so none of the others can have changed before that
        # one.
        self._nodes: list[T | None] = [None] * (2 * capacity - 1)
        self._stamps = [start - 1] * (2 * capacity - 1)

    def __len__(self) -> int:
        return self._stop - self.oldest

    @property
    def oldest(self) -> int:
        """The step number of the oldest element still held; ``stop`` if there is none."""
        return max(self._first, self._stop - self.capacity)

    @property
    def stop(self) -> int:
        """The step number that the next element will get."""
        return self._stop

    def append(self, element: T) -> None:
        """Add the element of step ``stop``; once the ring is full, the oldest one leaves. O(1), no combine."""
        node, low, high = 0, 0, self.capacity
        place = self._stop % self.capacity
        while high - low > 1:
            node, low, high = self._child(node, low, high, place)
        self._nodes[node] = element if self._keep is None else self._keep(node, 1, element)
        self._stamps[node] = self._stop
        self._stop += 1

    def query(self, start: int, stop: int) -> T:
        """The product of the elements of steps ``start`` … ``stop − 1``, earliest first; the identity for an empty
        range.

        Raises:
            WindowError: a step of the range is not held (never appended, or already overwritten), or start > stop.
        """
        parts = self.cover(start, stop)
        if not parts:
            return self._identity
        product = parts[0]
        for part in parts[1:]:
            product = self._combine(product, part)
        return product

    def cover(self, start: int, stop: int, cost: Callable[[T], float] | None = None) -> list[T]:
        """Elements, earliest first, whose product is ``query(start, stop)``: remembered nodes, at most
        ``2·log2(capacity) + 2`` of them.

        Args:
            cost: the price of using one element. Given, a node is split into the nodes under it wherever that is
                cheaper (the list may then be longer; its product is the same).

        Raises:
            WindowError: as for ``query``.
        """
        for bound in (start, stop):
            if not isinstance(bound, int) or isinstance(bound, bool):
                raise WindowError(f"a range of steps has integer ends, got {bound!r}")
        if start > stop:
            raise WindowError(f"the range {start} … {stop} is reversed")
        if start == stop:
            return []
        if start < self.oldest or stop > self._stop:
            raise WindowError(
                f"steps {start} … {stop - 1} were asked for, but {self.oldest} … {self._stop - 1} are held"
            )
        parts: list[T] = []
        first, last = start % self.capacity, (stop - 1) % self.capacity + 1
        if first < last:
            self._collect(0, 0, self.capacity, first, last, start - first, cost, parts)
        else:  # across the wrap-around the older elements stand at the end of the ring
            self._collect(0, 0, self.capacity, first, self.capacity, start - first, cost, parts)
            self._collect(0, 0, self.capacity, 0, last, start - first + self.capacity, cost, parts)
        return parts

    def leaves(self) -> Iterator[tuple[int, T]]:
        """The elements held, as (step, element), earliest first."""
        for step in range(self.oldest, self._stop):
            yield step, self.cover(step, step + 1)[0]

    @staticmethod
    def _child(node: int, low: int, high: int, place: int) -> tuple[int, int, int]:
        """The child of ``node`` that holds ``place``. A subtree of n places takes 2n − 1 nodes, its root first."""
        middle = (low + high) // 2
        return (node + 1, low, middle) if place < middle else (node + 2 * (middle - low), middle, high)

    def _collect(
        self,
        node: int,
        low: int,
        high: int,
        first: int,
        last: int,
        shift: int,
        cost: Callable[[T], float] | None,
        parts: list[T],
    ) -> None:
        """Append the nodes that tile places [first, last) of the subtree over [low, high); place + shift is the step
        it holds."""
        if last <= low or high <= first:
            return
        if first <= low and high <= last:
            if cost is None:
                parts.append(self._value(node, low, high, shift))
            else:
                parts.extend(self._cheapest(node, low, high, shift, cost)[1])
            return
        middle = (low + high) // 2
        self._collect(node + 1, low, middle, first, last, shift, cost, parts)
        self._collect(node + 2 * (middle - low), middle, high, first, last, shift, cost, parts)

    def _cheapest(
        self, node: int, low: int, high: int, shift: int, cost: Callable[[T], float]
    ) -> tuple[float, list[T]]:
        value = self._value(node, low, high, shift)
        whole = cost(value)
        if high - low == 1:
            return whole, [value]
        middle = (low + high) // 2
        left, earlier = self._cheapest(node + 1, low, middle, shift, cost)
        right, later = self._cheapest(node + 2 * (middle - low), middle, high, shift, cost)
        return (whole, [value]) if whole <= left + right else (left + right, earlier + later)

    def _value(self, node: int, low: int, high: int, shift: int) -> T:
        value = self._nodes[node]
        if value is None or self._stamps[node] != low + shift:
            middle = (low + high) // 2
            earlier = self._value(node + 1, low, middle, shift)
            later = self._value(node + 2 * (middle - low), middle, high, shift)
            value = self._combine(earlier, later)
            if self._keep is not None:
                value = self._keep(node, high - low, value)
            self._nodes[node], self._stamps[node] = value, low + shift
        return value
