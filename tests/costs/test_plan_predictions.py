"""Predictions against real runs: multiply-adds within 5 %, bytes held and alive at once within 10 %.

The runs are longer than those that a plan measures, or their blocks are; planted faults show that each tolerance can
fail.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.cost_cases import (
    BIG,
    BYTES,
    COUNTS,
    DENSE,
    FULL,
    SPARSE,
    TEXTBOOK,
    TRUNCATED,
    Real,
    Way,
    block,
    expect,
    held,
    inputs,
    loss,
    mixture,
    off,
    profiled,
    really,
    torch_cell,
    truncated,
)
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import rtrl
from rtrl._engine import buffers, unitwise
from rtrl.costs import block_rtrl as blocks
from rtrl.costs import others
from rtrl.costs.block_rtrl import block_rtrl
from rtrl.costs.profile import Profile
from rtrl.errors import ConfigError
from rtrl.learners import BPTT
from rtrl.profiling.live_bytes import peak_of
from rtrl.profiling.macs import MacCounter

# ------------------------------------------------------------------ longer runs


@pytest.mark.parametrize("kind", DENSE)
def test_longer_runs_of_dense_cells(kind: str) -> None:
    cell = DENSE[kind]()
    xs = inputs(cell, 20, 2)
    found = profiled(cell, xs)
    for way in (FULL, TRUNCATED[2], block(3)):
        expect(way, cell, xs, found)
    if kind != "parameters no tap covers":
        expect(TEXTBOOK, cell, xs[:3], found)


def test_longer_runs_of_truncated_bptt() -> None:
    cell = DENSE["GRU"]()
    xs = inputs(cell, 22, 2)
    found = profiled(cell, xs)
    for way in (*TRUNCATED[1:3], truncated(9, False), truncated(12, True)):
        expect(way, cell, xs, found)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_short_runs(steps: int) -> None:
    cell = torch_cell(nn.GRUCell)
    xs = inputs(cell, steps, 2)
    found = profiled(cell, xs)
    for way in (FULL, TEXTBOOK, *TRUNCATED[1:3], block(1), block(3), block(7)):
        expect(way, cell, xs, found)


@pytest.mark.parametrize(
    ("kind", "steps", "size", "way"),
    [
        ("mixture", 8, 1, block(1, 4)),
        ("mixture with its router", 8, 2, block(3, 7, lazy=False)),
        ("independent slots", 16, 2, block(4, 3)),
        ("rows and slices in x", 20, 2, block(4, 3)),
        ("rows and slices in x", 12, 2, FULL),
    ],
    ids=lambda value: value.name if isinstance(value, Way) else str(value),
)
def test_runs_of_cells_that_route(kind: str, steps: int, size: int, way: Way) -> None:
    """By a stream that covers the run."""
    cell = SPARSE[kind]()
    expect(way, cell, inputs(cell, steps, size))


def test_a_stream_goes_on_as_it_went() -> None:
    """A dense cell is known from one step; the stream of one that routes is repeated, and marked."""
    for kind, estimated in (("GRU", False), ("mixture", True)):
        cell = (DENSE | SPARSE)[kind]()
        xs = inputs(cell, 22, 1)
        choice = block_rtrl(profiled(cell, xs[:16]), 22, 4, 4)
        assert choice.estimated == estimated
        assert abs(off(choice, really(block(4, 4).make, cell, xs))["macs"]) < 2 * COUNTS


def test_choices_drawn_at_random_cost_what_random_choices_cost() -> None:
    """Planned from one step, against a run whose routing is forced at random."""
    cell, size, steps = mixture(n_experts=8), 2, 24
    xs = inputs(cell, steps, size)
    planned = block_rtrl(Profile(cell, [xs[0]], size), steps, 3, 8)
    generator = torch.Generator().manual_seed(9)

    def draw(of: int, count: int) -> Tensor:
        return torch.rand(size, of, generator=generator).argsort(dim=1)[:, :count]

    learner = rtrl.BlockRTRL(cell, size, block=3, window=8, audit="off")
    with MacCounter() as counter:
        for x in xs:
            reads = draw(5, 3)
            learner.backward(loss(learner.step(x, replay=cell.choices(reads, reads[:, :1], draw(8, 2)))))
        learner.sync()
    assert planned.estimated
    assert abs(planned.macs - counter.macs) < 0.1 * counter.macs


# ------------------------------------------------------------------ longer blocks, larger states


@pytest.mark.parametrize("kind", ["GRU", "no analytic step"])
def test_blocks_that_are_extrapolated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From blocks of at most 16 steps, of a state too large for a scan: up to twice H."""
    monkeypatch.setattr(blocks, "MOST_STEPS", 48)
    monkeypatch.setattr(unitwise, "_LEAST_NUMBERS", 10**9)  # what a plan counts
    cell = torch_cell(nn.GRUCell, 66) if kind == "GRU" else seeded(PlainRNN(3, 66), 0)
    xs = inputs(cell, 150, 1)
    found = profiled(cell, xs[:1])
    for m in (33, 66):
        assert block(m).planned(found, 2 * m + 18).extrapolated
        expect(block(m), cell, xs[: 2 * m + 18], found)


def test_for_units_that_interact_in_linear_maps_alone_a_plan_is_the_most() -> None:
    """A run without numbers cannot see how units interact, and counts the general way."""
    cell = seeded(PlainRNN(3, 64), 0)
    xs = inputs(cell, 17, 1)
    choice, real = block(17).planned(profiled(cell, xs[:1]), 17), really(block(17).make, cell, xs)
    assert real.macs < choice.macs
    assert real.peak < choice.peak_bytes
    assert sum(real.held.values()) == choice.held_bytes


@pytest.mark.nightly
def test_blocks_of_a_mixture_that_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """From blocks in which every slice is active."""
    monkeypatch.setattr(blocks, "MOST_LENGTH", 32)
    monkeypatch.setattr(blocks, "MOST_GIVEN_STEPS", 0)
    cell = BIG["mixture"]()
    xs = inputs(cell, 100, 1)
    found = profiled(cell, xs)
    assert block(48).planned(found, 100).extrapolated
    expect(block(48), cell, xs, found)


@pytest.mark.parametrize("least", [1, 2**14])
def test_memory_kept_for_the_next_block(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large states, at a size where it is kept for no block, or for all."""
    monkeypatch.setattr(buffers, "_LEAST_BYTES", least)
    cell = torch_cell(nn.GRUCell, 8)
    xs = inputs(cell, 20, 2)
    found = profiled(cell, xs)
    expect(block(6), cell, xs, found)
    assert (block(6).planned(found, 20).held["scratch"] > 0) == (least == 1)


def test_textbook_rtrl_with_more_rows_than_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "MOST_ROWS", 0)
    for kind in ("RNN", "LSTM"):
        cell = BIG[kind]()
        xs = inputs(cell, 4, 1)
        found = profiled(cell, xs)
        assert TEXTBOOK.planned(found, 4).extrapolated
        expect(TEXTBOOK, cell, xs, found)


class Looking(PlainRNN):
    """Reads numbers of its state, which a tensor without numbers does not have."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        torch.from_numpy(h.detach().numpy()).sum()
        return super().forward(x, h)


def test_a_cell_that_needs_numbers_is_run_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = seeded(Looking(3, 4), 0)
    xs = inputs(cell, 9, 1)
    found = profiled(cell, xs)
    for way in (FULL, block(3)):
        expect(way, cell, xs, found)
    monkeypatch.setattr("rtrl.costs.profile.MOST_NUMBERS", 10)
    with pytest.raises(ConfigError, match="Looking cannot be run on tensors without numbers"):
        block(3).planned(profiled(cell, xs), 9)


# ------------------------------------------------------------------ how costs grow


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the last doubling."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def per_step(hidden: int, m: int) -> float:
    cell = rtrl.cells.from_torch(nn.RNNCell(hidden, hidden))
    return block_rtrl(Profile(cell, [torch.zeros(1, hidden)], 1), 64 * hidden, m, 1, most=48).macs_per_step


def test_textbook_rtrl_grows_with_the_fourth_power_and_blocks_with_the_third() -> None:
    """P = 2·H²: a step of block 1 takes H²·P, one of a block of H steps about 2·H·P + H³."""
    sizes = [96, 192]
    textbook, blocked = ([per_step(h, m) for h, m in zip(sizes, many, strict=True)] for many in ([1, 1], sizes))
    assert 3.9 < exponent(sizes, textbook) < 4.05
    assert 2.9 < exponent(sizes, blocked) < 3.05
    hidden = sizes[-1]
    p = 2 * hidden * hidden + 2 * hidden
    assert textbook[-1] == pytest.approx(hidden * hidden * p, rel=0.05)
    assert blocked[-1] == pytest.approx(2 * hidden * p + hidden**3, rel=0.1)


def test_a_step_of_a_longer_run_costs_the_same() -> None:
    cell = torch_cell(nn.GRUCell)
    found = profiled(cell, inputs(cell, 1, 2))
    for way in (FULL, TEXTBOOK, *TRUNCATED, block(7)):
        early, late = (way.planned(found, steps).macs_per_step for steps in (1_000, 100_000))
        assert late == pytest.approx(early, rel=0.01), way.name
    held_bytes = [block(7).planned(found, steps).held_bytes for steps in (100, 100_000)]
    assert held_bytes[0] == held_bytes[1]


def test_a_state_of_any_size_can_be_planned() -> None:
    """An influence of 25 GiB, and nothing of it is allocated."""
    cell = rtrl.cells.from_torch(nn.GRUCell(8, 1024))
    (row,) = (row for row in rtrl.plan(cell, steps=1_000, blocks=[4], horizons=[2]).rows if row.method == "BlockRTRL")
    size = sum(p.numel() for p in cell.parameters())
    assert row.held["influence"] == pytest.approx(1024 * size * 4, rel=0.01)
    assert row.macs_per_step == pytest.approx(1024 * size * (1024 + 4) / 4, rel=0.1)


# ------------------------------------------------------------------ T*


CROSSING: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: torch_cell(nn.GRUCell),
    "layers": lambda: seeded(rtrl.cells.from_torch(nn.LSTM(3, 3, num_layers=2)), 0),
}


@pytest.mark.parametrize("kind", CROSSING)
def test_bptt_really_holds_more_beyond_the_crossover_and_not_before(kind: str) -> None:
    """To the step: of both learners, what they hold is measured."""
    cell = CROSSING[kind]()
    found = rtrl.plan(cell, inputs(cell, 1, 2)[0], steps=10, blocks=[6], windows=[2], horizons=[])
    (row,) = [row for row in found.rows if row.method == "BlockRTRL"]
    last = found.crossover_steps
    assert last == row.crossover_steps
    assert last is not None and 20 < last < 1_000
    blocked = sum(held(block(6, 2).make, cell, inputs(cell, 25, 2)).values())
    for steps, more in ((last, False), (last + 1, True)):
        assert (sum(held(BPTT, cell, inputs(cell, steps, 2)).values()) > blocked) == more, steps


def test_bptt_really_needs_more_beyond_the_crossover_of_peaks() -> None:
    cell = torch_cell(nn.GRUCell)
    found = rtrl.plan(cell, inputs(cell, 1, 2)[0], steps=1_000, blocks=[6], horizons=[])
    (row,) = [row for row in found.rows if row.method == "BlockRTRL"]
    last = row.crossover_peak_steps
    assert last is not None and 10 < last < 1_000
    for steps, more in ((round(0.8 * last), False), (round(1.25 * last), True)):
        xs = inputs(cell, steps, 2)
        assert (really(BPTT, cell, xs).peak > really(block(6).make, cell, xs).peak) == more


def test_bytes_alive_are_those_the_allocator_gives() -> None:
    """What the plan is held against, held against PyTorch's own account."""
    cell, xs = torch_cell(nn.GRUCell, 24).float(), inputs(torch_cell(nn.GRUCell), 20, 2).float()

    def run() -> None:
        learner = rtrl.BlockRTRL(cell, 2, block=8, audit="off")
        for x in xs:
            learner.backward(learner.step(x).square().sum())
        learner.sync()
        for parameter in cell.parameters():
            parameter.grad = None

    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
        run()
    now = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak_of(run) == pytest.approx(peak, rel=0.01)


# ------------------------------------------------------------------ what planning costs


def test_planning_for_a_gru_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps that are run, which do not depend on how busy the machine is: two seconds, mostly."""
    ran = list[int]()

    def counted(self: Profile, kind: type, steps: int, **options: Any) -> Any:
        ran.append(steps)
        return run(self, kind, steps, **options)

    run = Profile.run
    monkeypatch.setattr(Profile, "run", counted)
    cell = torch_cell(nn.GRUCell, 16)
    block_rtrl(Profile(cell, None, 1), 100_000, 4_096, 1)
    others.bptt(Profile(cell, None, 1), 100_000)
    assert 100 < sum(ran) < 500


# ------------------------------------------------------------------ planted faults


def without(what: str) -> Callable[[Any], Any]:
    """Runs that measure nothing of one kind."""

    def wrong(measure: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            found = measure(*args)
            values = getattr(found, what)
            if isinstance(values, dict):
                return replace(found, **{what: dict.fromkeys(values, 0)})
            zeros = [dict.fromkeys(value, 0) if isinstance(value, dict) else 0 for value in values]
            return replace(found, **{what: zeros})

        return measured

    return wrong


def flat(line: Any) -> Any:
    """A line that does not rise beyond its second point."""
    return lambda first, second: lambda x: line(first, second)(min(x, second[0]))


def squared(line: Any) -> Any:
    """A parabola through the origin and the second point."""
    return lambda first, second: lambda x: round(second[1] * (x / second[0]) ** 2)


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], Way, int]] = {
    "no multiply-adds": (Profile, "_measured", without("macs"), block(3), 20),
    "nothing held": (Profile, "_measured", without("held"), block(3), 20),
    "no peak": (Profile, "_measured", without("peaks"), block(3), 20),
    "BPTT that does not grow": (others, "line", flat, FULL, 24),
    "BPTT that grows with the square": (others, "line", squared, FULL, 24),
    "a horizon that costs nothing": (others, "line", flat, truncated(12, True), 16),
    "blocks that cost as much as shorter ones": (blocks, "line", flat, block(33), 84),
    "blocks that cost the square of shorter ones": (blocks, "line", squared, block(33), 84),
    "a first block that stands for all": (blocks, "min", lambda least: lambda *many: 1 if 2 in many else least(*many),
                                          block(3), 20),
}  # fmt: skip


@cache
def run_really(name: str, steps: int) -> tuple[nn.Module, Tensor, Real]:
    """A GRU, a stream, and what a way to learn took on it."""
    cell = torch_cell(nn.GRUCell, 66 if steps > 60 else 12)
    xs = inputs(cell, steps, 1)
    (way,) = {way.name: way for *_, way, _ in FAULTS.values() if way.name == name}.values()
    return cell, xs, really(way.make, cell, xs)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, way, steps = FAULTS[fault]
    monkeypatch.setattr(blocks, "MOST_STEPS", 48 if steps > 60 else blocks.MOST_STEPS)
    cell, xs, real = run_really(way.name, steps)

    def errors() -> dict[str, float]:
        return off(way.planned(profiled(cell, xs), steps), real)

    limits = {"macs": COUNTS, "held": BYTES, "peak": BYTES}
    sound = errors()
    assert all(abs(sound[what]) <= limit for what, limit in limits.items()), sound
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name, min)), raising=False)
    broken = errors()
    assert any(abs(broken[what]) > limit for what, limit in limits.items()), broken
