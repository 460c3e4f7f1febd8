"""Dormancy schedules written by hand: each names the case that a lazy implementation gets wrong first."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.running import run
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import ForcedMoE, seeded
from torch import Tensor

import oracles
import rtrl

STEPS, EXPERTS, WINDOW, BLOCK = 40, 6, 4, 2
SPAN = WINDOW * BLOCK  # steps that the tree holds

# Which expert (of 0 … 5) is used at step t; every schedule has another dormancy.
SCHEDULES = {
    "always the same": lambda t: 0,
    "all in turn": lambda t: t % EXPERTS,
    "long turns": lambda t: t // 7 % EXPERTS,
    "reactivates just inside the window": lambda t: 0 if t % SPAN == 0 else 1,
    "reactivates at the window's edge": lambda t: 0 if t % (SPAN + BLOCK) == 0 else 1,
    "reactivates just past the window": lambda t: 0 if t % (SPAN + BLOCK + 1) == 0 else 1,
    "once at the first step, never again": lambda t: 2 if t == 0 else 1,
    "once, then again at the last step": lambda t: 2 if t in (0, STEPS - 1) else 1,
    "dormant far longer than the window": lambda t: 3 if t in (1, 1 + 4 * SPAN) else 1,
    "many become dormant and reactivate together": lambda t: t % EXPERTS if t < EXPERTS or t >= STEPS - EXPERTS else 0,
    "first used at the last step": lambda t: 5 if t == STEPS - 1 else 0,
}


def stream(schedules: tuple[str, str], second_sample_shift: int = 3) -> tuple[ForcedMoE, Tensor]:
    """A cell, and a stream of two samples, each with a schedule of its own."""
    moe = rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=EXPERTS, topk=2, expert_hidden=3, ffn_hidden=3)
    cell = seeded(ForcedMoE(moe, (2, 1, 2)), 11)
    assert isinstance(cell, ForcedMoE)
    chosen = []
    for t, b in itertools.product(range(STEPS), range(2)):
        first = SCHEDULES[schedules[b]]((t + b * second_sample_shift) % STEPS)
        slot = t // 5 % 3
        chosen.append([slot, (slot + 1) % 3, slot, first, (first + 1) % EXPERTS])
    index = torch.tensor(chosen, dtype=torch.float64).reshape(STEPS, 2, 5)
    return cell, torch.cat([normal(0, STEPS, 2, 2), index], dim=-1)


def every(t: int, y: Tensor) -> Tensor:
    return y.square().sum() + y[..., 0].sum()


def while_dormant(t: int, y: Tensor) -> Tensor | None:
    """Losses only where most experts are dormant, so that their gradients come through the tree or not at all."""
    return every(t, y) if 10 <= t < 30 and t % 3 else None


def last(t: int, y: Tensor) -> Tensor | None:
    return every(t, y) if t == STEPS - 1 else None


SYNCS = ({}, dict.fromkeys(range(0, STEPS, 3), False), dict.fromkeys(range(1, STEPS, 5), True))


def in_pairs(start: int) -> list[tuple[str, str]]:
    """Every schedule, two to a stream; which of them is the first sample's changes with the start."""
    names = [*SCHEDULES][start:] + [*SCHEDULES][:start]
    return list(zip(names[::2], [*names[1::2], names[0]], strict=True))


def deliveries() -> Iterator[Any]:
    """Every schedule with every loss and every way to sync; the gate has each pair of schedule and loss once."""
    for j, loss in enumerate((every, while_dormant, last)):
        for i, pair in enumerate(in_pairs(j)):
            yield pytest.param(pair, loss, SYNCS[(i + j) % len(SYNCS)], id=f"{', '.join(pair)}-{loss.__name__}")
        for schedule, (k, syncs) in itertools.product(SCHEDULES, enumerate(SYNCS)):
            case = f"{schedule}-{loss.__name__}-{k}"
            yield pytest.param((schedule, schedule), loss, syncs, marks=pytest.mark.nightly, id=case)


@pytest.mark.parametrize(("schedules", "loss", "syncs"), list(deliveries()))
def test_gradients(schedules: tuple[str, str], loss: object, syncs: dict[int, bool]) -> None:
    cell, xs = stream(schedules)
    found = run(cell, xs, loss, block=BLOCK, window=WINDOW, syncs=syncs, influences=False)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss))


@pytest.mark.parametrize("schedules", in_pairs(0))
def test_influences(schedules: tuple[str, str]) -> None:
    """The lazy influence equals that of ``lazy=False``, and at the end of a shorter stream that of full RTRL."""
    cell, xs = stream(schedules)
    lazy = run(cell, xs, every, block=BLOCK, window=WINDOW)
    eager = run(cell, xs, every, block=BLOCK, lazy=False)
    assert_influences_equal(lazy.influences, eager.influences)
    short = xs[-2 * SPAN + 3 :]
    _, influences = oracles.dense_rtrl(cell, short, last_of(len(short)), return_influence=True)
    assert_influences_equal(
        run(cell, short, last_of(len(short)), block=BLOCK, window=WINDOW).influences, influences[-1]
    )


def last_of(steps: int) -> object:
    return lambda t, y: every(t, y) if t == steps - 1 else None


def test_a_slice_that_was_never_active_takes_no_memory() -> None:
    cell, xs = stream(("always the same",) * 2, second_sample_shift=0)
    held = {}
    for used in (1, 3, EXPERTS):
        learner = rtrl.BlockRTRL(cell, 2, block=BLOCK, window=WINDOW)
        for t, x in enumerate(xs):
            x = x.clone()
            x[:, -2] = t % used
            x[:, -1] = (t + 1) % used if used > 1 else 1 + t % 1
            learner.step(x)
        learner.sync()
        held[used] = learner.retained_bytes()["influence"]
        updates = {name: learner.last_updates(name) for name, _ in cell.named_parameters()}
        sliced = {name: update for name, update in updates.items() if update.shape[1] == EXPERTS}
        assert {name for name in updates if "expert" in name} <= sliced.keys()
        assert {int((update >= 0).sum()) for update in sliced.values()} == {2 * max(used, 2)}  # two samples
    # a row (H, p) of every parameter of an expert, and its sample, slice and clock
    sizes = [cell.get_parameter(name).numel() // EXPERTS for name in sliced]
    row = sum(8 * (cell.init_state(1).numel() * p + 3) for p in sizes)
    assert held[3] - held[1] == 2 * row
    assert held[EXPERTS] - held[3] == 2 * (EXPERTS - 3) * row


def test_a_reset_of_all_samples_accumulates_what_dormant_slices_have_pending() -> None:
    """Expert 0 is used at steps 0 and 7 of twelve; the reset of all falls before step 7."""
    moe = rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=4, topk=1, expert_hidden=2, ffn_hidden=2)
    cell = seeded(ForcedMoE(moe, (2, 1, 1)), 5)
    chosen = [[[t % 3, (t + 1) % 3, t % 3, 0 if t in (0, 7) else 1]] * 2 for t in range(12)]
    xs = torch.cat([normal(0, 12, 2, 2), torch.tensor(chosen, dtype=torch.float64)], dim=-1)
    resets = torch.zeros(12, 2, dtype=torch.bool)
    resets[7] = True
    found = run(cell, xs, every, resets=resets, block=2, window=4)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, every, resets=resets))
