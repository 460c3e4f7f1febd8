"""The cheapest ways through a segment tree for what starts at several steps and ends at one, planned before any
product."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rtrl._influence.segment_tree import CircularSegmentTree


class Node(NamedTuple):
    """A node of a tree over the places low … high − 1 of the ring; place + shift is the step held there."""

    place: int
    low: int
    high: int
    shift: int

    @property
    def start(self) -> int:
        """The first step it spans."""
        return self.low + self.shift

    @property
    def stop(self) -> int:
        """The step after the last one it spans."""
        return self.high + self.shift


@dataclass(frozen=True, slots=True)
class Leg:
    """One product on the way: all that started at ``since`` … ``start`` is led from ``start`` to ``stop`` at once.

    Attributes:
        nodes: whose product it is, earliest first; more than one are composed for this leg alone.
        outline: of that product.
        onward: the leg whose product follows that of the nodes, to the end.
    """

    since: int
    start: int
    stop: int
    nodes: tuple[Node, ...]
    outline: Any
    onward: "Leg | None" = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Legs in an order in which they can be taken.

    Attributes:
        cost: of all legs, with the compositions that they need.
        advance: how much of ``cost`` is paid out of what compositions would have saved in earlier plans; ``cost −
            advance`` is at most what any other choice of nodes costs now, without products for one leg alone.
    """

    legs: list[Leg]
    cost: int
    advance: int


class Planner:
    """Plans for one tree: decides node by node between one product and the nodes under it.

    Everything that has reached the first step of a node goes through it together. It goes through the node itself if
    ``use(node) · load``, plus the cost of composing what is not composed yet, less the node's credit, is at most the
    cost of the best plan through its two halves; what starts inside a node joins at its own step or behind the node.
    Two legs in a row with the same load are composed for this plan alone where that is cheaper still. And if it is
    cheaper to compose the way from each start to the end, each out of that of the next start, every load takes its own.

    The credit of a node is what it would have saved if it had been there in earlier plans since its leaves changed, as
    long as it was not composed: a composition is bought at the latest when going without it has cost as much. So a plan
    for the first to wake costs no more than replay, and many small loads cannot avoid a product that all of them need.

    Args:
        tree: with outlines.
        use: the cost of using an outline, for a load of one. make: the cost of composing an outline out of its halves.
        shared: a load is not the sum of what goes through, but its largest part.

    Cost: O(range · log(starts)) look-ups of outlines.
    """

    def __init__(
        self,
        tree: "CircularSegmentTree[Any]",
        use: Callable[[Any], int],
        make: Callable[[Any], int],
        shared: bool = False,
    ) -> None:
        self._tree, self._use, self._make, self._shared = tree, use, make, shared

    def __call__(self, starts: Mapping[int, int], stop: int) -> Plan:
        """The plan for loads by the step they start at, all to be led to ``stop``.

        Raises:
            WindowError: a step on the way is not held.
        """
        self._starts = sorted(start for start in starts if start < stop)
        self._loads = [starts[start] for start in self._starts]
        self._sums = [0]
        for load in self._loads:
            self._sums.append(self._sums[-1] + load)
        self._best: dict[tuple[int, int, bool], tuple[int, bool]] = {}
        self._price: dict[int, int] = {}
        self._advance, self._bought = 0, 0
        legs: list[Leg] = []
        if self._starts:
            first = self._starts[0]
            for node in self._tree.nodes(first, stop):
                self._follow(node, first, False, legs)
        legs = self._joined(legs)
        cost = self._bought + sum(self._use(leg.outline) * self._load(leg.since, leg.start) for leg in legs)
        if len(self._starts) > 1 and not self._shared:
            apart, price = self._apart(stop, cost - self._advance)
            if price < cost - self._advance:
                return Plan(apart, price, 0)
        return Plan(legs, cost, self._advance)

    def _apart(self, stop: int, limit: int) -> tuple[list[Leg], int]:
        """One product to the end for each start, made of that of the next start, so that every load is applied once;
        and the cost. Given up once it is dearer than ``limit``."""
        legs: list[Leg] = []
        cost = 0
        for start, load in reversed(list(zip(self._starts, self._loads, strict=True))):
            onward = legs[-1] if legs else None
            nodes = self._tree.nodes(start, onward.start if onward else stop)
            outline = None
            for node in nodes:
                cost += self._missing(node)
                outline = self._also(outline, self._tree.outline(node))
                cost += self._make(outline) if node != nodes[0] else 0
            if onward is not None:
                outline = self._tree.merged(outline, onward.outline)
                cost += self._make(outline)
            cost += self._use(outline) * load
            if cost >= limit:
                break
            legs.append(Leg(start, start, stop, tuple(nodes), outline, onward))
        return legs, cost

    def _also(self, outline: Any, then: Any) -> Any:
        return then if outline is None else self._tree.merged(outline, then)

    def _load(self, since: int, start: int) -> int:
        """Of all that started at ``since`` … ``start``."""
        i, j = bisect_left(self._starts, since), bisect_right(self._starts, start)
        if i >= j:
            return 0
        return max(self._loads[i:j]) if self._shared else self._sums[j] - self._sums[i]

    def _missing(self, node: Node) -> int:
        """The cost of composing a node and all that is missing under it."""
        if self._tree.composed(node):
            return 0
        if node.place not in self._price:
            below = sum(self._missing(half) for half in self._tree.halves(node))
            self._price[node.place] = below + self._make(self._tree.outline(node))
        return self._price[node.place]

    def _cheapest(self, node: Node, since: int, free: bool) -> int:
        """The cost, less the credit used, of leading all that started at ``since`` or later, before the node's end, to
        its end; ``free``: with the node composed already."""
        key = (node.place, since, free)
        if key not in self._best:
            self._best[key] = self._choose(node, since, free)
        return self._best[key][0]

    def _choose(self, node: Node, since: int, free: bool) -> tuple[int, bool]:
        """That cost, and whether what has reached the node goes through it in one leg."""
        load = self._load(since, node.start)
        if node.high - node.low == 1:
            return (self._use(self._tree.outline(node)) * load if load else 0), True
        if not load and not self._load(since, node.stop - 1):
            return 0, False
        split = sum(self._cheapest(half, since, free) for half in self._tree.halves(node))
        if not load:
            return split, False
        missing = 0 if free else self._missing(node)
        whole = self._through(node, load) + max(missing - self._tree.credit(node), 0)
        return (whole, True) if whole <= split else (split, False)

    def _through(self, node: Node, load: int) -> int:
        """The cost of one leg through a composed node, and of what starts inside it."""
        inside = 0
        if self._load(node.start + 1, node.stop - 1):
            inside = sum(self._cheapest(half, node.start + 1, True) for half in self._tree.halves(node))
        return self._use(self._tree.outline(node)) * load + inside

    def _follow(self, node: Node, since: int, free: bool, legs: list[Leg]) -> None:
        """Write down the legs of the plan through a node, and the credit of the nodes it goes without."""
        load = self._load(since, node.start)
        if not load and not self._load(since, node.stop - 1):
            return
        self._cheapest(node, since, free)
        if self._best[node.place, since, free][1]:
            legs.append(Leg(since, node.start, node.stop, (node,), self._tree.outline(node)))
            missing = 0 if free else self._missing(node)
            self._bought += missing
            if missing:
                self._advance += min(missing, self._tree.credit(node))
            since, free = node.start + 1, True
            if node.high - node.low == 1 or not self._load(since, node.stop - 1):
                return
        elif load and not free and not self._tree.composed(node):
            split = sum(self._cheapest(half, since, free) for half in self._tree.halves(node))
            self._tree.add_credit(node, max(split - self._through(node, load), 0))
        for half in self._tree.halves(node):
            self._follow(half, since, free, legs)

    def _joined(self, legs: list[Leg]) -> list[Leg]:
        """The legs, with those composed for this plan alone that are cheaper as one."""
        out: list[Leg] = []
        for leg in legs:
            while out and (joined := self._join(out[-1], leg)) is not None:
                self._bought += self._make(joined.outline)
                out.pop()
                leg = joined
            out.append(leg)
        return out

    def _join(self, leg: Leg, then: Leg) -> Leg | None:
        """Both as one, if the same load goes through them and one product is cheaper."""
        if leg.stop != then.start or leg.since != then.since or self._load(leg.start + 1, then.start):
            return None
        outline, load = self._tree.merged(leg.outline, then.outline), self._load(leg.since, leg.start)
        if self._make(outline) + self._use(outline) * load >= (self._use(leg.outline) + self._use(then.outline)) * load:
            return None
        return Leg(leg.since, leg.start, then.stop, leg.nodes + then.nodes, outline)
