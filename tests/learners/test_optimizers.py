"""Optimizers that change values without a trace in the tensors, and optimizers that never find a gradient."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES, F64, normal
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded

import oracles
import rtrl
from rtrl.errors import ParameterChangedError

Make = Callable[..., Any]
X = torch.ones(2, 2, dtype=F64)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-9, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=1e-9, foreach=True),
    "plain": lambda p: torch.optim.RMSprop(p, lr=1e-9),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_update_inside_an_open_block_is_refused_by_the_next_step(make_optimizer: Any) -> None:
    """The change is far below what running the block once more could show."""
    cell = seeded(PlainRNN(2, 3), 0)
    optimizer, learner = make_optimizer(cell.parameters()), rtrl.BlockRTRL(cell, 2, block=3)
    optimizer.step()  # without a gradient: nothing changes
    learner.backward(learner.step(X).sum())
    optimizer.step()
    learner.step(X)
    learner.sync()
    learner.step(X)
    before = str(learner.state_dict())
    optimizer.step()
    for do in (lambda: learner.step(X), learner.sync, learner.reset):
        with pytest.raises(ParameterChangedError, match="changed inside the open block of steps 2 … 2"):
            do()
    assert str(learner.state_dict()) == before
    learner.reset(discard=True)
    learner.step(X)
    learner.sync()
    optimizer.step()
    learner.step(X)


@pytest.mark.parametrize("make", [*BASELINES, pytest.param(lambda *a: rtrl.BlockRTRL(*a, block=1), id="block-1")])
def test_no_learner_keeps_values_from_before_a_fused_update(make: Make) -> None:
    found = []
    for fused in (False, True):
        cell = seeded(PlainRNN(2, 3), 0)
        optimizer, learner = torch.optim.SGD(cell.parameters(), lr=0.1, fused=fused), make(cell, 2)
        for t, x in enumerate(normal(0, 6, 2, 2)):
            learner.backward((learner.step(x) - 0.1 * t).square().sum())
            learner.sync()
            optimizer.step()
        found.append({**gradients(cell), **{f"value of {n}": p.detach().clone() for n, p in cell.named_parameters()}})
    assert_gradients_equal(found[1], found[0])


def test_the_exact_gradient_after_fused_updates() -> None:
    cell, xs = seeded(PlainRNN(2, 3), 0), normal(0, 7, 2, 2)
    start = {name: p.detach().clone() for name, p in cell.named_parameters()}
    optimizer, learner = torch.optim.Adam(cell.parameters(), lr=0.05, fused=True), rtrl.BlockRTRL(cell, 2, block=2)
    total, offsets = {name: torch.zeros_like(p) for name, p in start.items()}, []
    for t, x in enumerate(xs):
        offsets.append({name: p.detach() - start[name] for name, p in cell.named_parameters()})
        learner.backward((learner.step(x) - 0.1 * t).square().sum())
        if learner.at_block_end:
            learner.sync()
            total = {name: total[name] + value for name, value in gradients(cell).items()}
            optimizer.step()
            optimizer.zero_grad()
    learner.sync()
    total = {name: total[name] + value for name, value in gradients(cell).items()}
    with torch.no_grad():
        for name, p in cell.named_parameters():
            p.copy_(start[name])
    assert_gradients_equal(total, oracles.bptt(cell, xs, lambda t, y: (y - 0.1 * t).square().sum(), offsets=offsets))


def loop(steps: int, order: str, make: Make = rtrl.BlockRTRL, **options: Any) -> list[str]:
    """Run a loop; ``order`` has one letter for each of optimizer.step, sync and zero_grad. Returns the warnings."""
    cell = seeded(PlainRNN(2, 3), 0)
    learner, optimizer = make(cell, 2), torch.optim.SGD(cell.parameters(), lr=0.01)
    calls = {
        "o": optimizer.step,
        "s": learner.sync,
        "z": lambda: optimizer.zero_grad(**options),
        "n": lambda: None,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            learner.backward((learner.step(X) - 0.1 * t).square().sum())
            for letter in order:
                calls[letter]()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("make", [*BASELINES, pytest.param(rtrl.BlockRTRL, id="block")])
@pytest.mark.parametrize(("order", "erase"), [("osz", True), ("szo", False), ("szo", True)])
def test_deliveries_that_no_optimizer_finds_are_said_once(make: Make, order: str, erase: bool) -> None:
    found = loop(9, order, make, set_to_none=erase)
    assert len(found) == 1 and "Call sync(), then optimizer.step(), then zero_grad()" in found[0]


def test_deliveries_that_are_lost_twice_are_not_said_yet() -> None:
    assert not loop(3, "osz") and len(loop(4, "osz")) == 1


def test_losses_that_are_never_synced_are_said_once() -> None:
    found = loop(120, "oz")
    assert len(found) == 1 and "call sync() before optimizer.step()" in found[0]


def test_losses_that_are_synced_now_and_then_are_not_called_forgotten() -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    learner, optimizer = rtrl.BlockRTRL(cell, 2), torch.optim.SGD(cell.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(120):
            learner.backward(learner.step(X).sum())
            optimizer.step()
            if t == 60:
                learner.sync()
                cell.zero_grad()


@pytest.mark.parametrize("order", ["soz", "zso", "sz", "so", "s", "n", "ooooosoz", "osozoo"])
def test_loops_that_learn_or_have_no_optimizer_are_left_alone(order: str) -> None:
    assert not loop(9 if order != "n" else 120, order)


def test_an_optimizer_of_other_parameters_and_one_that_erases_gradients_itself_are_left_alone() -> None:
    class Erasing(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p -= 0.1 * p.grad
            self.zero_grad()

    cell, other = seeded(PlainRNN(2, 3), 0), seeded(PlainRNN(2, 3), 1)
    learner = rtrl.BlockRTRL(cell, 2)
    erasing, foreign = Erasing(cell.parameters()), torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erasing.step()  # finds nothing yet
        for t in range(9):
            foreign.step()
            learner.backward((learner.step(X) - 0.1 * t).square().sum())
            learner.sync()
            erasing.step()
        for _ in range(9):  # looked at, and put away
            learner.backward(learner.step(X).sum())
            learner.sync()
            cell.zero_grad()
            foreign.step()
