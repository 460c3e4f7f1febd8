"""What must not matter: block, window, laziness, when one syncs, the order of samples, the names of experts, cuts,
saves; and what must be linear."""

import copy
from typing import Any

import torch
from helpers.running import Result, run
from helpers.strategies import Case, cases, dense, fewer, forced_moe, scheduled
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import ForcedMoE
from hypothesis import given
from hypothesis import strategies as st

import rtrl


def same(actual: Result, expected: Result) -> None:
    assert_gradients_equal(actual.gradients, expected.gradients, may_be_zero=True)
    assert_influences_equal(actual.influences, expected.influences, may_be_zero=True)


@fewer(0.6)
@given(cases(), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_block_window_and_laziness(case: Case, block: int, window: int, lazy: bool) -> None:
    same(
        run(case.cell, case.xs, case.loss, block=block, window=window, lazy=lazy),
        run(case.cell, case.xs, case.loss, **case.options),
    )


@fewer(0.6)
@given(cases(), st.data())
def test_when_one_syncs(case: Case, data: st.DataObject) -> None:
    """Deliveries add up, whether the gradients of dormant slices are accumulated at once or later."""
    steps = st.integers(0, case.xs.shape[0] - 1)
    syncs = data.draw(st.dictionaries(steps, st.booleans(), max_size=6))
    same(
        run(case.cell, case.xs, case.loss, syncs=syncs, **case.options),
        run(case.cell, case.xs, case.loss, **case.options),
    )


@fewer(0.6)
@given(cases(), st.data())
def test_saved_and_loaded_in_mid_stream_bit_for_bit(case: Case, data: st.DataObject) -> None:
    saves = data.draw(st.sets(st.integers(0, case.xs.shape[0] - 1), min_size=1, max_size=3))
    syncs = data.draw(st.dictionaries(st.integers(0, case.xs.shape[0] - 1), st.booleans(), max_size=2))
    through = run(case.cell, case.xs, case.loss, syncs=syncs, **case.options)
    resumed = run(case.cell, case.xs, case.loss, syncs=syncs, saves=saves, **case.options)
    for a, b in ((through.gradients, resumed.gradients), (through.influences, resumed.influences)):
        assert all(torch.equal(a[name], b[name]) for name in a)


@fewer(0.6)
@given(cases(), st.randoms())
def test_permuted_samples(case: Case, random: Any) -> None:
    order = list(range(case.xs.shape[1]))
    random.shuffle(order)
    expected = run(case.cell, case.xs, case.loss, **case.options)
    found = run(case.cell, case.xs[:, order], case.loss, **case.options)
    same(found, Result(expected.gradients, {name: value[order] for name, value in expected.influences.items()}))


@fewer(0.6)
@given(forced_moe(), st.randoms())
def test_relabelled_experts(case: Case, random: Any) -> None:
    cell = case.cell
    assert isinstance(cell, ForcedMoE)
    expected = run(cell, case.xs, case.loss, **case.options)
    order = list(range(cell.cell.n_experts))
    random.shuffle(order)
    place = torch.tensor(order).argsort()
    xs, k = case.xs.clone(), cell.widths[2]
    xs[..., -k:] = place[xs[..., -k:].long()].to(xs.dtype)
    names = [
        f"cell.{name}" for name in ("router.weight", "expert_up", "expert_up_bias", "expert_down", "expert_down_bias")
    ]
    with torch.no_grad():
        for name in names:
            cell.get_parameter(name).copy_(cell.get_parameter(name)[order].clone())
    found = run(cell, xs, case.loss, **case.options)
    moved = {name: value[order] if name in names else value for name, value in expected.gradients.items()}
    assert_gradients_equal(found.gradients, moved, may_be_zero=True)


@given(scheduled() | dense(), st.data())
def test_a_sequence_cut_in_two(case: Case, data: st.DataObject) -> None:
    """A learner continues after any delivery; the gradients of the halves add up to the whole."""
    cut = data.draw(st.integers(0, case.xs.shape[0]))
    whole = run(case.cell, case.xs, case.loss, influences=False, **case.options)
    learner = rtrl.BlockRTRL(case.cell, case.xs.shape[1], **case.options)
    total = {name: torch.zeros_like(g) for name, g in whole.gradients.items()}
    for t, x in enumerate(case.xs):
        if t == cut:
            learner.sync()
            for name, p in case.cell.named_parameters():
                total[name] += torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = None
        loss = case.loss(t, learner.step(x))
        if loss is not None:
            learner.backward(loss)
    learner.sync()
    for name, p in case.cell.named_parameters():
        total[name] += torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    assert_gradients_equal(total, whole.gradients, may_be_zero=True)


@fewer(0.6)
@given(cases(), st.sampled_from([-2.0, 1e-6, 1e6]))
def test_gradients_are_linear_in_the_loss(case: Case, factor: float) -> None:
    def scaled(t: int, y: Any) -> Any:
        loss = case.loss(t, y)
        return None if loss is None else factor * loss

    expected = run(case.cell, case.xs, case.loss, influences=False, **case.options).gradients
    found = run(case.cell, case.xs, scaled, influences=False, **case.options).gradients
    assert_gradients_equal(found, {name: factor * value for name, value in expected.items()}, may_be_zero=True)


@fewer(0.6)
@given(cases())
def test_two_losses_at_a_step_and_a_plain_backward(case: Case) -> None:
    """Losses of a step add up, added by either method, also late but within the open block."""
    expected = run(case.cell, case.xs, case.loss, influences=False, **case.options).gradients
    for p in case.cell.parameters():
        p.grad = None
    learner = rtrl.BlockRTRL(case.cell, case.xs.shape[1], **case.options)
    late: list[Any] = []
    for t, x in enumerate(case.xs):
        y = learner.step(x)
        loss = case.loss(t, y)
        if loss is not None:
            learner.backward(0.25 * loss)
            (0.25 * case.loss(t, y)).backward()
            late.append(0.5 * case.loss(t, y))
        if learner.at_block_end or t == len(case.xs) - 1:
            for own in late:
                own.backward()
            late = []
    learner.sync()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in case.cell.named_parameters()}
    assert_gradients_equal(found, expected, may_be_zero=True)


@given(cases())
def test_single_precision_is_judged_against_double(case: Case) -> None:
    """float32 must lose what rounding loses and no more: 2e-4 of a parameter's largest entry over these few steps.

    Choices are replayed in double precision, so that a near tie cannot flip.
    """
    expected = run(case.cell, case.xs, case.loss, influences=False, **case.options).gradients
    largest = max(float(value.abs().max()) for value in expected.values() if value.numel())
    single = copy.deepcopy(case.cell).to(torch.float32)
    learner = rtrl.BlockRTRL(single, case.xs.shape[1], **case.options)
    h = case.cell.init_state(case.xs.shape[1])
    for t, x in enumerate(case.xs):
        with torch.no_grad():
            _, h, *declared = case.cell(x, h)
        y = learner.step(x.to(torch.float32), replay=declared[0] if declared else None)
        loss = case.loss(t, torch.utils._pytree.tree_map(lambda v: v.double() if v.is_floating_point() else v, y))
        if loss is not None:
            learner.backward(loss)
    learner.sync()
    for name, value in expected.items():
        grad = single.get_parameter(name).grad
        assert grad is not None
        error = float((grad.double() - value).abs().max()) if value.numel() else 0.0
        assert error <= 2e-4 * largest, (name, error, largest)
