"""Plan how influences are brought up to date through a segment tree, before any product is computed."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

from rtrl._influence.segment_tree import CircularSegmentTree, Node

T = TypeVar("T")


class Costs(Protocol):
    """The pattern of a product: what it costs, known without computing it."""

    @property
    def apply_macs(self) -> int:
        """The cost of applying it to one column."""
        ...

    @property
    def compose_macs(self) -> int:
        """The cost of composing it of its two factors."""
        ...


@dataclass(frozen=True, slots=True)
class Hop:
    """One product of a plan: it takes all columns that start at ``first_start`` … ``start`` from ``start`` to ``stop``.

    Attributes:
        first_start: the earliest start of these columns.
        start: the step before which the product is applied.
        stop: the step that it leads to.
        nodes: whose product it is, earliest first; several are composed for this hop alone.
        pattern: of that product.
        then: the hop whose product is composed to the end of that of the nodes.
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
        cost: of all hops, with the compositions that they need.
        spent_credit: how much of ``cost`` is covered by credit; ``cost − spent_credit`` is at most what any other
            choice of nodes costs now, without products for one hop alone.
    """

    hops: Sequence[Hop]
    cost: int
    spent_credit: int


class CatchUpPlanner(Generic[T]):
    """Plan the cheapest way through a segment tree for columns that start at several steps and end at one.

    Node by node, all columns that have reached a node's first step go through the node together: through its product if
    that costs no more than the best way through its two halves, composing what is not composed yet included. Columns
    that start inside a node join at their own step, or go on behind it. Two hops in a row with the same columns are
    composed for this plan alone where that is cheaper. And where it is cheaper to compose one product to the end for
    each start, out of that of the next start, all columns take their own product.

    Each uncomposed node accrues credit: what earlier plans would have saved had it been composed. It is composed at the
    latest when its credit covers the cost. So the first plan costs no more than applying element by element, and many
    small plans do not avoid a product that all of them need.

    Args:
        tree: whose elements are planned with; it is changed by appending to it and by ``products`` alone.
        pattern_of: the pattern of an element.
        compose_patterns: ``(first, second)``, the pattern of ``combine(first, second)``.
        store_pattern: ``(number, pattern) -> pattern`` to hold for a node; by default the pattern itself.

    Cost: O(range · log(starts)) look-ups of patterns per plan.
    """

    def __init__(
        self,
        tree: CircularSegmentTree[T],
        pattern_of: Callable[[T], Any],
        compose_patterns: Callable[[Any, Any], Any],
        store_pattern: Callable[[int, Any], Any] | None = None,
    ) -> None:
        self.tree = tree
        self._pattern_of, self.compose_patterns, self._store_pattern = pattern_of, compose_patterns, store_pattern
        self._patterns: dict[int, tuple[int, Any]] = {}  # by node number: the node's first step, its pattern
        self._credits: dict[int, tuple[int, int]] = {}  # by node number: the node's first step, its credit

    def plan(self, columns: Mapping[int, int], stop: int, *, shared: bool = False) -> CatchUpPlan:
        """Plan how columns, by the step they start at, get to ``stop``.

        Args:
            columns: start → how many. stop: the step after the last one.
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
            if self.tree.is_held(node):
                composed.append([node.start, node.stop])
            elif self.credit(node):
                credits.append([node.number, node.start, self.credit(node)])
            stack += [] if node.is_leaf else node.halves
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


@dataclass(frozen=True, slots=True)
class _Way:
    """Hops through a node, and what they cost.

    Attributes:
        charged: the cost, less the credit spent.
        hops: in order.
        composing: the cost of composing nodes, part of the charge and of the credit spent.
        spent: credit.
        savings: uncomposed nodes that the way does without, and what it would save if they were composed.
    """

    charged: int = 0
    hops: tuple[Hop, ...] = ()
    composing: int = 0
    spent: int = 0
    savings: tuple[tuple[Node, int], ...] = ()

    def __add__(self, other: "_Way") -> "_Way":
        return _Way(
            self.charged + other.charged,
            self.hops + other.hops,
            self.composing + other.composing,
            self.spent + other.spent,
            self.savings + other.savings,
        )


class _Search:
    """The search for one plan; the arguments are those of ``CatchUpPlanner.plan``."""

    def __init__(self, planner: CatchUpPlanner[Any], columns: Mapping[int, int], stop: int, shared: bool) -> None:
        self._planner, self._tree, self._stop, self._shared = planner, planner.tree, stop, shared
        self._starts = sorted(start for start in columns if start < stop)
        self._counts = [columns[start] for start in self._starts]
        self._sums = [0, *accumulate(self._counts)]
        self._ways: dict[tuple[int, int, bool], _Way] = {}
        self._uncomposed_costs: dict[int, int] = {}

    def plan(self) -> CatchUpPlan:
        """The cheapest plan; notes the credit of the nodes that it does without."""
        if not self._starts:
            return CatchUpPlan([], 0, 0)
        first = self._starts[0]
        way = sum((self._way(node, first, False) for node in self._tree.nodes(first, self._stop)), _Way())
        for node, saving in way.savings:
            self._planner.add_credit(node, saving)
        hops, joining = self._joined(way.hops)
        cost = way.composing + joining
        cost += sum(hop.pattern.apply_macs * self._columns(hop.first_start, hop.start) for hop in hops)
        if len(self._starts) > 1 and not self._shared:
            alternative = self._one_product_each(cost - way.spent)
            if alternative is not None:
                return alternative
        return CatchUpPlan(hops, cost, way.spent)

    def _columns(self, first_start: int, start: int) -> int:
        """How many start at ``first_start`` … ``start``."""
        i, j = bisect_left(self._starts, first_start), bisect_right(self._starts, start)
        if i >= j:
            return 0
        return max(self._counts[i:j]) if self._shared else self._sums[j] - self._sums[i]

    def _uncomposed_cost(self, node: Node) -> int:
        """The cost of composing a node and all that is not composed under it."""
        if self._tree.is_held(node):
            return 0
        if node.number not in self._uncomposed_costs:
            below = sum(map(self._uncomposed_cost, node.halves))
            self._uncomposed_costs[node.number] = below + self._planner.pattern(node).compose_macs
        return self._uncomposed_costs[node.number]

    def _way(self, node: Node, first_start: int, composed: bool) -> _Way:
        """The cheapest way for all columns that start at ``first_start`` or later, and before the node's end, to its
        end; ``composed``: the node's product is there, or is composed for other columns."""
        key = (node.number, first_start, composed)
        if key not in self._ways:
            self._ways[key] = self._find_way(node, first_start, composed)
        return self._ways[key]

    def _find_way(self, node: Node, first_start: int, composed: bool) -> _Way:
        if not self._columns(first_start, node.stop - 1):
            return _Way()
        columns = self._columns(first_start, node.start)
        if not columns:  # all start inside the node
            return sum((self._way(half, first_start, composed) for half in node.halves), _Way())
        pattern = self._planner.pattern(node)
        through = _Way(pattern.apply_macs * columns, (Hop(first_start, node.start, node.stop, (node,), pattern),))
        if node.is_leaf:
            return through
        split = sum((self._way(half, first_start, composed) for half in node.halves), _Way())
        through = sum((self._way(half, node.start + 1, True) for half in node.halves), through)
        composing = 0 if composed else self._uncomposed_cost(node)
        spent = min(composing, self._planner.credit(node))
        if through.charged + composing - spent <= split.charged:
            return through + _Way(composing - spent, composing=composing, spent=spent)
        if not composed and not self._tree.is_held(node):
            split += _Way(savings=((node, max(split.charged - through.charged, 0)),))
        return split

    def _joined(self, hops: Sequence[Hop]) -> tuple[list[Hop], int]:
        """The hops, with neighbours composed for this plan alone where that is cheaper; and the cost of composing."""
        joined: list[Hop] = []
        cost = 0
        for hop in hops:
            while joined and (both := self._join(joined[-1], hop)) is not None:
                cost += both.pattern.compose_macs
                joined.pop()
                hop = both
            joined.append(hop)
        return joined, cost

    def _join(self, first: Hop, second: Hop) -> Hop | None:
        """Both as one, if the same columns go through them and one product is cheaper."""
        if first.stop != second.start or first.first_start != second.first_start:
            return None
        if self._columns(first.start + 1, second.start):
            return None
        pattern = self._planner.compose_patterns(first.pattern, second.pattern)
        saved = first.pattern.apply_macs + second.pattern.apply_macs - pattern.apply_macs
        if pattern.compose_macs >= saved * self._columns(first.first_start, first.start):
            return None
        return Hop(first.first_start, first.start, second.stop, first.nodes + second.nodes, pattern)

    def _one_product_each(self, limit: int) -> CatchUpPlan | None:
        """One product to the end for each start, composed with that of the next start, so that every column is
        multiplied once; None if it costs ``limit`` or more."""
        hops: list[Hop] = []
        cost = 0
        for start, columns in reversed(list(zip(self._starts, self._counts, strict=True))):
            then = hops[-1] if hops else None
            nodes = self._tree.nodes(start, then.start if then else self._stop)
            cost += sum(map(self._uncomposed_cost, nodes))
            pattern, *others = [*map(self._planner.pattern, nodes), *([then.pattern] if then else [])]
            for other in others:
                pattern = self._planner.compose_patterns(pattern, other)
                cost += pattern.compose_macs
            cost += pattern.apply_macs * columns
            if cost >= limit:
                return None
            hops.append(Hop(start, start, self._stop, tuple(nodes), pattern, then))
        return CatchUpPlan(hops, cost, 0)
