"""Plans on the free monoid, with any costs: every column goes through every step once, for the cost planned."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_segment_tree import Counting, letter

from rtrl import CircularSegmentTree
from rtrl._influence.catch_up_plan import CatchUpPlan, CatchUpPlanner

Cost = Callable[[int], int]


class Planned:
    """A tree of letters and its planner; costs are functions of how many steps a product spans."""

    def __init__(self, capacity: int, appended: int, apply: Cost, compose: Cost = lambda span: 0) -> None:
        @dataclass(frozen=True)
        class Span:
            start: int
            stop: int

            @property
            def apply_macs(self) -> int:
                return apply(self.stop - self.start)

            @property
            def compose_macs(self) -> int:
                return compose(self.stop - self.start)

        self.combine = Counting()
        self.tree: CircularSegmentTree[str] = CircularSegmentTree(capacity, self.combine, "")
        self.planner = CatchUpPlanner(
            self.tree,
            lambda value: Span(int(value[1:-1]), int(value[1:-1]) + 1),
            lambda first, second: Span(first.start, second.stop),
        )
        for step in range(appended):
            self.tree.append(letter(step))

    def products(self, start: int, stop: int) -> list[str]:
        """Those of the plan for one column."""
        return self.planner.products(self.planner.plan({start: 1}, stop))


def spans(plan: CatchUpPlan) -> list[tuple[int, int, int]]:
    return [(hop.first_start, hop.start, hop.stop) for hop in plan.hops]


@given(
    capacity=st.integers(1, 12),
    appended=st.integers(1, 30),
    costs=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    data=st.data(),
)
def test_products_by_cost_make_the_same_product_at_the_least_cost(
    capacity: int, appended: int, costs: list[int], data: st.DataObject
) -> None:
    planned = Planned(capacity, appended, costs.__getitem__)
    tree = planned.tree
    start = data.draw(st.integers(tree.oldest, appended))
    stop = data.draw(st.integers(start, appended))

    def total(values: list[str]) -> int:
        return sum(costs[value.count("<")] for value in values)

    by_cost, plain = planned.products(start, stop), [tree.value(node) for node in tree.nodes(start, stop)]
    assert "".join(by_cost) == "".join(plain) == tree.query(start, stop)
    assert total(by_cost) <= min(total(plain), total([letter(i) for i in range(start, stop)]))


@pytest.mark.parametrize(
    ("costs", "found"),
    [
        ({1: 3, 2: 5, 4: 9, 8: 17}, [8]),
        ({1: 1, 2: 2, 4: 4, 8: 8}, [8]),  # at the same cost the fewest
        ({1: 1, 2: 9, 4: 3, 8: 9}, [4, 4]),
        ({1: 1, 2: 9, 4: 9, 8: 9}, [1] * 8),
        ({1: 9, 2: 1, 4: 9, 8: 5}, [2] * 4),
        ({1: 2, 2: 3, 4: 9, 8: 12}, [8]),
        ({1: 2, 2: 3, 4: 9, 8: 13}, [2] * 4),
    ],
)
def test_nodes_are_split_where_that_is_cheaper_and_nowhere_else(costs: dict[int, int], found: list[int]) -> None:
    planned = Planned(8, 8, lambda span: costs.get(span, 99))
    products = planned.products(0, 8)
    assert [value.count("<") for value in products] == found
    assert "".join(products) == planned.tree.query(0, 8)


def test_nodes_are_split_on_both_sides_of_the_wrap_around() -> None:
    linear, square = Planned(8, 12, lambda span: span, lambda span: 1), Planned(8, 12, lambda span: span**2)
    linear.tree.query(4, 12)
    assert [value.count("<") for value in linear.products(4, 12)] == [4, 4]
    assert square.products(4, 12) == [letter(step) for step in range(4, 12)]


@given(
    capacity=st.integers(1, 12),
    appended=st.integers(1, 30),
    apply=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    compose=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    counts=st.lists(st.integers(1, 5), min_size=12, max_size=12),
    shared=st.booleans(),
    data=st.data(),
)
def test_plans_take_every_start_through_every_step_once(
    capacity: int,
    appended: int,
    apply: list[int],
    compose: list[int],
    counts: list[int],
    shared: bool,
    data: st.DataObject,
) -> None:
    """Whatever the costs, again and again on one tree, and without a product before it is computed."""
    planned = Planned(capacity, appended, apply.__getitem__, compose.__getitem__)
    tree = planned.tree
    for _ in range(3):
        starts = data.draw(st.sets(st.integers(tree.oldest, appended), max_size=5))
        columns = dict(zip(sorted(starts), counts, strict=False))
        stop = data.draw(st.integers(max(columns, default=appended), appended))
        before = planned.combine.combines
        plan = planned.planner.plan(columns, stop, shared=shared)
        assert planned.combine.combines == before, "planned without a product"
        reached = {start: (start, "") for start in columns}
        for hop, product in zip(plan.hops, planned.planner.products(plan), strict=True):
            for start in columns:
                if hop.first_start <= start <= hop.start:
                    assert reached[start][0] == hop.start
                    reached[start] = (hop.stop, reached[start][1] + product)
        assert reached == {start: (stop, "".join(letter(i) for i in range(start, stop))) for start in columns}
        assert tree.query(tree.oldest, appended) == "".join(letter(i) for i in range(tree.oldest, appended))


@given(
    capacity=st.integers(1, 12),
    appended=st.integers(1, 30),
    apply=st.lists(st.integers(0, 9), min_size=13, max_size=13),
    compose=st.integers(0, 9),
    data=st.data(),
)
def test_the_cost_of_a_plan_is_that_of_its_combines_and_its_uses(
    capacity: int, appended: int, apply: list[int], compose: int, data: st.DataObject
) -> None:
    planned = Planned(capacity, appended, apply.__getitem__, lambda span: compose)
    oldest = planned.tree.oldest
    starts = data.draw(st.sets(st.integers(oldest, appended), max_size=5))
    columns = {start: 1 + start % 4 for start in starts}
    plan = planned.planner.plan(columns, appended)
    planned.planner.products(plan)
    used = sum(
        hop.pattern.apply_macs * sum(columns[start] for start in columns if hop.first_start <= start <= hop.start)
        for hop in plan.hops
    )
    assert plan.cost == used + compose * planned.combine.combines
    assert plan.cost <= sum(count * apply[1] * (appended - start) for start, count in columns.items())
    assert "".join(planned.products(oldest, appended)) == planned.tree.query(oldest, appended)


def test_a_product_is_composed_when_going_without_has_cost_as_much() -> None:
    """One at a time: two leaves cost 2, their product 1, composing 3. The third would have saved a third 1."""
    planned = Planned(2, 2, lambda span: 1, lambda span: 3)
    found = []
    for _ in range(5):
        plan = planned.planner.plan({0: 1}, 2)
        planned.planner.products(plan)
        found.append((plan.cost, plan.spent_credit, planned.combine.combines))
    assert found == [(2, 0, 0), (2, 0, 0), (4, 2, 1), (1, 0, 1), (1, 0, 1)]


def test_credit_is_gone_with_the_leaves() -> None:
    planned = Planned(2, 2, lambda span: 1, lambda span: 3)
    for _ in range(2):
        planned.planner.plan({0: 1}, 2)
    planned.tree.append(letter(2))
    planned.tree.append(letter(3))
    plan = planned.planner.plan({2: 1}, 4)
    assert (plan.cost, plan.spent_credit) == (2, 0)


@given(st.integers(1, 9), st.integers(0, 25), st.integers(1, 9), st.data())
def test_a_loaded_planner_goes_on_as_the_saved_one(
    capacity: int, appended: int, compose: int, data: st.DataObject
) -> None:
    """With the same elements: the same products are composed, the same credits count."""
    planned, again = (Planned(capacity, appended, lambda span: 1, lambda span: compose) for _ in range(2))

    def plan(which: Planned, start: int) -> tuple[object, ...]:
        made = which.planner.plan({start: 2}, appended)
        return spans(made), made.cost, made.spent_credit, which.planner.products(made)

    starts = st.integers(planned.tree.oldest, appended)
    for start in data.draw(st.lists(starts, max_size=6)):
        plan(planned, start)
    saved = planned.planner.state_dict()
    again.planner.load_state_dict(saved)
    assert again.planner.state_dict() == saved
    for start in data.draw(st.lists(starts, max_size=6)):
        assert plan(planned, start) == plan(again, start)


def test_columns_that_start_inside_a_node_join_there() -> None:
    """Eight leaves, a product as dear as a leaf, composing dear: one goes leaf by leaf, and takes the others along."""
    planned = Planned(8, 8, lambda span: 1, lambda span: 100)
    assert spans(planned.planner.plan({0: 1, 3: 1, 7: 1}, 8)) == [(0, i, i + 1) for i in range(8)]
    assert planned.planner.plan({0: 1, 3: 1, 7: 1}, 8, shared=True).cost == 8
    assert planned.combine.combines == 0
    planned.tree.query(0, 8)  # with all nodes composed, the first goes through the largest up to there
    assert spans(planned.planner.plan({0: 9, 7: 1}, 8)) == [(0, 0, 4), (0, 4, 6), (0, 6, 7), (0, 7, 8)]


def test_each_start_has_a_product_to_the_end_where_that_is_cheaper() -> None:
    """Applying dear, composing cheap: every column is multiplied once, by products made of one another."""
    planned = Planned(8, 8, lambda span: 1, lambda span: 1)
    plan = planned.planner.plan({0: 50, 3: 50, 7: 50}, 8)
    assert spans(plan) == [(7, 7, 8), (3, 3, 8), (0, 0, 8)]
    assert planned.planner.products(plan) == ["<7>", "<3><4><5><6><7>", "<0><1><2><3><4><5><6><7>"]
    assert plan.cost == 150 + planned.combine.combines == 157
