"""Planned bytes against those really held and alive, and faults in the formulas against both."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cost_cases import (
    BASELINES,
    BLOCKS,
    DENSE,
    SPARSE,
    TRUNCATED,
    Way,
    block,
    expect_bytes,
    expect_counts,
    held,
    inputs,
    mixture,
    profiled,
    torch_cell,
    truncated,
    watched,
)
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import rtrl
from rtrl._engine import buffers
from rtrl.costs import block_bytes, block_macs, block_peak, dormant, linear, others, textbook
from rtrl.costs.profile import Profile, Series, profile
from rtrl.learners import BPTT
from rtrl.profiling.live_bytes import peak_of

CELLS = DENSE | SPARSE


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "layers", "embedding", "mixture", "rows and slices in x"])
def test_what_is_held_is_planned_to_the_byte(kind: str) -> None:
    for steps in (1, 2, 5, 6, 11) if kind == "RNN" else (11,):
        cell = CELLS[kind]()
        xs = inputs(cell, steps, 2)
        found = profiled(cell, xs)
        for way in (*BASELINES, *BLOCKS):
            if way.name != "textbook" or kind != "mixture":  # thousands of backward passes
                assert dict(way.planned(found, steps).held) == held(way.make, cell, xs), (way.name, steps)


BIG: dict[str, Callable[[], nn.Module]] = {  # what is alive at once is worth planning from some kilobytes on
    "RNN": lambda: torch_cell(nn.RNNCell, 32),
    "GRU": lambda: torch_cell(nn.GRUCell, 24),
    "LSTM": lambda: torch_cell(nn.LSTMCell, 16),
    "layers": lambda: seeded(rtrl.cells.from_torch(nn.LSTM(3, 10, num_layers=2)), 0),
    "no analytic step": lambda: seeded(PlainRNN(3, 24), 0),
    "mixture": lambda: mixture(d_model=8),
}


WAYS = [BASELINES[0], TRUNCATED[0], TRUNCATED[2], *BLOCKS, block(16, 8)]


@pytest.mark.parametrize(("size", "steps"), [(1, 9), (2, 17)])
@pytest.mark.parametrize("kind", [kind for kind in BIG if kind != "mixture"])
def test_what_is_alive_at_once_is_planned_within_a_tenth(kind: str, size: int, steps: int) -> None:
    cell = BIG[kind]()
    xs = inputs(cell, steps, size)
    found = profiled(cell, xs)
    for way in (*TRUNCATED, *WAYS) if (kind, size) == ("GRU", 1) else WAYS:
        expect_bytes(way, cell, xs, found)


@pytest.mark.parametrize(
    ("size", "steps", "way"),
    [
        (1, 9, BASELINES[0]), (2, 6, TRUNCATED[3]), (1, 9, block(1)), (1, 9, block(3, 2)),
        (2, 17, block(3, 2)), (2, 9, block(3, 7, lazy=False)), (2, 12, block(7, 64)), (1, 20, block(16, 8)),
    ],
    ids=lambda value: value.name if isinstance(value, Way) else str(value),
)  # fmt: skip
def test_what_a_mixture_has_alive_at_once_is_planned_within_a_tenth(size: int, steps: int, way: Way) -> None:
    cell = BIG["mixture"]()
    expect_bytes(way, cell, inputs(cell, steps, size))


@pytest.mark.parametrize("kind", [kind for kind in BIG if kind != "mixture"])
def test_textbook_rtrl_is_alive_at_once_as_planned(kind: str) -> None:
    cell = BIG[kind]()
    expect_bytes(BASELINES[1], cell, inputs(cell, 3, 2))


@pytest.mark.parametrize("steps", [6, 8, 20])
@pytest.mark.parametrize("least", [1, 2**13, 2**14])
def test_memory_kept_for_the_next_block_is_planned(least: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large states, at a size where it is kept for no block, for whole ones, or for the rest of a run, too."""
    monkeypatch.setattr(buffers, "_LEAST_BYTES", least)
    cell = torch_cell(nn.GRUCell, 8)
    xs = inputs(cell, steps, 2)
    found = profiled(cell, xs)
    kept = [block(m) for m in (1, 6, 12)]
    for way in kept:
        expect_bytes(way, cell, xs, found)
    largest = block_bytes.reach(found, min(steps, 12), 9, 8)
    assert any(way.planned(found, steps).held["scratch"] for way in kept) == (least <= largest)


def test_bytes_alive_are_those_the_allocator_gives() -> None:
    """What the plan is held against, held against PyTorch's own account."""
    cell, xs = torch_cell(nn.GRUCell, 24).float(), inputs(torch_cell(nn.GRUCell), 20, 2).float()

    def run() -> None:
        learner = rtrl.BlockRTRL(cell, 2, block=8)
        for x in xs:
            learner.backward(learner.step(x).square().sum())
        learner.sync()
        for parameter in cell.parameters():
            parameter.grad = None

    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        run()
    now = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak_of(run) == pytest.approx(peak, rel=0.01)


# ------------------------------------------------------------------ T*


CROSSING: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: torch_cell(nn.GRUCell),
    "layers": lambda: seeded(rtrl.cells.from_torch(nn.LSTM(3, 3, num_layers=2)), 0),
    "mixture": lambda: mixture(d_model=2, n_slots=3, n_experts=3, topk=1, read_slots=2),
}


@pytest.mark.parametrize("kind", CROSSING)
def test_bptt_really_holds_more_beyond_the_crossover_and_not_before(kind: str) -> None:
    """To the step, on runs of as many steps: of both learners, what they hold is measured."""
    cell = CROSSING[kind]()
    found = rtrl.plan(cell, inputs(cell, 1, 2)[0], steps=10, blocks=[6], windows=[2])
    (row,) = [row for row in found.rows if row.method == "BlockRTRL"]
    last = found.crossover_steps
    assert last == row.crossover_steps
    assert 20 < last < 1_000
    for steps, more in ((last, False), (last + 1, True)):
        xs = inputs(cell, steps, 2)
        mine, theirs = (sum(held(make, cell, xs).values()) for make in (block(6, 2).make, BPTT))
        assert (theirs > mine) == more, (steps, theirs, mine)


def test_bptt_really_needs_more_beyond_the_crossover_of_peaks() -> None:
    cell = torch_cell(nn.GRUCell)
    found = rtrl.plan(cell, inputs(cell, 1, 2)[0], steps=1_000, blocks=[6])
    (row,) = [row for row in found.rows if row.method == "BlockRTRL"]
    last = row.crossover_peak_steps
    assert last is not None and 10 < last < 1_000
    for steps, more in ((round(0.8 * last), False), (round(1.25 * last), True)):
        xs = inputs(cell, steps, 2)
        assert (watched(BPTT, cell, xs).peak > watched(block(6).make, cell, xs).peak) == more


# ------------------------------------------------------------------ wrong formulas


def nothing(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula that leaves out what a call of it gives."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = formula(*args, **kwargs)
        return tuple(0 for _ in found) if isinstance(found, tuple) else 0

    return wrong


Check = Callable[[Way, nn.Module, Tensor, Profile], None]
FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], Check, Way, str]] = {
    "bytes without the influence": (block_bytes, "influence_of", nothing, expect_bytes, block(3), "GRU"),
    "bytes without the tree": (block_bytes, "tree", nothing, expect_bytes, block(3), "mixture"),
    "a closing that needs nothing": (block_peak, "closing", nothing, expect_bytes, block(16), "GRU"),
    "a closing without its sweep": (block_peak, "_sweeping", nothing, expect_bytes, block(16), "RNN"),
    "BPTT without its graph": (Series, "__call__", lambda formula: lambda *_: 0, expect_bytes, BASELINES[0], "GRU"),
    "a window one step too short": (others, "_moments", lambda f: lambda p, t, k, s: f(p, t, k - 1, s),
                                    expect_bytes, truncated(4, True), "GRU"),
    "multiply-adds without the sweep": (block_macs, "sweep", nothing, expect_counts, block(3), "GRU"),
    "births counted once a block": (block_macs, "births", lambda f: lambda p, m, e: f(p, 1, e), expect_counts,
                                    block(3), "GRU"),
    "checks forgotten": (block_macs, "checks", lambda f: lambda *_: {}, expect_counts, block(3), "GRU"),
    "sleepers not paid": (dormant.Sleepers, "_pay", nothing, expect_counts, block(3), "mixture"),
    "sleepers not moved": (dormant.Sleepers, "_advance", nothing, expect_counts, block(3), "mixture"),
    "no padding": (block_macs, "padded", lambda f: lambda s, n: sum(s.uses), expect_counts, block(7), "mixture"),
    "passes that do not grow": (linear, "_passes", lambda f: lambda n: 1, expect_counts, block(3), "GRU"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_formula_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, check, way, kind = FAULTS[fault]
    cell = (BIG if check is expect_bytes else CELLS)[kind]()
    xs = inputs(cell, 9 if kind == "mixture" else 20, 2)
    found = profiled(cell, xs)
    check(way, cell, xs, found)  # as it is, it holds
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(AssertionError):
        check(way, cell, xs, found)


def test_a_textbook_influence_counted_three_times_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its peak it is there four times."""
    cell = torch_cell(nn.GRUCell, 24)
    xs, way = inputs(cell, 3, 2), BASELINES[1]
    planned = textbook.dense_rtrl(profile(cell, list(xs), 2), 3)
    less = replace(planned, peak_bytes=planned.peak_bytes - planned.held["influence"])
    monkeypatch.setattr(textbook, "dense_rtrl", lambda *_: less)
    with pytest.raises(AssertionError):
        expect_bytes(Way("less", way.make, lambda *_: less), cell, xs)
