"""Cells with independent rows, and with groups of rows above one another: exact as every cell is, whether the structure
is found, breaks in mid-stream, or is not looked for."""

import copy
from typing import Any

import pytest
import torch
from helpers import structured_cells as cells
from helpers.running import run, trainable
from helpers.strategies import Case, normal
from helpers.structured_cases import LAYERS, OPENING, D, both_ways, breaking, events, found, layered
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from helpers.unlasting_cells import Coupled, Feedback, Opening
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import rtrl


def check(case: Case, *, resets: Tensor | None = None, offsets: Any = None, **others: Any) -> None:
    """Gradients against both oracles, influences against full RTRL, with structure and without."""
    stream = (case.cell, case.xs, case.loss)
    changed = {"resets": resets, "offsets": offsets}
    expected, influences = oracles.dense_rtrl(*stream, **changed, return_influence=True)
    assert_gradients_equal(expected, oracles.bptt(*stream, **changed), may_be_zero=True)
    for result in found(case, **changed, **others):
        assert_gradients_equal(result.gradients, expected, may_be_zero=True)
        assert_influences_equal(result.influences, influences[-1], may_be_zero=True)


@given(layered(), st.data())
def test_structured_cells_equal_bptt_and_full_rtrl(case: Case, data: st.DataObject) -> None:
    names = list(trainable(case.cell))
    frozen = data.draw(st.sets(st.sampled_from(names), max_size=len(names) - 1)) if data.draw(st.booleans()) else set()
    for name in frozen:
        case.cell.get_parameter(name).requires_grad_(False)
    check(case, **data.draw(events(case)))


@given(breaking(), st.data())
def test_structure_that_breaks_in_mid_stream(case: Case, data: st.DataObject) -> None:
    check(case, **data.draw(events(case)))


def case(
    cell: nn.Module, *, steps: int = 8, batch: int = 2, seed: int = 1, xs: Tensor | None = None, **given: Any
) -> Case:
    """The cell with drawn parameters on a drawn stream, a loss at two steps of three."""
    weights = [None if t % 3 == 1 else normal(seed + t, 64) for t in range(steps)]
    xs = normal(seed, steps, batch, D) if xs is None else xs
    return Case(seeded(cell, seed), xs, weights, {"block": 3, **given}, type(cell).__name__)


STACKS: dict[str, list[str]] = {
    "two layers": ["minGRU", "eLSTM"],
    "three layers": ["complex pairs", "columns", "peephole"],
    "a dense layer above": ["minGRU", "dense"],
    "a dense layer below": ["dense", "einsum"],
}


def stack(kinds: list[str], n: int, **extras: Any) -> cells.Layers:
    layers: list[cells.Layer] = []
    for kind in kinds:
        make = cells.Dense if kind == "dense" else LAYERS[kind]
        layers.append(make(layers[-1].d_out if layers else D, n))
    return cells.Layers(layers, D, **extras)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_is_exact(kind: str) -> None:
    check(case(LAYERS[kind](D, 3)))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("kinds", STACKS.values(), ids=STACKS)
def test_layers_are_exact_with_what_crosses_between_them(kinds: list[str], block: int) -> None:
    check(case(stack(kinds, 2, between=block == 1, readout=True), block=block))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_dormant_slices_of_rows_are_exact(writes: bool, lazy: bool) -> None:
    """Samples of one batch use different experts and write different rows, and leave them for longer than the
    window."""
    steps = 14
    chosen = [[(t // 5) % 3, t % 2, (t // 4 + 1) % 3, (t // 3) % 3] for t in range(steps)]
    index = torch.tensor(chosen, dtype=torch.float64).reshape(steps, 2, 2)
    xs = torch.cat([normal(3, steps, 2, D), index], dim=-1)
    check(case(cells.Routed(writes), steps=steps, xs=xs, block=2, window=2, lazy=lazy), syncs={4: False, 8: True})


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("what", OPENING)
def test_what_opens_in_mid_stream_is_exact(what: str, batch: int) -> None:
    """From step 4, in the middle of a block, and for the last sample alone."""
    xs = normal(5, 9, batch, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[4:, -1, 0] *= -1
    check(case(Opening(D, 3, what), steps=9, xs=xs))


@pytest.mark.parametrize("syncs", [{2: True, 5: True}, {1: True, 6: False}])
def test_a_coupling_that_begins_at_zero_and_learns_is_exact(syncs: dict[int, bool]) -> None:
    """The change comes at a block's border and inside a block."""
    coupled = case(Coupled(D, 3), steps=9)
    with torch.no_grad():
        coupled.cell.coupling.zero_()
    grown, first = {"coupling": 0.3 * normal(2, 3, 3)}, min(syncs) + 1
    check(coupled, syncs=syncs, offsets=[{}] * first + [grown] * (9 - first))


def test_an_early_feedback_from_the_layer_above_is_exact() -> None:
    xs = normal(5, 9, 2, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[5, 1, 0] *= -1
    check(case(Feedback(D, 2), steps=9, xs=xs))


def advance(learner: Any, drawn: Case, steps: range) -> None:
    for t in steps:
        y = learner.step(drawn.xs[t])
        loss = drawn.loss(t, y)
        if loss is not None:
            learner.backward(loss)


def delivered(learner: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    learner.sync()
    named = trainable(learner.cell)
    return {n: p.grad.clone() for n, p in named.items()}, {n: learner.influence(n) for n in named}


@pytest.mark.parametrize("opens", [False, True])
def test_a_copy_in_mid_stream_goes_on_alike_and_apart(opens: bool) -> None:
    drawn = case(Opening(D, 3) if opens else stack(["minGRU", "peephole"], 2), steps=9)
    drawn.xs[:5, :, 0] = -drawn.xs[:5, :, 0].abs()
    expected, influences = oracles.dense_rtrl(drawn.cell, drawn.xs, drawn.loss, return_influence=True)
    for options in both_ways(drawn.options):
        drawn.cell.zero_grad()
        learner = rtrl.BlockRTRL(drawn.cell, 2, **options)
        advance(learner, drawn, range(4))
        twin = copy.deepcopy(learner)
        for one in (learner, twin):
            advance(one, drawn, range(4, 9))
            gradients, found_influences = delivered(one)
            assert_gradients_equal(gradients, expected)
            assert_influences_equal(found_influences, influences[-1])


def test_parameters_frozen_and_trained_again_in_mid_stream() -> None:
    """What a frozen parameter would have learned meanwhile is not learned: its influence is what it was, moved on."""
    drawn = case(stack(["minGRU", "two widths"], 2), steps=9)
    name, results = "layers.0.both.weight", []
    for options in both_ways(drawn.options):
        drawn.cell.zero_grad()
        learner = rtrl.BlockRTRL(drawn.cell, 2, **options)
        for trained, steps in ((True, range(3)), (False, range(3, 6)), (True, range(6, 9))):
            learner.sync()
            drawn.cell.get_parameter(name).requires_grad_(trained)
            advance(learner, drawn, steps)
        results.append(delivered(learner))
    for gradients, influences in results[1:]:
        assert_gradients_equal(gradients, results[0][0])
        assert_influences_equal(influences, results[0][1])


@pytest.mark.parametrize("kinds", [["columns"], ["minGRU", "complex planes"]], ids=["columns", "layers"])
def test_an_audit_of_every_block_agrees(kinds: list[str]) -> None:
    drawn = case(stack(kinds, 2, readout=True))
    expected = oracles.bptt(drawn.cell, drawn.xs, drawn.loss)
    for options in both_ways(drawn.options):
        assert_gradients_equal(run(drawn.cell, drawn.xs, drawn.loss, audit=1, **options).gradients, expected)
