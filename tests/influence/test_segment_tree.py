"""The circular segment tree on the free monoid, where any error of order, range or memory fails exactly, and on
row-sparse matrices."""

import math
from collections.abc import Callable

import pytest
from helpers.full_matrices import written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_transition import assert_same, elements

import oracles
from rtrl import CircularSegmentTree
from rtrl._influence.history import History
from rtrl._influence.transition import Transition
from rtrl.errors import ConfigError, WindowError


class Counting:
    """String concatenation that counts."""

    def __init__(self) -> None:
        self.combines = 0

    def __call__(self, earlier: str, later: str) -> str:
        self.combines += 1
        return earlier + later


def letter(step: int) -> str:
    return f"<{step}>"


@given(capacity=st.integers(1, 20), appended=st.integers(0, 60))
def test_every_range_in_order_across_the_wrap_around(capacity: int, appended: int) -> None:
    tree = CircularSegmentTree(capacity, Counting(), "")
    for step in range(appended):
        tree.append(letter(step))
        for start in range(max(0, step + 1 - capacity), step + 2):
            for stop in range(start, step + 2):
                assert tree.query(start, stop) == "".join(letter(i) for i in range(start, stop))
    assert len(tree) == min(capacity, appended)


@given(
    capacity=st.integers(1, 12),
    script=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.integers(0, 12)), max_size=20),
)
def test_queries_between_bursts_of_appends(capacity: int, script: list[tuple[int, int, int]]) -> None:
    """Only some ranges are ever asked for, so that some remembered nodes go stale and others were never made."""
    tree, everything = CircularSegmentTree(capacity, Counting(), ""), []
    for burst, back, length in script:
        for _ in range(burst):
            tree.append(letter(len(everything)))
            everything.append(letter(len(everything)))
        start = max(tree.oldest, len(everything) - back)
        stop = min(start + length, len(everything))
        assert tree.query(start, stop) == "".join(everything[start:stop])


@given(
    capacity=st.integers(1, 12),
    appended=st.integers(1, 30),
    prices=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    data=st.data(),
)
def test_a_cover_by_cost_has_the_same_product_and_the_least_price(
    capacity: int, appended: int, prices: list[int], data: st.DataObject
) -> None:
    tree = CircularSegmentTree(capacity, Counting(), "")
    for step in range(appended):
        tree.append(letter(step))
    start = data.draw(st.integers(tree.oldest, appended))
    stop = data.draw(st.integers(start, appended))

    def cost(value: str) -> float:
        return prices[value.count("<")]

    by_cost, plain = tree.cover(start, stop, cost), tree.cover(start, stop)
    assert "".join(by_cost) == "".join(plain) == tree.query(start, stop)
    leaves = [letter(i) for i in range(start, stop)]
    assert sum(map(cost, by_cost)) <= min(sum(map(cost, plain)), sum(map(cost, leaves)))


@pytest.mark.parametrize(
    ("prices", "spans"),
    [
        ({1: 3, 2: 5, 4: 9, 8: 17}, [8]),
        ({1: 1, 2: 2, 4: 4, 8: 8}, [8]),  # at the same price the fewest
        ({1: 1, 2: 9, 4: 3, 8: 9}, [4, 4]),
        ({1: 1, 2: 9, 4: 9, 8: 9}, [1] * 8),
        ({1: 9, 2: 1, 4: 9, 8: 5}, [2] * 4),
        ({1: 2, 2: 3, 4: 9, 8: 12}, [8]),
        ({1: 2, 2: 3, 4: 9, 8: 13}, [2] * 4),
    ],
)
def test_a_cover_by_cost_splits_where_that_is_cheaper_and_nowhere_else(
    prices: dict[int, int], spans: list[int]
) -> None:
    tree = CircularSegmentTree(8, Counting(), "")
    for step in range(8):
        tree.append(letter(step))
    cover = tree.cover(0, 8, lambda value: prices[value.count("<")])
    assert [value.count("<") for value in cover] == spans
    assert "".join(cover) == tree.query(0, 8)


def test_a_cover_by_cost_is_split_on_both_sides_of_the_wrap_around() -> None:
    tree = CircularSegmentTree(8, Counting(), "")
    for step in range(12):
        tree.append(letter(step))
    assert len(tree.cover(4, 12)) == 2
    assert tree.cover(4, 12, lambda value: value.count("<") ** 2) == [letter(step) for step in range(4, 12)]


def test_the_steps_that_are_asked_for_and_those_that_are_held_are_named() -> None:
    tree = CircularSegmentTree(3, Counting(), "", start=10)
    for step in range(5):
        tree.append(letter(step))
    with pytest.raises(WindowError, match=r"^steps 11 … 13 were asked for, but 12 … 14 are held$"):
        tree.query(11, 14)
    with pytest.raises(WindowError, match=r"^steps 13 … 15 were asked for, but 12 … 14 are held$"):
        tree.query(13, 16)
    with pytest.raises(WindowError, match=r"^the range 14 … 13 is reversed$"):
        tree.query(14, 13)


@pytest.mark.parametrize("capacity", [1, 2, 5, 8])
def test_what_is_kept_is_asked_for_with_its_place_and_its_span(capacity: int) -> None:
    """A place is a node of its own, and what is put there spans as many steps each time."""
    asked: list[tuple[int, int, str]] = []

    def keep(node: int, span: int, value: str) -> str:
        asked.append((node, span, value))
        return value.upper()

    tree = CircularSegmentTree(capacity, lambda a, b: a + b, "", keep=keep)
    for step in range(3 * capacity):
        tree.append("abcdefghijklmnopqrstuvwxyz"[step])
        tree.query(tree.oldest, tree.stop)
    assert all(span == len(value) for _, span, value in asked)
    spans: dict[int, set[int]] = {}
    for node, span, _ in asked:
        spans.setdefault(node, set()).add(span)
    assert sorted(spans) == list(range(2 * capacity - 1))
    assert spans[0] == {capacity}
    assert all(len(own) == 1 for own in spans.values())
    assert tree.query(tree.oldest, tree.stop).isupper()  # what is kept is what is used


@given(st.integers(1, 300))
def test_a_query_takes_logarithmically_many_combines(capacity: int) -> None:
    combine = Counting()
    tree = CircularSegmentTree(capacity, combine, "")
    for step in range(2 * capacity + 1):
        tree.append(letter(step))
    assert combine.combines == 0, "appending must not combine"
    bound = 2 * math.log2(capacity) + 2 if capacity > 1 else 1
    for start in range(tree.oldest, tree.stop):
        tree.query(start, tree.stop)
    for start in range(tree.oldest, tree.stop):  # by now every inner node is remembered
        before = combine.combines
        tree.query(start, tree.stop)
        assert combine.combines - before <= bound


def test_a_linear_scan_breaks_the_bound() -> None:
    """The control: composing leaf by leaf needs more combines than the bound allows."""
    combine, value = Counting(), ""
    for step in range(300):
        value = combine(value, letter(step))
    assert combine.combines > 2 * math.log2(300) + 2


def test_inner_nodes_are_computed_once_and_amortised() -> None:
    """A long run that asks for the whole window now and then costs less than one combine an append, and joins."""
    combine = Counting()
    tree = CircularSegmentTree(64, combine, "")
    for step in range(6400):
        tree.append(letter(step))
        if step % 64 == 63:
            tree.query(tree.oldest, tree.stop)
    assert combine.combines <= 6400


@given(elements(), st.integers(1, 4), st.data())
def test_row_sparse_matrices_equal_ordered_products(
    items: list[Transition], capacity: int, data: st.DataObject
) -> None:
    """With the memory of fixed size that the learner's history uses, over every range, again and again."""
    first = items[0]
    state = first.jacobian.new_zeros(first.jacobian.shape[0], first.n, first.width)
    small = data.draw(st.integers(0, first.n))  # too small a reservation must grow, not cut
    history = History(capacity, small, small, state)
    for step, item in enumerate(items * 2):
        history.append(item)
        now = step + 1
        for start in range(max(0, now - capacity), now):
            expected = oracles.ordered_product([written_out(items[i % len(items)]) for i in range(start, now)])
            product = history.cover(start, now)
            phi = written_out(product[0])[0]
            for part in product[1:]:
                phi = written_out(part)[0] @ phi
            assert_same((phi, history.owed([start], start)[start]), expected)


@given(elements(), st.data())
def test_what_is_owed_after_a_payment(items: list[Transition], data: st.DataObject) -> None:
    """``v`` from the payment on, pulled back through the blocks before it: with what was paid, it makes the whole."""
    first = items[0]
    history = History(
        len(items), first.n, first.n, first.jacobian.new_zeros(first.jacobian.shape[0], first.n, first.width)
    )
    cut = data.draw(st.integers(0, len(items)))
    paid = None
    for step, item in enumerate(items):
        if step == cut:
            paid = history.owed([0], 0)[0]
        history.append(item)
    whole = history.owed([0], 0)[0]
    rest = history.owed([0], cut)[0]
    early = whole if paid is None else paid + rest
    assert_same((whole.unsqueeze(1) * 0 + 1, early), (whole.unsqueeze(1) * 0 + 1, whole))
    assert (paid is None) == (cut == len(items))


def spans(
    capacity: int, appended: int, keep: Callable[[int, int, str], str] | None = None
) -> tuple[CircularSegmentTree[str], Counting]:
    """A tree of letters; the outline of a product is the range of its steps."""
    combine = Counting()
    tree: CircularSegmentTree[str] = CircularSegmentTree(
        capacity,
        combine,
        "",
        keep=keep,
        outline=lambda value: (int(value[1:-1]), int(value[1:-1]) + 1),
        merge=lambda earlier, later: (earlier[0], later[1]),
    )
    for step in range(appended):
        tree.append(letter(step))
    return tree, combine


@given(
    capacity=st.integers(1, 12),
    appended=st.integers(1, 30),
    prices=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    efforts=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    loads=st.lists(st.integers(1, 5), min_size=12, max_size=12),
    shared=st.booleans(),
    data=st.data(),
)
def test_plans_lead_every_start_through_every_step_once(
    capacity: int,
    appended: int,
    prices: list[int],
    efforts: list[int],
    loads: list[int],
    shared: bool,
    data: st.DataObject,
) -> None:
    """Whatever the costs, again and again on one tree, and without a product before it is made."""
    tree, combine = spans(capacity, appended)
    for _ in range(3):
        begins = data.draw(st.sets(st.integers(tree.oldest, appended), max_size=5))
        starts = dict(zip(sorted(begins), loads, strict=False))
        stop = data.draw(st.integers(max(starts, default=appended), appended))
        before = combine.combines
        plan = tree.plan(
            starts,
            stop,
            lambda outline: prices[outline[1] - outline[0]],
            lambda outline: efforts[outline[1] - outline[0]],
            shared=shared,
        )
        assert combine.combines == before, "planned without a product"
        led = {start: (start, "") for start in starts}
        for leg, product in zip(plan.legs, tree.products(plan), strict=True):
            mine = [start for start in starts if leg.since <= start <= leg.start]
            for start in mine:
                assert led[start][0] == leg.start
                led[start] = (leg.stop, led[start][1] + product)
        wanted = {start: (stop, "".join(letter(i) for i in range(start, stop))) for start in starts}
        assert led == wanted
        assert tree.query(tree.oldest, appended) == "".join(letter(i) for i in range(tree.oldest, appended))


@given(
    capacity=st.integers(1, 12),
    appended=st.integers(1, 30),
    prices=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    effort=st.integers(0, 9),
    data=st.data(),
)
def test_the_cost_of_a_plan_is_that_of_its_combines_and_its_uses(
    capacity: int, appended: int, prices: list[int], effort: int, data: st.DataObject
) -> None:
    tree, combine = spans(capacity, appended)
    begins = data.draw(st.sets(st.integers(tree.oldest, appended), max_size=5))
    starts = {start: 1 + start % 4 for start in begins}
    cost = lambda outline: prices[outline[1] - outline[0]]
    plan = tree.plan(starts, appended, cost, lambda outline: effort)
    tree.products(plan)
    used = sum(cost(leg.outline) * sum(starts[s] for s in starts if leg.since <= s <= leg.start) for leg in plan.legs)
    assert plan.cost == used + effort * combine.combines
    leaves = sum(load * prices[1] * (appended - start) for start, load in starts.items())
    assert plan.cost <= leaves
    cover = tree.cover(tree.oldest, appended, cost, lambda outline: effort)
    assert "".join(cover) == tree.query(tree.oldest, appended)


def test_a_product_is_bought_when_going_without_has_cost_as_much() -> None:
    """One at a time: two leaves cost 2, their product 1, composing 3. The third would have saved a third 1."""
    tree, combine = spans(2, 2)
    found = []
    for _ in range(5):
        plan = tree.plan({0: 1}, 2, lambda outline: 1, lambda outline: 3)
        tree.products(plan)
        found.append((plan.cost, plan.advance, combine.combines))
    assert found == [(2, 0, 0), (2, 0, 0), (4, 2, 1), (1, 0, 1), (1, 0, 1)]


def test_credit_is_gone_with_the_leaves() -> None:
    tree, _ = spans(2, 2)
    for _ in range(2):
        tree.plan({0: 1}, 2, lambda outline: 1, lambda outline: 3)
    tree.append(letter(2))
    tree.append(letter(3))
    assert tree.plan({2: 1}, 4, lambda outline: 1, lambda outline: 3).advance == 0
    assert tree.plan({2: 1}, 4, lambda outline: 1, lambda outline: 1).cost == 2


def test_what_starts_inside_a_node_joins_where_that_is_cheaper() -> None:
    """Eight leaves, a product as dear as a leaf, composing dear: one goes leaf by leaf, and takes the others along."""
    tree, combine = spans(8, 8)
    plan = tree.plan({0: 1, 3: 1, 7: 1}, 8, lambda outline: 1, lambda outline: 100)
    assert [(leg.since, leg.start, leg.stop) for leg in plan.legs] == [(0, i, i + 1) for i in range(8)]
    assert tree.plan({0: 1, 3: 1, 7: 1}, 8, lambda outline: 1, lambda outline: 100, shared=True).cost == 8
    assert combine.combines == 0
    tree.query(0, 8)  # with all nodes composed, the first goes alone
    legs = tree.plan({0: 9, 7: 1}, 8, lambda outline: 1, lambda outline: 100).legs
    assert [(leg.since, leg.start, leg.stop) for leg in legs] == [(0, 0, 8), (1, 7, 8)]


class TreeMachine(RuleBasedStateMachine):
    """The tree beside a plain list that keeps everything."""

    @initialize(capacity=st.integers(1, 9), start=st.integers(0, 20))
    def begin(self, capacity: int, start: int) -> None:
        self.tree: CircularSegmentTree[str] = CircularSegmentTree(capacity, Counting(), "", start=start)
        self.items: list[str] = []
        self.start = start

    @rule(times=st.integers(1, 12))
    def append(self, times: int) -> None:
        for _ in range(times):
            self.tree.append(letter(self.start + len(self.items)))
            self.items.append(letter(self.start + len(self.items)))

    @rule(a=st.integers(0, 12), b=st.integers(0, 12))
    def query(self, a: int, b: int) -> None:
        oldest, stop = self.tree.oldest, self.tree.stop
        start = min(oldest + a, stop)
        end = min(start + b, stop)
        assert self.tree.query(start, end) == "".join(self.items[start - self.start : end - self.start])

    @rule(back=st.integers(1, 5))
    def ask_for_what_has_left(self, back: int) -> None:
        if self.tree.oldest - back >= 0 and len(self.tree):
            with pytest.raises(WindowError):
                self.tree.query(self.tree.oldest - back, self.tree.stop)

    @invariant()
    def holds_the_last_ones(self) -> None:
        if hasattr(self, "tree"):
            assert [value for _, value in self.tree.leaves()] == self.items[-self.tree.capacity :][: len(self.items)]
            assert self.tree.stop == self.start + len(self.items)


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(stateful_step_count=30)


def test_an_empty_range_is_the_identity_not_the_window() -> None:
    tree = CircularSegmentTree(3, Counting(), "")
    for step in range(5):
        tree.append(letter(step))
    assert all(tree.query(i, i) == "" for i in range(8))


@pytest.mark.parametrize(("start", "stop"), [(1, 3), (4, 6), (-1, 3), (0, 5)])
def test_ranges_that_are_not_held(start: int, stop: int) -> None:
    tree = CircularSegmentTree(3, Counting(), "")
    for step in range(5):
        tree.append(letter(step))
    with pytest.raises(WindowError, match="2 … 4 are held"):
        tree.query(start, stop)


def test_reversed_ranges_and_bad_capacities() -> None:
    tree = CircularSegmentTree(3, Counting(), "")
    with pytest.raises(WindowError, match="reversed"):
        tree.query(2, 1)
    for capacity in (0, -1, 1.5, True, "3"):
        with pytest.raises(ConfigError, match="positive integer"):
            CircularSegmentTree(capacity, Counting(), "")  # type: ignore[arg-type]
