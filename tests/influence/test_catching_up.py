"""Slices that reactivate: brought up to date exactly, for the multiply-adds planned, and never for more than they would
cost one by one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.full_matrices import written_out
from helpers.strategies import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from rtrl._influence import catch_up as catching_up
from rtrl._influence.catch_up import catch_up
from rtrl._influence.history import History
from rtrl._influence.segment_tree import Node
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Pattern, Transition, compose, compose_patterns
from rtrl.profiling.macs import MacCounter

BATCH, ROWS, WIDTH, STEPS = 3, 6, 2, 19
CAPACITY = 13  # the ring has wrapped around, in the middle of a subtree
SHAPES = {"weight": torch.Size([4, 5]), "bias": torch.Size([4]), "wide": torch.Size([4, 40])}


def leaf(kind: str, step: int) -> Transition:
    """Of a step: dense, or writing one row and reading two, or reading and writing all but one."""
    if kind == "mixture":
        kind = ("dense", "sparse", "sparse", "wide", "sparse")[step % 5]
    u, c = {"dense": (ROWS, ROWS), "sparse": (1, 2), "wide": (ROWS - 1, ROWS - 1)}[kind]
    jacobian = normal(step, BATCH, u * WIDTH, c * WIDTH) / (c * WIDTH) ** 0.5
    adjoint = normal(step + 100, BATCH, c * WIDTH)
    if kind == "dense":
        return Transition(None, None, jacobian, adjoint, ROWS, WIDTH)
    first = step // 3 + torch.arange(BATCH)[:, None]
    cols = (first + torch.arange(c)) % ROWS
    return Transition(cols[:, :u], cols, jacobian, adjoint, ROWS, WIDTH)


KINDS = ("sparse", "dense", "mixture")
# (sample, slice) → last block: dormant since one step, since several, in one sample only; active; since the oldest step
# held.
DORMANT: dict[str, dict[tuple[int, int], int]] = {
    "one": {(1, 2): 6},
    "one, a step ago": {(1, 2): STEPS - 1},
    "one of each sample, together": {(b, 1): 7 for b in range(BATCH)},
    "two samples together": {(0, 1): 8, (2, 3): 8},
    "all, together": {(b, s): 7 for b in range(BATCH) for s in range(4)},
    "all, in turn": {(b, s): 6 + 3 * s for b in range(BATCH) for s in range(4)},
    "all, each at its own time": {(b, s): 6 + b + 3 * s for b in range(BATCH) for s in range(4)},
    "some active": {(0, 0): STEPS, (0, 1): 9, (1, 1): 9, (1, 2): STEPS},
}


def history(kind: str) -> History:
    held = History(CAPACITY, ROWS, ROWS, torch.zeros(BATCH, ROWS, WIDTH, dtype=torch.float64))
    for step in range(STEPS):
        held.append(leaf(kind, step))
    return held


def dormant(clocks: Mapping[tuple[int, int], int]) -> list[tuple[ParameterInfluence, Tensor]]:
    """Rows of three parameters, with numbers in them; beside them rows that are none of our business."""
    found = []
    for seed, shape in enumerate(SHAPES.values()):
        influence = ParameterInfluence(shape, True, BATCH, ROWS * WIDTH, torch.zeros(0, dtype=torch.float64))
        influence.allocate(torch.arange(BATCH * shape[0]).flip(0), STEPS)
        rows = influence.allocate(torch.tensor([b * shape[0] + s for b, s in clocks]), STEPS)
        influence.last_block[rows] = torch.tensor(list(clocks.values()))
        influence.values = normal(seed, *influence.values.shape)
        found.append((influence, rows))
    return found


def columns(outdated: list[tuple[ParameterInfluence, Tensor]]) -> dict[int, int]:
    """How many, by clock."""
    found: dict[int, int] = {}
    for influence, rows in outdated:
        for clock in influence.last_block[rows].tolist():
            if clock < STEPS:
                found[clock] = found.get(clock, 0) + influence.values.shape[2]
    return found


def assert_up_to_date(kind: str, outdated: list[tuple[ParameterInfluence, Tensor]], before: list[Tensor]) -> None:
    full = [written_out(leaf(kind, step)) for step in range(STEPS)]
    for (influence, rows), old in zip(outdated, before, strict=True):
        expected = old.clone()
        for row in rows.tolist():
            clock = int(influence.last_block[row])
            if clock < STEPS:
                phi, _ = oracles.ordered_product(full[clock:])
                expected[row] = phi[influence.sample[row]] @ old[row]
        for actual, row in zip(influence.values, expected, strict=True):
            assert float((actual - row).abs().max()) <= 1e-12 * float(row.abs().max())


@pytest.mark.parametrize(
    ("who", "chunk"),
    [(who, catching_up.CHUNK_BYTES) for who in DORMANT]
    + [(who, size) for who in ("one", "all, together", "all, in turn") for size in (1, 8 * ROWS * WIDTH * 7)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_and_as_dear_as_planned(kind: str, who: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the chunks; rows that do not reactivate keep every bit."""
    monkeypatch.setattr(catching_up, "CHUNK_BYTES", chunk)
    outdated = dormant(DORMANT[who])
    before = [influence.values.clone() for influence, _ in outdated]
    planned = history(kind).plan(columns(outdated)).cost
    with MacCounter() as counter:
        done = catch_up(history(kind), outdated)
    assert counter.macs == done == planned
    assert planned > 0
    assert_up_to_date(kind, outdated, before)
    for (influence, rows), old in zip(outdated, before, strict=True):
        others = torch.ones(len(old), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(influence.values[others], old[others])


def test_nothing_is_outdated() -> None:
    outdated = dormant({(0, 0): STEPS})
    before = [influence.values.clone() for influence, _ in outdated]
    assert catch_up(history("dense"), outdated) == catch_up(history("dense"), []) == 0
    assert all(torch.equal(influence.values, old) for (influence, _), old in zip(outdated, before, strict=True))


# ---------------------------------------------------------------------- never more than one by one


def replayed(held: History, loads: Mapping[int, int]) -> int:
    """The multiply-adds of applying leaf by leaf."""
    leaves = {step: held.tree.query(step, step + 1).apply_macs for step in range(held.oldest, held.now)}
    return sum(load * sum(leaves[step] for step in range(clock, held.now)) for clock, load in loads.items())


def all_nodes_first(held: History, loads: Mapping[int, int]) -> int:
    """Every node under a range is composed at any cost; then each last block takes those cheapest to apply."""
    tree, pattern, made = held.tree, held.planner.pattern, set[int]()

    def composing(node: Node) -> int:
        if node.is_leaf or tree.is_held(node) or node.number in made:
            return 0
        made.add(node.number)
        return pattern(node).compose_macs + sum(map(composing, node.halves))

    def applying(node: Node) -> int:
        whole: int = pattern(node).apply_macs
        return whole if node.is_leaf else min(whole, sum(map(applying, node.halves)))

    total = 0
    for clock, load in loads.items():
        for node in tree.nodes(clock, held.now):
            total += composing(node) + load * applying(node)
    return total


def loads_of(who: str, factor: int) -> dict[int, int]:
    return {clock: factor * load for clock, load in columns(dormant(DORMANT[who])).items()}


@pytest.mark.parametrize("factor", [1, 30])
@pytest.mark.parametrize("who", DORMANT)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_to_reactivate_costs_no_more_than_by_any_simple_rule(kind: str, who: str, factor: int) -> None:
    loads = loads_of(who, factor)
    plan = history(kind).plan(loads)
    assert plan.spent_credit == 0
    assert plan.cost <= replayed(history(kind), loads)
    # Columns that start later join the others; between sparse leaves far apart, they would be cheaper off on their own.
    assert plan.cost <= (1.1 if kind == "sparse" else 1) * all_nodes_first(history(kind), loads)


def test_composing_free_of_charge_breaks_the_bound_of_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: nodes chosen as if composing cost nothing."""
    loads = {6: 5}
    held = history("dense")
    monkeypatch.setattr(
        held.planner, "compose_patterns", lambda *parts: replace(compose_patterns(*parts), compose_macs=0)
    )
    plan = held.plan(loads)
    with MacCounter() as counter:
        held.products(plan)
    applied = sum(hop.pattern.apply_macs for hop in plan.hops) * sum(loads.values())
    assert counter.macs + applied > 2 * replayed(held, loads)


def test_replay_breaks_the_bound_of_composed_nodes() -> None:
    """The control: with many columns, leaf by leaf is dearer than the tree with all its nodes."""
    loads = loads_of("all, in turn", 30)
    assert replayed(history("dense"), loads) > 2 * all_nodes_first(history("dense"), loads)


@pytest.mark.parametrize("factor", [1, 30])
@pytest.mark.parametrize(
    ("kind", "who"),
    [
        *((kind, "all, in turn") for kind in KINDS),
        ("dense", "all, each at its own time"),
        ("mixture", "all, each at its own time"),  # sparse: see docs/limits.md
    ],
)
def test_reactivating_together_is_cheaper_than_one_after_the_other(kind: str, who: str, factor: int) -> None:
    """Each alone needs products of its own."""
    loads = loads_of(who, factor)
    together = history(kind).plan(loads).cost
    alone = sum(history(kind).plan({clock: load}).cost for clock, load in loads.items())
    assert together <= alone
    if kind == "dense":
        assert together < (0.97 if factor > 1 else 0.7) * alone


# ---------------------------------------------------------------------- again and again


def staggered(columns_each: int, steps: int, change: Callable[[History], None] = lambda held: None) -> tuple[int, ...]:
    """A slice reactivates at every step, dormant for almost the window; dense leaves. Sums of costs: planned; replay;
    all nodes first."""
    zero = torch.zeros(1, 8, 1)
    held, other = (History(32, 8, 8, zero) for _ in range(2))
    change(held)
    total, replay, first = 0, 0, 0
    for step in range(32 + steps):
        item = Transition(None, None, 0.3 * normal(step, 1, 8, 8).float(), torch.zeros(1, 8), 8, 1)
        held.append(item)
        other.append(item)
        if step >= 32:
            loads = {held.oldest + 1: columns_each}
            plan = held.plan(loads)
            held.products(plan)
            total += plan.cost
            replay += replayed(held, loads)
            first += all_nodes_first(other, loads)
            other.tree.query(other.oldest + 1, other.now)
    return total, replay, first


@pytest.mark.parametrize("columns_each", [1, 4, 8, 64])
def test_many_small_reactivations_share_what_is_composed(columns_each: int) -> None:
    """None alone is worth a product; together they are, and cost little more than if one had known."""
    total, replay, first = staggered(columns_each, 100)
    assert total <= replay
    assert total <= 1.5 * first
    if columns_each > 1:
        assert total < 0.5 * replay


def test_without_credit_small_reactivations_replay_for_ever() -> None:
    """The control: a plan that knows no earlier ones."""

    def forget(held: History) -> None:
        held.planner.credit = lambda node: 0  # type: ignore[method-assign]

    total, replay, first = staggered(4, 100, forget)
    assert total > 0.5 * replay
    assert total > 1.5 * first


def test_pending_adjoints_take_one_backward_pass_for_all_last_blocks() -> None:
    held = history("dense")
    clocks = range(held.oldest, STEPS)
    with MacCounter() as counter:
        pending = held.pending_adjoints(clocks, 10)
    # one product per step; the earlier ones are pulled back through the accumulated blocks
    assert counter.macs <= BATCH * (ROWS * WIDTH) ** 2 * CAPACITY
    full = [written_out(leaf("dense", step)) for step in range(STEPS)]
    for clock in clocks:
        phi = oracles.ordered_product(full[clock : max(clock, 10)], size=ROWS * WIDTH, dtype=torch.float64)[0]
        _, v = oracles.ordered_product(full[max(clock, 10) :], size=ROWS * WIDTH, dtype=torch.float64)
        expected = (v.unsqueeze(-2) @ phi).squeeze(-2)
        assert float((pending[clock] - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


# ---------------------------------------------------------------------- composing


@pytest.mark.parametrize("kind", KINDS)
def test_composing_costs_what_its_pattern_says(kind: str) -> None:
    product = leaf(kind, 0)
    for step in range(1, STEPS):
        for one, two in ((product, leaf(kind, step)), (leaf(kind, step), product)):
            pattern = compose_patterns(one.pattern, two.pattern)
            with MacCounter() as counter:
                both = compose(one, two)
            assert counter.macs == pattern.compose_macs
            assert pattern.apply_macs == both.apply_macs
            assert pattern.compose_macs <= BATCH * (two.apply_macs * both.jacobian.shape[2] + one.apply_macs)
        product = compose(product, leaf(kind, step))


def test_samples_that_meet_in_fewer_rows_than_others_compose_exactly() -> None:
    """Sample 0 reads the row that was written, sample 1 does not, sample 2 reads it among others."""

    def at(seed: int, rows: list[list[int]], cols: list[list[int]]) -> Transition:
        u, c = len(rows[0]) * WIDTH, len(cols[0]) * WIDTH
        jacobian, adjoint = normal(seed, BATCH, u, c), normal(seed + 1, BATCH, c)
        return Transition(torch.tensor(rows), torch.tensor(cols), jacobian, adjoint, ROWS, WIDTH)

    one = at(1, [[0], [0], [0]], [[0, 1]] * 3)
    two = at(3, [[2], [2], [0]], [[0, 2, 3], [1, 2, 3], [0, 1, 5]])
    expected = oracles.ordered_product([written_out(one), written_out(two)])
    for actual, full in zip(written_out(compose(one, two)), expected, strict=True):
        assert float((actual - full).abs().max()) <= 1e-12 * float(full.abs().max())


def test_apart_transitions_compose_without_a_product() -> None:
    """Neither reads what the other writes: what is left to count is the adjoint."""

    def at(row: int) -> Transition:
        index = torch.full((BATCH, 1), row)
        return Transition(index, index, normal(row, BATCH, WIDTH, WIDTH), normal(9, BATCH, WIDTH), ROWS, WIDTH)

    pattern = compose_patterns(at(0).pattern, at(3).pattern)
    assert pattern.compose_macs == BATCH * WIDTH**2
    assert (pattern.u, pattern.c) == (2, 2)


def test_sparse_products_take_memory_for_their_own_rows_alone() -> None:
    """Two rows of a thousand: no matrix over the whole state is ever written."""
    n, sizes = 1000, []

    class Sizes(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:  # and its import, which takes seconds
            return False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() for t in [out] if isinstance(t, Tensor))
            return out

    def at(*index: int) -> Transition:
        rows = torch.tensor([index])
        k = len(index)
        return Transition(rows, rows, normal(1, 1, k, k), normal(2, 1, k), n, 1)

    with Sizes():
        compose(at(1, 7), at(7, 900))
    assert max(sizes) <= 8 * n


# ---------------------------------------------------------------------- the tree alone


def test_a_saved_history_plans_as_the_one_it_was_taken_of() -> None:
    """What is composed and what was nearly composed is known again, or a resumed run would round differently."""
    held = history("dense")
    for load in (40, 3, 3):
        held.products(held.plan({8: load}))
    again = History.from_state_dict(held.state_dict(), torch.zeros(BATCH, ROWS, WIDTH, dtype=torch.float64))
    assert again.planner.state_dict() == held.planner.state_dict()
    fresh = history("dense").plan({9: 3})
    plans = [(plan.cost, plan.hops) for plan in (held.plan({9: 3}), again.plan({9: 3}))]
    spans = [[(hop.first_start, hop.start, hop.stop) for hop in hops] for _, hops in plans]
    assert spans[0] == spans[1]
    assert plans[0][0] == plans[1][0] < fresh.cost


def test_a_saved_history_knows_the_product_of_its_oldest_blocks() -> None:
    held = History(4, ROWS, ROWS, torch.zeros(BATCH, ROWS, WIDTH, dtype=torch.float64))
    for step in range(4):
        held.append(leaf("dense", step))
    for load in (2, 2, 400):
        held.products(held.plan({0: load}))
        again = History.from_state_dict(held.state_dict(), torch.zeros(BATCH, ROWS, WIDTH, dtype=torch.float64))
        assert again.planner.state_dict() == held.planner.state_dict()
        (whole,) = held.tree.nodes(0, 4)
        for node in (whole, *whole.halves):
            assert again.tree.is_held(node) == held.tree.is_held(node)
    assert held.tree.is_held(whole)


def test_patterns_are_planned_without_a_product() -> None:
    held = history("sparse")

    def refuse(first: Transition, second: Transition) -> Transition:
        raise AssertionError("a product before the plan was made")

    held.tree.combine = refuse
    assert all(isinstance(hop.pattern, Pattern) for hop in held.plan({7: 9}).hops)
