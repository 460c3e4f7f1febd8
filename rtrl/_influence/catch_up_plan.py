"""Plan how influences are brought up to date through a segment tree, before any product is computed."""

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

from rtrl._influence.segment_tree import CircularSegmentTree, Node

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hop:
    """One product of a plan: it takes all columns that start at ``first_start`` … ``start`` from ``start`` to ``stop``.

    Attributes:
        nodes: whose product it is, earliest first; several are composed for this hop alone.
        pattern: of that product.
        then: the hop whose product follows that of the nodes, composed with it.
    """

    first_start: int
    start: int
    stop: int
    nodes: tuple[Node, ...]
    pattern: Any
    then: "Hop | None" = None


@dataclass(frozen=True, slots=True)
class CatchUpPlan:
    """Hops in an order in which they can be taken.

    Attributes:
        hops: in order.
        cost: of all hops, including the compositions that they need.
        spent_credit: how much of ``cost`` is covered by credit.
    """

    hops: Sequence[Hop]
    cost: int
    spent_credit: int


class CatchUpPlanner(Generic[T]):
    """Plan a cheap way through a segment tree for columns that start at several steps and end at one.

    All columns that have reached a node's first step go through the node together: through its product if that costs no
    more than the best way through its two halves, composing what is not composed yet included. Columns that start
    inside a node join there, between its halves. Two hops in a row with the same columns are composed for this plan
    alone where that is cheaper. And where it is cheaper to compose one product to the end for each start, out of that
    of the next start, all columns take their own product.

    Each uncomposed node accrues credit: what earlier plans would have saved had it been composed. It is composed at the
    latest when its credit covers the cost. So the first plan costs no more than applying element by element, and many
    small plans do not avoid a product that all of them need.

    Args:
        tree: whose elements are planned with; planning computes none of its products.
        pattern_of: the pattern of an element, with ``apply_macs``, the cost of applying it to one column.
        compose_patterns: ``(first, second)``, the pattern of ``combine(first, second)``, also with ``compose_macs``,
            the cost of composing it.
        store_pattern: ``(number, pattern) -> pattern`` to hold for a node; by default the pattern itself.

    Cost: O(range) look-ups of patterns per plan.
    """

    def __init__(
        self,
        tree: CircularSegmentTree[T],
        pattern_of: Callable[[T], Any],
        compose_patterns: Callable[[Any, Any], Any],
        store_pattern: Callable[[int, Any], Any] | None = None,
    ) -> None:
        self.tree, self.compose_patterns = tree, compose_patterns
        self._pattern_of, self._store_pattern = pattern_of, store_pattern
        self._patterns: dict[int, tuple[int, Any]] = {}  # by node number: the node's first step, its pattern
        self._credits: dict[int, tuple[int, int]] = {}  # by node number: the node's first step, its credit

    def plan(self, columns: Mapping[int, int], stop: int, *, shared: bool = False) -> CatchUpPlan:
        """Plan how columns, by the step they start at, get to ``stop``.

        Args:
            columns: start → how many.
            stop: the step after the last one.
            shared: where columns of several starts meet, they count as the largest of their numbers, not as the sum.

        Raises:
            WindowError: a step on the way is not held.
        """
        return _Search(self, columns, stop, shared).plan()

    def products(self, plan: CatchUpPlan) -> list[T]:
        """Compute the products of a plan's hops; the tree must not have been appended to since."""
        computed: dict[int, T] = {}
        for hop in plan.hops:
            product = self.tree.product(hop.nodes)
            computed[id(hop)] = product if hop.then is None else self.tree.combine(product, computed[id(hop.then)])
        return list(computed.values())

    def state_dict(self) -> dict[str, list[list[int]]]:
        """Return what plans depend on besides the elements: the inner nodes composed, and the credits of others."""
        composed, credits = [], []
        stack = self.tree.nodes(self.tree.oldest, self.tree.stop)
        while stack:
            node = stack.pop()
            if node.is_leaf:
                continue
            if self.tree.is_held(node):
                composed.append([node.start, node.stop])
            elif self.credit(node):
                credits.append([node.number, node.start, self.credit(node)])
            stack += node.halves
        return {"composed": composed, "credits": credits}

    def load_state_dict(self, saved: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Go on planning as the planner did that ``saved`` was taken of, over a tree with the same elements.

        Raises:
            WindowError: the tree does not hold what was composed.
        """
        for start, stop in saved["composed"]:
            self.tree.query(start, stop)
        self._credits = {number: (start, credit) for number, start, credit in saved["credits"]}

    def pattern(self, node: Node) -> Any:
        """The pattern of a node's product."""
        start, pattern = self._patterns.get(node.number, (None, None))
        if start != node.start:
            if node.is_leaf:
                pattern = self._pattern_of(self.tree.value(node))
            else:
                pattern = self.compose_patterns(*map(self.pattern, node.halves))
                if self._store_pattern is not None:
                    pattern = self._store_pattern(node.number, pattern)
            self._patterns[node.number] = node.start, pattern
        return pattern

    def credit(self, node: Node) -> int:
        """What earlier plans would have saved had the node been composed."""
        start, credit = self._credits.get(node.number, (None, 0))
        return credit if start == node.start else 0

    def add_credit(self, node: Node, saved: int) -> None:
        """Note what one more plan would have saved."""
        self._credits[node.number] = node.start, self.credit(node) + saved


class _Way(NamedTuple):
    """Hops through a node, and what they cost.

    Attributes:
        cost: the credit spent is not counted.
        spent: credit.
        hops: in order.
        savings: uncomposed nodes that the way does without, and what it would save if they were composed.
    """

    cost: int
    spent: int
    hops: tuple[Hop, ...]
    savings: tuple[tuple[Node, int], ...]


def _in_turn(ways: Sequence[_Way]) -> _Way:
    costs, spent, hops, savings = zip(*ways, strict=True)
    return _Way(sum(costs), sum(spent), sum(hops, ()), sum(savings, ()))


class _Search:
    """The search for one plan; the arguments are those of ``CatchUpPlanner.plan``."""

    def __init__(self, planner: CatchUpPlanner[Any], columns: Mapping[int, int], stop: int, shared: bool) -> None:
        self._planner, self._tree, self._stop, self._shared = planner, planner.tree, stop, shared
        self._starts = sorted(start for start in columns if start < stop)
        self._counts = [columns[start] for start in self._starts]
        self._together: list[int] = [*accumulate(self._counts, max if shared else operator.add)]  # of the first starts

    def plan(self) -> CatchUpPlan:
        """The plan found; notes the credit of the nodes that it does without."""
        if not self._starts:
            return CatchUpPlan([], 0, 0)
        way = _in_turn([self._way(node) for node in self._tree.nodes(self._starts[0], self._stop)])
        for node, saving in way.savings:
            self._planner.add_credit(node, saving)
        hops, saved = self._joined(way.hops)
        if len(self._starts) > 1 and not self._shared:
            alternative = self._one_product_each(way.cost - saved)
            if alternative is not None:
                return alternative
        return CatchUpPlan(hops, way.cost + way.spent - saved, way.spent)

    def _columns(self, start: int) -> int:
        """How many have started by ``start``."""
        return self._together[bisect_right(self._starts, start) - 1]

    def _starts_between(self, first: int, stop: int) -> bool:
        """Whether columns start after ``first`` and before ``stop``."""
        return bisect_right(self._starts, first) < bisect_left(self._starts, stop)

    def _uncomposed_cost(self, node: Node) -> int:
        """The cost of composing a node and all that is not composed under it."""
        if self._tree.is_held(node):
            return 0
        own: int = self._planner.pattern(node).compose_macs
        return own + sum(map(self._uncomposed_cost, node.halves))

    def _way(self, node: Node) -> _Way:
        """The cheapest way to a node's end for all columns that start before it."""
        split = None if node.is_leaf else _in_turn([*map(self._way, node.halves)])
        if split is not None and self._starts_between(node.start, node.stop):
            return split
        pattern = self._planner.pattern(node)
        hop = Hop(self._starts[0], node.start, node.stop, (node,), pattern)
        applying, composing = pattern.apply_macs * self._columns(node.start), self._uncomposed_cost(node)
        spent = min(composing, self._planner.credit(node))
        if split is None or applying + composing - spent <= split.cost:
            return _Way(applying + composing - spent, spent, (hop,), ())
        if composing:
            split = split._replace(savings=(*split.savings, (node, max(split.cost - applying, 0))))
        return split

    def _joined(self, hops: Sequence[Hop]) -> tuple[list[Hop], int]:
        """The hops, with neighbours composed for this plan alone where that is cheaper; and what that saves."""
        joined: list[Hop] = []
        total = 0
        for hop in hops:
            while joined and not self._starts_between(joined[-1].start, hop.start + 1):
                first = joined[-1]
                pattern = self._planner.compose_patterns(first.pattern, hop.pattern)
                fewer = first.pattern.apply_macs + hop.pattern.apply_macs - pattern.apply_macs
                saved = fewer * self._columns(hop.start) - pattern.compose_macs
                if saved <= 0:
                    break
                total += saved
                joined.pop()
                hop = Hop(hop.first_start, first.start, hop.stop, first.nodes + hop.nodes, pattern)
            joined.append(hop)
        return joined, total

    def _one_product_each(self, limit: int) -> CatchUpPlan | None:
        """One product to the end for each start, composed with that of the next start, so that every column is
        multiplied once; None if it costs ``limit`` or more."""
        hops: list[Hop] = []
        cost = 0
        for start, columns in reversed(list(zip(self._starts, self._counts, strict=True))):
            then = hops[-1] if hops else None
            nodes = self._tree.nodes(start, then.start if then else self._stop)
            pattern, *others = [*map(self._planner.pattern, nodes), *([then.pattern] if then else [])]
            for other in others:
                pattern = self._planner.compose_patterns(pattern, other)
                cost += pattern.compose_macs
            cost += sum(map(self._uncomposed_cost, nodes)) + pattern.apply_macs * columns
            if cost >= limit:
                return None
            hops.append(Hop(start, start, self._stop, tuple(nodes), pattern, then))
        return CatchUpPlan(hops, cost, 0)
