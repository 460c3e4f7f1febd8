"""The circular segment tree on the free monoid, where any error of order, range or memory fails exactly, and on
row-sparse matrices."""

import math

import pytest
import torch
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

    def __call__(self, first: str, second: str) -> str:
        self.combines += 1
        return first + second


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


def test_the_steps_requested_and_those_held_are_named() -> None:
    tree = CircularSegmentTree(3, Counting(), "", start=10)
    for step in range(5):
        tree.append(letter(step))
    with pytest.raises(WindowError, match=r"^steps 11 … 13 were requested, but 12 … 14 are held$"):
        tree.query(11, 14)
    with pytest.raises(WindowError, match=r"^steps 13 … 15 were requested, but 12 … 14 are held$"):
        tree.query(13, 16)
    with pytest.raises(WindowError, match=r"^the range 14 … 13 is reversed$"):
        tree.query(14, 13)


@pytest.mark.parametrize("capacity", [1, 2, 5, 8])
def test_values_are_stored_by_the_number_of_their_node(capacity: int) -> None:
    """A number stands for one node, and what is stored for it spans equally many steps each time."""
    stored: list[tuple[int, str]] = []

    def store(number: int, value: str) -> str:
        stored.append((number, value))
        return value.upper()

    tree = CircularSegmentTree(capacity, lambda first, second: first + second, "", store=store)
    for step in range(3 * capacity):
        tree.append("abcdefghijklmnopqrstuvwxyz"[step])
        tree.query(tree.oldest, tree.stop)
    spans: dict[int, set[int]] = {}
    for number, value in stored:
        spans.setdefault(number, set()).add(len(value))
    assert sorted(spans) == list(range(2 * capacity - 1))
    assert spans[0] == {capacity}
    assert all(len(lengths) == 1 for lengths in spans.values())
    assert tree.query(tree.oldest, tree.stop).isupper()  # the stored value is the one used


def test_a_node_is_held_from_when_it_is_computed_until_a_leaf_is_overwritten() -> None:
    tree = CircularSegmentTree(4, Counting(), "")
    for step in range(4):
        tree.append(letter(step))
    (root,) = tree.nodes(0, 4)
    assert [root.start, root.stop, root.is_leaf] == [0, 4, False]
    assert [tree.is_held(node) for node in (root, *root.halves)] == [False] * 3
    assert tree.value(root.halves[0]) == "<0><1>"
    assert [tree.is_held(node) for node in (root, *root.halves)] == [False, True, False]
    assert tree.product(root.halves) == tree.value(root) == "<0><1><2><3>"
    assert tree.product([]) == ""
    tree.append(letter(4))
    (later,) = tree.nodes(2, 4)
    assert tree.is_held(later)
    (early,) = tree.nodes(4, 5)
    assert early.is_leaf and tree.is_held(early)
    tree.append(letter(5))
    assert not tree.is_held(tree.nodes(4, 6)[0])
    assert tree.query(2, 6) == "<2><3><4><5>"


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
            phi = torch.eye(first.n * first.width, dtype=torch.float64)
            for _, part in history.products(history.plan({start: 1})):
                phi = written_out(part)[0] @ phi
            assert_same((phi, history.pending_adjoints([start], start)[start]), expected)


@given(elements(), st.data())
def test_pending_adjoints_after_gradients_were_accumulated(items: list[Transition], data: st.DataObject) -> None:
    """``v`` of the later blocks, pulled back through the earlier ones, and what was accumulated make the whole."""
    first = items[0]
    history = History(
        len(items), first.n, first.n, first.jacobian.new_zeros(first.jacobian.shape[0], first.n, first.width)
    )
    cut = data.draw(st.integers(0, len(items)))
    accumulated = None
    for step, item in enumerate(items):
        if step == cut:
            accumulated = history.pending_adjoints([0], 0)[0]
        history.append(item)
    whole = history.pending_adjoints([0], 0)[0]
    rest = history.pending_adjoints([0], cut)[0]
    total = whole if accumulated is None else accumulated + rest
    assert_same((whole.unsqueeze(1) * 0 + 1, total), (whole.unsqueeze(1) * 0 + 1, whole))
    assert (accumulated is None) == (cut == len(items))


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
            held = [self.tree.query(step, step + 1) for step in range(self.tree.oldest, self.tree.stop)]
            assert held == self.items[-self.tree.capacity :][: len(self.items)]
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


class Uncopied:
    """An element that refuses to be copied."""

    def __deepcopy__(self, memo: object) -> "Uncopied":
        raise TypeError("not I")


def test_a_query_is_a_copy_unless_the_tree_has_a_store() -> None:
    tree = CircularSegmentTree(2, lambda a, b: a + b, [])
    tree.append([[1]])
    tree.query(0, 1)[0].append(2)
    assert tree.query(0, 1) == [[1]]
    held = CircularSegmentTree(2, lambda a, b: a + b, [], store=lambda number, value: value)
    held.append([[1]])
    assert held.query(0, 1) is held.query(0, 1)
    refusing = CircularSegmentTree(1, lambda a, b: a, Uncopied())
    refusing.append(Uncopied())
    with pytest.raises(ConfigError, match=r"Uncopied, cannot be copied \(not I\). Pass store="):
        refusing.query(0, 1)
