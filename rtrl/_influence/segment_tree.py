"""A circular segment tree: the last n elements of any monoid, with ordered products of any range."""

import copy
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Generic, NamedTuple, TypeVar, cast

from rtrl._utils import validation
from rtrl.errors import ConfigError, WindowError

T = TypeVar("T")


class Node(NamedTuple):
    """A node of the tree, over the places lo … hi − 1 of the ring; place + offset is the step held there."""

    number: int
    lo: int
    hi: int
    offset: int

    @property
    def start(self) -> int:
        """The first step that it spans."""
        return self.lo + self.offset

    @property
    def stop(self) -> int:
        """The step after the last one that it spans."""
        return self.hi + self.offset

    @property
    def is_leaf(self) -> bool:
        """Whether it spans one step."""
        return self.hi - self.lo == 1

    @property
    def halves(self) -> tuple["Node", "Node"]:
        """The two nodes under it, earlier first. A subtree of n places takes 2n − 1 numbers, its root first."""
        number, lo, hi, offset = self
        middle = (lo + hi) // 2
        return Node(number + 1, lo, middle, offset), Node(number + 2 * (middle - lo), middle, hi, offset)


class CircularSegmentTree(Generic[T]):
    """Hold the last ``capacity`` elements of any monoid; compose any range of them in order with O(log n) combines.

    Equation:
        ``query(a, b) = x_a ∘ x_{a+1} ∘ … ∘ x_{b−1}``, where ``combine(first, second)`` is ∘, associative and not
        necessarily commutative. Steps are counted from 0 for the first element ever appended (or from ``start``).

    Args:
        capacity: how many elements are held, any number ≥ 1.
        combine: ``(first, second) -> T``; it must not change its arguments.
        identity: the value of an empty range.
        start: the step number of the first element.
        store: ``store(number, value) -> value`` is called when the value of node ``number`` in 0 … 2·capacity − 2 is to
            be held, and returns the value to hold; by default the value itself. With it, memory is the caller's
            business: ``query`` may return an object that the tree holds.

    Raises:
        ConfigError: ``capacity`` is not a positive integer, or ``start`` is not an integer.

    Cost:
        Appending is O(1), without a combine. A query takes at most ``2·log2(capacity) + 2`` combines to join its parts,
        and computes each inner node under it once, until a leaf of that node is overwritten. At most
        ``2·capacity − 1`` elements are held.

    Example:
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
        store: Callable[[int, T], T] | None = None,
    ) -> None:
        self.capacity = validation.integer("capacity", _plain(capacity))
        self._first = self._stop = validation.integer("start", _plain(start), least=None)
        self.combine, self.identity, self._store = combine, identity, store
        # Node 0 spans all places of the ring. A node's value is current while the step that its first place held when
        # it was computed is still there: places are overwritten in order, so none of the others can have changed before
        # that one.
        self._values: list[T | None] = [None] * (2 * self.capacity - 1)
        self._stamps: list[int | None] = [None] * (2 * self.capacity - 1)

    def __len__(self) -> int:
        return self._stop - self.oldest

    @property
    def oldest(self) -> int:
        """The step number of the oldest element held; ``stop`` if none is held."""
        return max(self._first, self._stop - self.capacity)

    @property
    def stop(self) -> int:
        """The step number that the next element will get."""
        return self._stop

    def append(self, element: T) -> None:
        """Add ``element`` as that of step ``stop``; once the ring is full, this overwrites the oldest one."""
        place = self._stop % self.capacity
        node = Node(0, 0, self.capacity, self._stop - place)
        while not node.is_leaf:
            first, second = node.halves
            node = first if place < first.hi else second
        self._hold(node, element)
        self._stop += 1

    def skip(self) -> None:
        """Count a step without an element; those before it are forgotten."""
        self._stop += 1
        self._first = self._stop

    def query(self, start: int, stop: int) -> T:
        """Return the product of the elements of steps ``start`` … ``stop − 1``, earliest first; the identity for none.

        Without ``store`` it is a deep copy, so that the tree stays as it is if the caller changes it.

        Raises:
            WindowError: a step of the range is not held (never appended, or overwritten), or start > stop.
            ConfigError: the product cannot be copied; pass ``store=lambda number, value: value`` to get it as it is.
        """
        product = self.product(self.nodes(start, stop))
        if self._store is not None:
            return product
        try:
            return copy.deepcopy(product)
        except Exception as error:
            raise ConfigError(
                f"a product of the tree, {type(product).__name__}, cannot be copied ({error}). Pass "
                "store=lambda number, value: value to get what the tree holds, and do not change it"
            ) from error

    def product(self, nodes: Sequence[Node]) -> T:
        """Return the product of the values of ``nodes``, in this order; the identity for none.

        It may be an object that the tree holds: do not change it.
        """
        if not nodes:
            return self.identity
        product = self.value(nodes[0])
        for node in nodes[1:]:
            product = self.combine(product, self.value(node))
        return product

    def nodes(self, start: int, stop: int) -> list[Node]:
        """Return the fewest nodes that tile steps ``start`` … ``stop − 1``, earliest first.

        Raises:
            WindowError: as for ``query``.
        """
        start, stop = _plain(start), _plain(stop)
        self._check(start, stop)
        parts: list[Node] = []
        if start == stop:
            return parts
        first, last = start % self.capacity, (stop - 1) % self.capacity + 1
        if first < last:
            self._collect(Node(0, 0, self.capacity, start - first), first, last, parts)
        else:  # across the wrap-around the older elements stand at the end of the ring
            self._collect(Node(0, 0, self.capacity, start - first), first, self.capacity, parts)
            self._collect(Node(0, 0, self.capacity, start - first + self.capacity), 0, last, parts)
        return parts

    def value(self, node: Node) -> T:
        """Return the product of the elements of ``node``, one of ``nodes(start, stop)`` or under it.

        It is held until one of them is overwritten: do not change it.
        """
        if self._stamps[node.number] != node.start:
            first, second = node.halves
            return self._hold(node, self.combine(self.value(first), self.value(second)))
        return cast(T, self._values[node.number])

    def is_held(self, node: Node) -> bool:
        """Whether ``value(node)`` takes no combine."""
        return node.is_leaf or self._stamps[node.number] == node.start

    def _hold(self, node: Node, value: T) -> T:
        value = value if self._store is None else self._store(node.number, value)
        self._values[node.number], self._stamps[node.number] = value, node.start
        return value

    def _check(self, start: int, stop: int) -> None:
        for bound in (start, stop):
            if not isinstance(bound, int) or isinstance(bound, bool):
                raise WindowError(f"the ends of a range of steps must be integers, got {bound!r}")
        if start > stop:
            raise WindowError(f"the range {start} … {stop} is reversed")
        if start < stop and (start < self.oldest or stop > self._stop):
            raise WindowError(
                f"steps {start} … {stop - 1} were requested, but {self.oldest} … {self._stop - 1} are held"
            )

    def _collect(self, node: Node, first: int, last: int, parts: list[Node]) -> None:
        """Append the nodes that tile the places first … last − 1 within a node."""
        if node.hi <= first or last <= node.lo:
            return
        if first <= node.lo and node.hi <= last:
            parts.append(node)
            return
        for half in node.halves:
            self._collect(half, first, last, parts)


def _plain(value: Any) -> Any:
    """NumPy's integers as Python's own; anything else as it is."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
