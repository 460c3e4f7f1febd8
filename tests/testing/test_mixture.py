"""Drawn schedules: what occurs in them, which stream they stand for, and how a failing one is made shorter."""

from itertools import pairwise, product

import pytest
import torch

import oracles
import rtrl
from rtrl.testing import LearnerSpec, assert_gradients_equal, check_learner
from rtrl.testing.learner_checks.mixture import Event, drawn, equivalent, shrunk
from rtrl.testing.streams import dense_stream, moved_parameters

KINDS = ("reset", "sync", "change", "save")
STREAM = dense_stream(0, steps=6)


@pytest.mark.parametrize("seed", range(3))
def test_every_three_events_occur_in_a_row_and_every_two_with_a_step_in_between(seed: int) -> None:
    rows: list[list[str]] = [[]]
    for event in drawn(STREAM, KINDS, seed, length=3, gap=4):
        if event.kind == "step":
            rows.append([])
        else:
            rows[-1].append(event.kind)
    assert {tuple(row[i : i + 3]) for row in rows for i in range(len(row) - 2)} == set(product(KINDS, repeat=3))
    alone = [event.kind for event in drawn(STREAM, KINDS, seed, length=2, gap=1)]
    assert set(alone[:-1:2]) == {"step"}
    events = alone[1:-1:2]
    assert set(pairwise(events)) == set(product(KINDS, repeat=2))


def test_a_schedule_depends_on_the_seed_alone() -> None:
    first, second, other = (drawn(STREAM, KINDS, seed, length=3, gap=4) for seed in (0, 0, 1))
    assert first == second != other


def test_no_resets_of_some_samples_add_up_to_one_of_all() -> None:
    two = dense_stream(0, batch=2)
    for seed in range(5):
        samples = {event.samples for event in drawn(two, KINDS, seed, length=3, gap=4) if event.kind == "reset"}
        assert len(samples) == 1


def test_a_schedule_stands_for_a_stream_with_its_steps_losses_resets_and_parameters() -> None:
    offsets = moved_parameters(STREAM, 2, 0)
    schedule = [
        Event("step", 3),
        Event("reset", samples=(1, 2)),
        Event("sync"),
        Event("step", 1, losses=2),
        Event("change", 2),
        Event("reset", samples=(0,)),
        Event("step", 5, losses=0),
        Event("save"),
        Event("step", 0),
        Event("reset", samples=(4,)),
    ]
    found = equivalent(STREAM, schedule, offsets)
    resets = torch.zeros(4, 5, dtype=torch.bool)
    resets[1, 1] = resets[1, 2] = resets[2, 0] = True
    xs, weights, steps = STREAM.xs[[3, 1, 5, 0]], [1, 2, 0, 1], [3, 1, 5, 0]
    expected = oracles.bptt(
        STREAM.cell,
        xs,
        lambda t, y: weights[t] * STREAM.loss(steps[t], y),  # type: ignore[operator]
        resets=resets,
        offsets=[{}, {}, offsets[2], offsets[2]],
    )
    assert_gradients_equal(
        oracles.bptt(found.cell, found.xs, found.loss, resets=found.resets, offsets=found.offsets), expected
    )


def test_what_is_not_needed_for_the_failure_is_removed() -> None:
    schedule = [Event("step", number) for number in range(40)]
    needed = {Event("step", 7), Event("step", 8), Event("step", 31)}
    tried = []

    def fails(part: object) -> bool:
        tried.append(part)
        return needed <= set(part)  # type: ignore[call-overload]

    assert shrunk(schedule, fails) == sorted(needed, key=lambda event: event.number)
    assert len(tried) < 150


def test_what_a_learner_raises_in_a_schedule_is_told_with_the_schedule() -> None:
    class Once(rtrl.BlockRTRL):
        """Cannot be loaded right after a sync."""

        def sync(self, dormant: bool = True) -> None:
            super().sync(dormant)
            self.synced_at = self.steps_taken

        def state_dict(self) -> dict[str, object]:
            if getattr(self, "synced_at", 0) == self.steps_taken > 0:
                raise OverflowError("not now")
            return super().state_dict()

    (failure,) = check_learner(LearnerSpec(Once, sparse=False), checks=["drawn mixtures"], on_fail="return").failures
    assert "state_dict raised OverflowError: not now" in failure.message
    assert failure.message.count(";") == 4, "a step, a sync, the save, and the last sync"
    assert 'in state_dict: raise OverflowError("not now")' in failure.traceback
