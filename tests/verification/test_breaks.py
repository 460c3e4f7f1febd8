"""Breaks are planted as a whole, change what they say, and leave nothing behind."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

import rtrl
from rtrl.errors import ConfigError
from rtrl.verification import breaks


def replaced(name: str) -> list[tuple[Any, str]]:
    """What a break replaces."""
    found: list[tuple[Any, str]] = []
    breaks.find(name).plant(lambda owner, attribute, value: found.append((owner, attribute)))
    return found


@pytest.mark.parametrize("name", breaks.BREAKS)
def test_a_break_is_planted_and_undone_also_after_an_error(name: str) -> None:
    places = replaced(name)
    before = [vars(owner).get(attribute) for owner, attribute in places]
    with suppress(ZeroDivisionError), breaks.planted(name):
        assert breaks.active() == (name,)
        assert [vars(owner)[attribute] for owner, attribute in places] != before
        raise ZeroDivisionError
    assert [vars(owner).get(attribute) for owner, attribute in places] == before
    assert breaks.active() == ()


def test_every_break_says_what_is_wrong_in_one_sentence() -> None:
    for name, found in breaks.BREAKS.items():
        assert found.fault.endswith(".") and len(found.fault) > 20, name


def test_an_unknown_break_plants_nothing() -> None:
    with (
        pytest.raises(ConfigError, match="there is no break 'nope'; there are: truncate"),
        breaks.planted("eager", "nope"),
    ):
        pass
    assert rtrl.BlockRTRL(cell(), 1).lazy


def cell() -> rtrl.RecurrentMoE:
    return rtrl.RecurrentMoE(
        2, 2, d_model=4, n_slots=3, n_experts=4, topk=1, generator=torch.Generator().manual_seed(0)
    )


def run(steps: int, **options: Any) -> Iterator[rtrl.BlockRTRL]:
    learner = rtrl.BlockRTRL(cell(), 1, audit="off", **options)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        learner.backward(learner.step(torch.randn(1, 2, generator=draw)).square().sum())
        yield learner


def gradient(**options: Any) -> torch.Tensor:
    *_, learner = run(24, block=4, window=2, **options)
    learner.sync()
    return torch.cat([p.grad.flatten() for p in learner.cell.parameters() if p.grad is not None])


SAVED = ("eager", "step-by-step", "double-window", "ignore-reads", "ignore-writes", "ignore-experts", "no-reuse")
SAVED += ("one-by-one", "linearize-twice", "keep-states", "uncounted-influence", "leak")


@pytest.mark.parametrize("name", SAVED)
def test_a_break_of_costs_leaves_the_gradient_as_it_is(name: str) -> None:
    right = gradient()
    with breaks.planted(name):
        assert torch.allclose(gradient(), right, rtol=1e-3, atol=1e-5)
