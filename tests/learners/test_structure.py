"""Cells with independent rows, and with groups of rows above one another: exact as every cell is, whether the structure
is found, breaks in mid-stream, or is not looked for."""

import pytest
import torch
from helpers.ordered_cells import ORDERED
from helpers.plain_autograd import assert_exact
from helpers.running import trainable
from helpers.strategies import Case, normal
from helpers.structured_cases import (
    LAYERS,
    OPENING,
    STACKS,
    D,
    breaking,
    check,
    drawn,
    events,
    layered,
    placed,
    routes,
    stack,
)
from helpers.structured_cells import Routed
from helpers.toy_cells import seeded
from helpers.unlasting_cells import Coupled, Feedback, RoutedOpening, TwoKinds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rtrl


@given(layered(), st.data())
def test_structured_cells_equal_bptt_and_full_rtrl(case: Case, data: st.DataObject) -> None:
    names = list(trainable(case.cell))
    frozen = data.draw(st.sets(st.sampled_from(names), max_size=len(names) - 1)) if data.draw(st.booleans()) else set()
    for name in frozen:
        case.cell.get_parameter(name).requires_grad_(False)
    check(case, off=True, **data.draw(events(case)))


@given(breaking(), st.data())
def test_structure_that_breaks_in_mid_stream(case: Case, data: st.DataObject) -> None:
    check(case, **data.draw(events(case)))


@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_is_exact(kind: str) -> None:
    check(drawn(LAYERS[kind](D, 3)))


@pytest.mark.parametrize("kinds", STACKS.values(), ids=STACKS)
def test_layers_are_exact_with_what_crosses_between_them(kinds: list[str]) -> None:
    check(drawn(stack(kinds, 2, between=len(kinds) == 2, readout=True), steps=6))


@pytest.mark.parametrize("kind", ORDERED)
def test_groups_in_any_order_and_weights_that_reach_rows_in_any_way_are_exact(kind: str) -> None:
    check(drawn(ORDERED[kind](D, 3)))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("kind", ["all rows", "writes", "opening"])
def test_dormant_slices_of_rows_are_exact(kind: str, lazy: bool) -> None:
    """Samples of one batch use different experts and write different rows, and leave them for longer than the window;
    what opens does so while slices are dormant."""
    cell = RoutedOpening() if kind == "opening" else Routed(kind == "writes")
    xs = routes(14)
    xs[..., 0] = -xs[..., 0].abs()
    xs[7, 1, 0] *= -1
    check(drawn(cell, steps=14, xs=xs, block=2, window=2, lazy=lazy), syncs={4: False, 8: True})


@pytest.mark.parametrize("place", ["alone", "below", "above"])
@pytest.mark.parametrize("what", OPENING)
def test_what_opens_in_mid_stream_is_exact(what: str, place: str) -> None:
    """From step 4, in the middle of a block, for the last sample alone; above, at a block's border."""
    xs = normal(5, 6, 2, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[4:, -1, 0] *= -1
    check(drawn(placed(what, place, 2), steps=6, xs=xs, block=1 if place == "above" else 3))


@pytest.mark.parametrize("syncs", [{2: True, 5: True}, {1: True, 6: False}])
def test_a_coupling_that_begins_at_zero_and_learns_is_exact(syncs: dict[int, bool]) -> None:
    """The change comes at a block's border and inside a block."""
    coupled = drawn(Coupled(D, 3), steps=9)
    with torch.no_grad():
        coupled.cell.coupling.zero_()
    grown, first = {"coupling": 0.3 * normal(2, 3, 3)}, min(syncs) + 1
    check(coupled, syncs=syncs, offsets=[{}] * first + [grown] * (9 - first))


def test_an_early_feedback_from_the_layer_above_is_exact() -> None:
    xs = normal(5, 9, 2, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[5, 1, 0] *= -1
    check(drawn(Feedback(D, 2), steps=9, xs=xs))


@pytest.mark.parametrize("block", [1, 3])
def test_a_parameter_that_begins_to_be_used_is_exact(block: int) -> None:
    """By another kind of steps, alone in a block and among those of the first kind."""
    xs = [torch.tensor([t % 4, (t + 1) % 4]) if t in (3, 4, 5, 7) else normal(t, 2, D) for t in range(9)]
    assert_exact(seeded(TwoKinds(D, 3), 1), xs, 2, block=block)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
def test_a_coupling_counts_however_small_it_is(size: float) -> None:
    """The loss makes up for it: it sees the coupled row alone, and in units of the coupling."""
    coupled = drawn(Coupled(D, 3))
    with torch.no_grad():
        coupled.cell.own[0], coupled.cell.enter.weight[0], coupled.cell.enter.bias[0] = 0.5, 0.0, 0.0
        coupled.cell.coupling.zero_()
        coupled.cell.coupling[0, 1] = size

    def loss(t: int, y: Tensor) -> Tensor | None:
        return (y[:, 0] / size).square().sum() if t % 3 else None

    coupled.loss = loss  # type: ignore[method-assign]
    check(coupled)


def moved(case: Case, rate: float = 0.05) -> list[dict[str, Tensor]]:
    """Parameters that change after every step."""
    wave = {
        name: torch.sin(1 + torch.arange(p.numel()).to(p)).reshape(p.shape) for name, p in trainable(case.cell).items()
    }
    return [{name: rate * t * value for name, value in wave.items()} for t in range(len(case.xs))]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("kind", ["minGRU", "peephole", "trace unit", "columns", "two layers"])
def test_an_update_after_every_step_is_exact(kind: str, block: int) -> None:
    cell = stack(STACKS[kind], 2, readout=True) if kind in STACKS else LAYERS[kind](D, 2)
    case = drawn(cell, steps=6, block=block)
    check(case, offsets=moved(case))


def test_rows_that_are_independent_no_longer_are_announced() -> None:
    learner = rtrl.BlockRTRL(seeded(placed("state", "alone", 3), 0), 1)
    learner.step(torch.full((1, D), -1.0, dtype=torch.float64))
    learner.sync()
    assert learner.structure is not None
    learner.step(torch.full((1, D), 1.0, dtype=torch.float64))
    with pytest.warns(rtrl.errors.PerformanceWarning, match="rows of the state that were independent are no longer"):
        learner.sync()
    assert learner.structure is None
