"""What a learner saves: it continues bit for bit from a file, and what does not fit is refused with nothing changed."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES, F64, normal
from helpers.toy_cells import PlainRNN, seeded
from torch.utils import _pytree as pytree

import rtrl
from rtrl.errors import ConfigError
from rtrl.learners import BPTT, RFLO, TBPTT, UORO, DenseRTRL, DiagonalRTRL, SnAp

Make = Callable[..., Any]
ALL = [*BASELINES, pytest.param(lambda *a: rtrl.BlockRTRL(*a, block=4, window=3), id="block")]


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def after_four_steps(make: Make, hidden: int = 3, batch_size: int = 2) -> Any:
    learner = make(seeded(PlainRNN(2, hidden), 0), batch_size)
    for x in normal(0, 4, batch_size, 2):
        learner.backward(learner.step(x).square().sum())
    return learner


@pytest.mark.parametrize("make", BASELINES)
def test_a_damaged_or_foreign_saved_learner_is_refused_and_changes_nothing(make: Make) -> None:
    learner = after_four_steps(make)
    saved, x = learner.state_dict(), torch.ones(2, 2)
    buffers = saved["buffers"]
    foreign = DiagonalRTRL if isinstance(learner, DenseRTRL) else DenseRTRL
    wrong: list[tuple[Any, str]] = [
        ({}, "not a saved learner"),
        ({**saved, "format": 1}, r"saved by rtrl 0\.1\.0, in format 1"),
        (after_four_steps(foreign).state_dict(), "learner='"),
        (after_four_steps(make, hidden=4).state_dict(), "state="),
        (after_four_steps(make, batch_size=3).state_dict(), "batch_size=3"),
        ({**saved, "steps_taken": -1}, "count"),
        ({**saved, "steps_taken": saved["steps_taken"] + 1}, "do not fit the number of steps"),
        ({**saved, "open_steps": saved["open_steps"] * 2}, "do not fit the number of steps"),
        ({**saved, "state": saved["state"].float()}, "saved state"),
        ({**saved, "open_steps": [{**step, "x": x[:1]} for step in saved["open_steps"]]}, "batch"),
        ({**saved, "pending_grads": {"inward": x[:1]}}, "gradient"),
        ({**saved, "pending_grads": {"nobody": x}}, "gradients"),
        ({**saved, "buffers": {**buffers, "snapshots": []}}, "damaged"),
        ({**saved, "buffers": {**buffers, "snapshots": [{}] * len(buffers["snapshots"])}}, "not those of this cell"),
        ({**saved, "buffers": {**buffers, "snapshot": None}}, "without the parameters"),
        ({**saved, "buffers": {k: v for k, v in buffers.items() if k != "constant_state"}}, "damaged"),
        ({**saved, "buffers": {**buffers, "kept_steps": [{}]}}, "damaged"),
    ]
    if "carried" in buffers:
        wrong += [
            ({**saved, "buffers": {**buffers, "carried": [x]}}, "influence|damaged"),
            ({**saved, "buffers": {**buffers, "carried": []}}, "damaged"),
        ]
    if isinstance(learner, UORO):
        wrong.append(({**saved, "buffers": {**buffers, "rng_state": x}}, "damaged"))
    for state, words in wrong:
        with pytest.raises(ConfigError, match=words):
            learner.load_state_dict(state)
    other, gradients = after_four_steps(make), []
    other.load_state_dict(saved)
    for loaded in (learner, other):
        loaded.sync()
        gradients.append([p.grad.clone() for p in loaded.cell.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("make", ALL)
def test_a_learner_saved_right_after_a_reset_of_some_samples_continues_bit_for_bit(make: Make) -> None:
    gradients, state = [], None
    for resumed in (False, True):
        cell = seeded(PlainRNN(2, 3), 0)
        learner = make(cell, 2)
        for t in range(12):
            if t == 5:
                learner.reset(torch.tensor([True, False]))
                state = through_a_file(learner.state_dict()) if state is None else state
            x = torch.full((2, 2), 0.1 * t, dtype=F64)
            if resumed and t < 8:
                x += 1  # another stream, up to the load
            learner.backward(learner.step(x).square().sum())
            if resumed and t == 7:
                learner.load_state_dict(state)
                for again in range(5, 8):
                    learner.backward(learner.step(torch.full_like(x, 0.1 * again)).square().sum())
        learner.sync()
        gradients.append([p.grad.clone() for p in cell.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("make", ALL)
def test_a_loss_of_the_open_step_is_saved_and_its_y_takes_no_more_after_a_load(make: Make) -> None:
    learner, other = after_four_steps(make), make(seeded(PlainRNN(2, 3), 0), 2)
    other.load_state_dict(through_a_file(learner.state_dict()))
    assert other.steps_taken == 4 and torch.equal(other.state, learner.state)
    assert other.retained_bytes() == learner.retained_bytes()
    for loaded in (learner, other):
        loaded.sync()
    for one, two in zip(learner.cell.parameters(), other.cell.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None and torch.equal(one.grad, two.grad)


def test_a_subclass_loads_what_its_class_saved() -> None:
    class Logged(BPTT):
        """A user's own."""

    learner = Logged(seeded(PlainRNN(2, 3), 0), 2)
    learner.load_state_dict(after_four_steps(BPTT).state_dict())
    assert learner.steps_taken == 4


ARGUMENTS = {
    "leak": (lambda *a: RFLO(*a, leak=0.3), lambda *a: RFLO(*a, leak=0.4)),
    "order": (lambda *a: SnAp(*a, order=1), lambda *a: SnAp(*a, order=2)),
    "horizon": (lambda *a: TBPTT(*a, horizon=3), lambda *a: TBPTT(*a, horizon=4)),
    "sliding": (lambda *a: TBPTT(*a, horizon=3), lambda *a: TBPTT(*a, horizon=3, sliding=False)),
    "block": (lambda *a: rtrl.BlockRTRL(*a, block=3), lambda *a: rtrl.BlockRTRL(*a, block=4)),
    "window": (lambda *a: rtrl.BlockRTRL(*a, window=3), lambda *a: rtrl.BlockRTRL(*a, window=4)),
    "lazy": (lambda *a: rtrl.BlockRTRL(*a), lambda *a: rtrl.BlockRTRL(*a, lazy=False)),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_learner_with_another_argument_is_refused(argument: str) -> None:
    """It would continue with another rule, and nobody would know."""
    make, other = ARGUMENTS[argument]
    saved = after_four_steps(make).state_dict()
    learner = other(seeded(PlainRNN(2, 3), 0), 2)
    with pytest.raises(ConfigError, match=argument):
        learner.load_state_dict(saved)
    assert learner.steps_taken == 0
    make(seeded(PlainRNN(2, 3), 0), 2).load_state_dict(saved)


@pytest.mark.parametrize("make", ALL)
def test_what_was_saved_is_not_changed_by_a_learner_that_loads_it(make: Make) -> None:
    first = after_four_steps(make)
    for x in normal(2, 2, 2, 2):  # beyond a block, so that gradients and influences are pending
        first.backward(first.step(x).square().sum())
    saved = first.state_dict()
    kept = copy.deepcopy(saved)
    learner = make(seeded(PlainRNN(2, 3), 0), 2)
    learner.load_state_dict(saved)
    for x in normal(1, 6, 2, 2):
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    leaves = [pytree.tree_leaves(part) for part in (saved, kept)]
    assert all(
        torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two for one, two in zip(*leaves, strict=True)
    )


@pytest.mark.parametrize("make", ALL)
def test_what_was_saved_is_not_changed_by_losses_that_come_later(make: Make) -> None:
    learner = make(seeded(PlainRNN(2, 3), 0), 2)
    y = learner.step(normal(1, 2, 2))
    y.sum().backward(retain_graph=True)
    saved = learner.state_dict()
    kept = copy.deepcopy(saved)
    y.square().sum().backward()
    for one, two in zip(pytree.tree_leaves(saved), pytree.tree_leaves(kept), strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize("make", ALL)
def test_what_is_done_to_a_saved_learner_reaches_neither_the_one_saved_nor_the_one_loaded(make: Make) -> None:
    learner, twin = after_four_steps(make), after_four_steps(make)
    saved = learner.state_dict()
    loaded = make(seeded(PlainRNN(2, 3), 0), 2)
    loaded.load_state_dict(saved)
    for leaf in pytree.tree_leaves(saved):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            leaf.fill_(7.0)
    gradients = []
    for each in (learner, loaded, twin):
        each.sync()
        gradients.append([p.grad for p in each.cell.parameters()])
        assert torch.equal(each.state, twin.state)
    for one, two, three in zip(*gradients, strict=True):
        assert torch.equal(one, three) and torch.equal(two, three)
