"""The learner's own audit, without any test: how many of the catalogue's bugs that make a gradient wrong it notices.

A learner that audits every block runs along a few streams while a bug is in place. Where the gradients or influences
are not those of the oracle, the bug must have raised an error, or the learner must have gone another way that is right.
"""

import copy
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from catalogue import BUGS, Bug
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import AuditError, PerformanceWarning
from rtrl.testing import streams
from rtrl.testing.driver import Driver
from rtrl.testing.streams import Stream, normal, seeded

Values = dict[str, Tensor]

QUICK = {
    2: "dense",
    3: "dormant slices",
    8: "sparse rows",
    12: "GRU",
    14: "dormant slices",
    17: "dense",
    20: "dense",
    29: "dormant slices",
    31: "unusual parameters",
    44: "dormant slices",
    72: "GRU",
    144: "rows",
}
"""Bugs of all parts of the engine, and a stream that shows each, for every run; the rest is nightly."""
UNNOTICED = {
    42: "a gradient that starts from something else than zero: what is delivered is not summed up a second time",
}


def _eventful(stream: Stream) -> Stream:
    resets = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool)
    resets[stream.steps // 2, 0] = resets[stream.steps - 3, -1] = True
    return replace(stream, resets=resets, syncs=frozenset({2, 7, 8}))


@cache
def workload() -> list[Stream]:
    gru = seeded(rtrl.cells.from_torch(nn.GRUCell(2, 3)), 3)
    return [
        _eventful(streams.dense_stream(0, 10)),
        streams.unusual_stream(0, 8),
        _eventful(streams.scheduled_stream(0)),
        _eventful(streams.dormant_stream(0, 26)),
        streams.long_dormancy_stream(0, 40),
        _eventful(Stream(gru, normal(1, 10, 2, 2), name="GRU")),
        _eventful(Stream(seeded(rtrl.cells.MinGRU(2, 3).double(), 3), normal(1, 10, 2, 2), name="rows")),
        streams.shared_stream(0, 8),
        streams.layered_stream(0, 8),
        streams.near_tie_stream(0),
        streams.frozen_stream(0, 8),
    ]


def _learned(stream: Stream, audit: int | str) -> Values:
    make = partial(rtrl.BlockRTRL, block=3, window=3, audit=audit)
    driver = Driver(make, copy.deepcopy(stream.cell), stream.batch_size)
    driver.run(stream.xs, stream.loss, syncs=stream.syncs, resets=stream.resets)
    driver.sync()
    return {**driver.gradients(), **{f"influence of {name}": value for name, value in driver.influences().items()}}


def _right(stream: Stream) -> Values:
    gradients, influences = oracles.dense_rtrl(
        copy.deepcopy(stream.cell), stream.xs, stream.loss, resets=stream.resets, return_influence=True
    )
    return {**gradients, **{f"influence of {name}": value for name, value in influences[-1].items()}}


def _same(found: Values, right: Values) -> bool:
    return all(
        torch.allclose(found[name], value, rtol=1e-6, atol=1e-9 * float(value.abs().max()))
        for name, value in right.items()
    )


def _outcome(bug: Bug) -> str:
    """ "harmless" if no gradient is silently wrong without an audit; with it, "noticed" or "silent"."""
    outcome = "harmless"
    for stream in workload():
        with ExitStack() as broken:
            for break_ in bug.breaks:
                broken.enter_context(break_())
            try:
                right = _right(stream)
                if _same(_learned(stream, "off"), right):
                    continue
            except Exception:  # it is noticed without an audit
                continue
            try:
                silent = not _same(_learned(stream, 1), right)
            except Exception:
                silent = False
        if silent:
            return "silent"
        outcome = "noticed"
    return outcome


@cache
def unaudited(name: str) -> Values:
    return _learned(next(stream for stream in workload() if stream.name == name), "off")


@pytest.mark.parametrize("stream", workload(), ids=lambda stream: stream.name)
def test_an_audit_of_every_block_finds_nothing_and_changes_nothing(stream: Stream) -> None:
    audited = _learned(stream, 1)
    assert all(torch.equal(audited[name], value) for name, value in unaudited(stream.name).items())


@pytest.mark.parametrize("number", QUICK)
def test_a_bug_is_noticed(number: int) -> None:
    stream = next(stream for stream in workload() if stream.name == QUICK[number])
    right = unaudited(stream.name)
    with ExitStack() as broken:
        for break_ in BUGS[number - 1].breaks:
            broken.enter_context(break_())
        assert not _same(_learned(stream, "off"), right)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerformanceWarning)
            try:
                mended = _same(_learned(stream, 1), right)
            except AuditError:
                mended = True
    assert mended


@pytest.mark.nightly
def test_at_least_95_percent_of_the_gradient_bugs_are_noticed() -> None:
    outcomes = {bug.number: _outcome(bug) for bug in BUGS}
    wrong = {number: outcome for number, outcome in outcomes.items() if outcome != "harmless"}
    silent = {number for number, outcome in wrong.items() if outcome == "silent"}
    assert silent == set(UNNOTICED)
    assert len(wrong) >= 25
    assert len(wrong) - len(silent) >= 0.95 * len(wrong), f"{len(silent)} of {len(wrong)}: {sorted(silent)}"
