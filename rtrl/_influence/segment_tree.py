"""A ring of the last n elements of any monoid, with ordered range products."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from rtrl._influence.catch_up_plan import Leg, Node, Plan, Planner
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
        outline: ``outline(element)``, what prices are told of an element: something that is known without computing
            products. By default the element itself, so that every product a price is asked of is computed first.
        merge: ``merge(earlier, later)``, the outline of ``combine(earlier, later)``; goes with ``outline``.
        keep_outline: as ``keep``, for the outlines of products.

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
        outline: Callable[[T], Any] | None = None,
        merge: Callable[[Any, Any], Any] | None = None,
        keep_outline: Callable[[int, int, Any], Any] | None = None,
    ) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ConfigError(f"capacity must be a positive integer, got {capacity!r}")
        if not isinstance(start, int) or isinstance(start, bool):
            raise ConfigError(f"start must be an integer, got {start!r}")
        self.capacity = capacity
        self._combine, self._identity, self._keep = combine, identity, keep
        self._outline, self._merge, self._keep_outline = outline, merge, keep_outline
        self._first, self._stop = start, start
        # Node 0 spans all places of the ring. A node is current while the step that its first place held when it was
        # computed is still there: places are overwritten in order, so none of the others can have changed before that
        # one.
        self._nodes: list[T | None] = [None] * (2 * capacity - 1)
        self._stamps = [start - 1] * (2 * capacity - 1)
        # The same for outlines, and for products that are there or were there when the tree was saved.
        self._outlines: list[Any] = [None] * (2 * capacity - 1)
        self._drawn = [start - 1] * (2 * capacity - 1)
        self._made = [start - 1] * (2 * capacity - 1)
        self._credits: dict[int, tuple[int, int]] = {}

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
        place = self._stop % self.capacity
        node = Node(0, 0, self.capacity, self._stop - place)
        while node.high - node.low > 1:
            left, right = self.halves(node)
            node = left if place < left.high else right
        self._nodes[node.place] = element if self._keep is None else self._keep(node.place, 1, element)
        self._stamps[node.place] = self._stop
        self._stop += 1

    def query(self, start: int, stop: int) -> T:
        """The product of the elements of steps ``start`` … ``stop − 1``, earliest first; the identity for an empty
        range.

        Raises:
            WindowError: a step of the range is not held (never appended, or already overwritten), or start > stop.
        """
        return self._product(self.nodes(start, stop))

    def cover(
        self,
        start: int,
        stop: int,
        cost: Callable[[Any], int] | None = None,
        effort: Callable[[Any], int] | None = None,
    ) -> list[T]:
        """Elements, earliest first, whose product is ``query(start, stop)``: remembered nodes, at most
        ``2·log2(capacity) + 2`` of them.

        Args:
            cost: the price of using an element once, told by its outline. Given, a node is split into the nodes under
                it wherever that is cheaper (the list may then be longer; its product is the same).
            effort: the price of composing an element, told by its outline; nothing by default.

        Raises:
            WindowError: as for ``query``.
        """
        if cost is None:
            return [self._value(node) for node in self.nodes(start, stop)]
        self._check(start, stop)
        plan = self.plan({start: 1}, stop, cost, effort or (lambda outline: 0))
        return self.products(plan)

    def plan(
        self,
        starts: Mapping[int, int],
        stop: int,
        cost: Callable[[Any], int],
        effort: Callable[[Any], int],
        *,
        shared: bool = False,
    ) -> Plan:
        """The cheapest way to lead loads, given by the step they start at, to ``stop``; ``catch_up_plan.Planner`` says
        how it is found. ``products`` then gives the elements of its legs.

        Args:
            cost: of using an element for a load of one. effort: of composing it. Both are told its outline.
            shared: what joins on the way does not add up: the load is that of the largest part.

        Raises:
            WindowError: as for ``query``.

        Cost: no combine, where outlines are given.
        """
        return Planner(self, cost, effort, shared)(starts, stop)

    def products(self, plan: Plan) -> list[T]:
        """The elements of the legs of a plan; to be asked for before the next ``append``."""
        made: dict[int, T] = {}

        def product(leg: Leg) -> T:
            if id(leg) not in made:
                own = self._product(leg.nodes)
                made[id(leg)] = own if leg.onward is None else self._combine(own, product(leg.onward))
            return made[id(leg)]

        return [product(leg) for leg in plan.legs]

    def _product(self, nodes: Sequence[Node]) -> T:
        if not nodes:
            return self._identity
        product = self._value(nodes[0])
        for node in nodes[1:]:
            product = self._combine(product, self._value(node))
        return product

    def _check(self, start: int, stop: int) -> None:
        for bound in (start, stop):
            if not isinstance(bound, int) or isinstance(bound, bool):
                raise WindowError(f"a range of steps has integer ends, got {bound!r}")
        if start > stop:
            raise WindowError(f"the range {start} … {stop} is reversed")
        if start < stop and (start < self.oldest or stop > self._stop):
            raise WindowError(
                f"steps {start} … {stop - 1} were asked for, but {self.oldest} … {self._stop - 1} are held"
            )

    def leaves(self) -> Iterator[tuple[int, T]]:
        """The elements held, as (step, element), earliest first."""
        for step in range(self.oldest, self._stop):
            yield step, self.query(step, step + 1)

    # ------------------------------------------------------------------ nodes, for plans

    def nodes(self, start: int, stop: int) -> list[Node]:
        """The fewest nodes that tile a range, earliest first.

        Raises:
            WindowError: as for ``query``.
        """
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

    @staticmethod
    def halves(node: Node) -> tuple[Node, Node]:
        """The two nodes under a node. A subtree of n places takes 2n − 1 nodes, its root first."""
        index, low, high, shift = node
        middle = (low + high) // 2
        return Node(index + 1, low, middle, shift), Node(index + 2 * (middle - low), middle, high, shift)

    def composed(self, node: Node) -> bool:
        """Whether the product of a node's elements is there, or counts as paid for."""
        return node.high - node.low == 1 or self._made[node.place] == node.start

    def outline(self, node: Node) -> Any:
        """The outline of a node's product, without the product."""
        if self._outline is None:
            return self._value(node)
        outline = self._outlines[node.place]
        if outline is None or self._drawn[node.place] != node.start:
            if node.high - node.low == 1:
                outline = self._outline(self._value(node))
            else:
                outline = self.merged(*(self.outline(half) for half in self.halves(node)))
                if self._keep_outline is not None:
                    outline = self._keep_outline(node.place, node.high - node.low, outline)
            self._outlines[node.place], self._drawn[node.place] = outline, node.start
        return outline

    def merged(self, earlier: Any, later: Any) -> Any:
        """The outline of a product."""
        return self._combine(earlier, later) if self._merge is None else self._merge(earlier, later)

    def credit(self, node: Node) -> int:
        """What plans so far would have saved with a node that is not composed."""
        start, credit = self._credits.get(node.place, (node.start, 0))
        return credit if start == node.start else 0

    def add_credit(self, node: Node, saved: int) -> None:
        """Note what one more plan would have saved."""
        self._credits[node.place] = (node.start, self.credit(node) + saved)

    def memory(self) -> list[list[int]]:
        """What plans depend on beside the elements held, as numbers: [node, first step, composed or not, credit]; what
        is composed needs no credit any more."""
        found = []
        for index, made in enumerate(self._made):
            start, credit = self._credits.get(index, (-1, 0))
            if made >= self.oldest or start >= self.oldest:
                found.append([index, max(made, start), int(made >= start), credit if start > made else 0])
        return found

    def recall(self, memory: Sequence[Sequence[int]]) -> None:
        """Go on planning as the tree did that ``memory`` was taken of; products are computed when they are needed."""
        for index, start, made, credit in memory:
            if made:
                self._made[index] = start
            else:
                self._credits[index] = (start, credit)

    def _collect(self, node: Node, first: int, last: int, parts: list[Node]) -> None:
        """Append the nodes that tile the places [first, last) of a subtree."""
        if node.high <= first or last <= node.low:
            return
        if first <= node.low and node.high <= last:
            parts.append(node)
            return
        for half in self.halves(node):
            self._collect(half, first, last, parts)

    def _value(self, node: Node) -> T:
        value = self._nodes[node.place]
        if value is None or self._stamps[node.place] != node.start:
            earlier, later = self.halves(node)
            value = self._combine(self._value(earlier), self._value(later))
            if self._keep is not None:
                value = self._keep(node.place, node.high - node.low, value)
            self._nodes[node.place], self._stamps[node.place] = value, node.start
            self._made[node.place] = node.start
        return value
