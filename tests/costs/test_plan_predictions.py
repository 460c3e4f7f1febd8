"""Predictions against real runs: multiply-adds within 5 %, bytes held and alive at once within 10 %.

The runs are longer than those that a plan measures, or their blocks are, or their parameters are taken to be too large
to be measured; and planted faults show that each tolerance can fail.
"""

import math
from collections.abc import Callable
from dataclasses import replace
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
from rtrl._engine import buffers
from rtrl.costs import block_rtrl as blocks
from rtrl.costs import moves, others
from rtrl.costs import profile as profiles
from rtrl.costs.block_rtrl import block_rtrl
from rtrl.costs.profile import Profile
from rtrl.learners import BPTT
from rtrl.profiling.live_bytes import peak_of
from rtrl.profiling.macs import MacCounter

STEPS = 24  # BPTT is measured on 4 steps, TBPTT on 4 of its horizon, a learner in blocks on two of them


# ------------------------------------------------------------------ longer runs


@pytest.mark.parametrize("kind", DENSE)
def test_longer_runs_of_dense_cells(kind: str) -> None:
    cell = DENSE[kind]()
    xs = inputs(cell, STEPS, 2)
    found = profiled(cell, xs)
    for way in (FULL, TRUNCATED[2], block(3), block(5)):
        expect(way, cell, xs, found)
    expect(TEXTBOOK, cell, xs[:4], found)


@pytest.mark.parametrize("kind", ["GRU", "no analytic step"])
def test_longer_runs_of_truncated_bptt(kind: str) -> None:
    cell = DENSE[kind]()
    xs = inputs(cell, 16, 2)
    found = profiled(cell, xs)
    for way in TRUNCATED:
        expect(way, cell, xs, found)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_short_runs(steps: int) -> None:
    cell = torch_cell(nn.GRUCell)
    xs = inputs(cell, steps, 2)
    found = profiled(cell, xs)
    for way in (FULL, TEXTBOOK, *TRUNCATED[1:3], block(1), block(3), block(7)):
        expect(way, cell, xs, found)


@pytest.mark.parametrize("kind", [kind for kind in BIG if kind != "mixture"])
def test_cells_of_some_kilobytes(kind: str) -> None:
    """Where what is alive at once is more than a few tensors."""
    cell = BIG[kind]()
    xs = inputs(cell, 40, 1)
    found = profiled(cell, xs)
    for way in (FULL, truncated(13, False), block(1), block(13)):
        expect(way, cell, xs, found)


@pytest.mark.parametrize(
    ("kind", "steps", "size", "way"),
    [
        ("mixture", 26, 1, block(1, 4)),
        ("mixture", 36, 2, block(4, 4)),
        ("mixture", 30, 1, block(3, 7, lazy=False)),
        ("mixture with its router", 36, 1, block(4, 2)),
        ("stack of mixtures", 29, 1, block(4, 16)),
        ("rows and slices in x", 60, 3, block(4, 3)),
        ("mixture", 20, 2, FULL),
        ("mixture", 14, 1, TRUNCATED[3]),
        ("mixture", 5, 1, TEXTBOOK),
    ],
    ids=lambda value: value.name if isinstance(value, Way) else str(value),
)
def test_longer_runs_of_cells_that_route(kind: str, steps: int, size: int, way: Way) -> None:
    """By a stream that covers the run: of its blocks the first ones are measured, and what all touch is counted."""
    cell = SPARSE[kind]()
    expect(way, cell, inputs(cell, steps, size))


def test_a_mixture_of_some_kilobytes() -> None:
    cell = BIG["mixture"]()
    expect(block(3, 2), cell, inputs(cell, 36, 1))


def test_a_stream_goes_on_as_it_went() -> None:
    """A dense cell is known from one step; the stream of one that routes is repeated, and marked."""
    for kind, estimated in (("GRU", False), ("mixture", True)):
        cell = (DENSE | SPARSE)[kind]()
        xs = inputs(cell, 34, 1)
        choice = block_rtrl(profiled(cell, xs[:20]), 34, 4, 4)
        assert choice.estimated == estimated
        assert abs(off(choice, really(block(4, 4).make, cell, xs))["macs"]) < 2 * COUNTS


def test_choices_drawn_at_random_cost_what_random_choices_cost() -> None:
    """Planned from one step, against a run whose routing is forced at random."""
    cell, size, steps = mixture(n_experts=12), 2, 34
    xs = inputs(cell, steps, size)
    planned = block_rtrl(Profile(cell, [xs[0]], size), steps, 3, 8)
    generator = torch.Generator().manual_seed(9)

    def draw(of: int, count: int) -> Tensor:
        return torch.rand(size, of, generator=generator).argsort(dim=1)[:, :count]

    learner = rtrl.BlockRTRL(cell, size, block=3, window=8)
    with MacCounter() as counter:
        for x in xs:
            reads = draw(5, 3)
            learner.backward(loss(learner.step(x, replay=cell.choices(reads, reads[:, :1], draw(12, 2)))))
        learner.sync()
    assert planned.estimated
    assert abs(planned.macs - counter.macs) < 0.1 * counter.macs


# ------------------------------------------------------------------ longer blocks, larger parameters


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "no analytic step"])
def test_blocks_that_are_extrapolated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From blocks of 4 and 8 steps, of a state too large for a scan: at lengths between them, and up to twice H."""
    monkeypatch.setattr(blocks, "MOST_STEPS", 64)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "RNN": lambda: torch_cell(nn.RNNCell, 66),
        "GRU": lambda: torch_cell(nn.GRUCell, 66),
        "LSTM": lambda: torch_cell(nn.LSTMCell, 34),
        "no analytic step": lambda: seeded(PlainRNN(3, 66), 0),
    }
    cell = kinds[kind]()
    xs = inputs(cell, 150, 1)
    found = profiled(cell, xs[:1])
    for m in (33, 66):
        expect(block(m), cell, xs[: 2 * m + 18], found)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "no analytic step"])
def test_parameters_that_are_too_large(kind: str) -> None:
    """What most of the parameters add is computed from their sizes, and the choice says so."""
    cell = {
        "RNN": lambda: torch_cell(nn.RNNCell, 66),
        "GRU": lambda: torch_cell(nn.GRUCell, 66),
        "no analytic step": lambda: seeded(PlainRNN(3, 66), 0),
    }[kind]()
    xs = inputs(cell, 60, 1)
    found = Profile(cell, list(xs), 1, measured_macs=2**21)
    assert found.frozen and len(found.frozen) < len(found.sizes)
    assert block(13).planned(found, 60).computed
    for m, counts in ((13, COUNTS), (66, 0.15)):  # in the second the checks of the only block weigh much
        errors = off(block(m).planned(found, 60), really(block(m).make, cell, xs))
        assert abs(errors["macs"]) < counts and abs(errors["held"]) < BYTES, (m, errors)
        if kind != "no analytic step":  # whose weight is used transposed, which takes its influence twice
            assert abs(errors["peak"]) < BYTES, (m, errors)


def test_slices_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from rows and slices alone, within 20 %; and without counting them, it is not."""
    cell = mixture(d_model=8, n_slots=4, n_experts=8)
    monkeypatch.setattr(profiles, "MEASURED_ROUTING_MACS", 2**17)
    xs = inputs(cell, 32, 1)
    real = really(block(4, 8).make, cell, xs)
    found = profiled(cell, xs)
    assert "expert_up" in found.frozen
    errors = off(block_rtrl(found, 32, 4, 8), real)
    assert abs(errors["macs"]) < 0.2 and abs(errors["held"]) < BYTES, errors
    monkeypatch.setattr(moves.Moves, "_slices", lambda *_: 0)
    assert off(block_rtrl(found, 32, 4, 8), real)["macs"] < -0.3


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("least", [1, 2**14])
def test_memory_kept_for_the_next_block(least: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large states, at a size where it is kept for no block, or for all."""
    monkeypatch.setattr(buffers, "_LEAST_BYTES", least)
    cell = torch_cell(nn.GRUCell, 8)
    xs = inputs(cell, steps, 2)
    for most in (blocks.MOST_STEPS, 20):
        monkeypatch.setattr(blocks, "MOST_STEPS", most)
        found = profiled(cell, xs)
        expect(block(6), cell, xs, found)
        assert (block(6).planned(found, steps).held["scratch"] > 0) == (least == 1)


def test_textbook_rtrl_that_is_too_large_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "MOST_ROWS", 0)
    for kind in ("RNN", "LSTM", "layers"):
        cell = BIG[kind]()
        xs = inputs(cell, 4, 1)
        found = profiled(cell, xs)
        assert TEXTBOOK.planned(found, 4).computed
        expect(TEXTBOOK, cell, xs, found)


# ------------------------------------------------------------------ how costs grow


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the last doubling."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def per_step(hidden: int, m: int) -> float:
    cell = rtrl.cells.from_torch(nn.RNNCell(hidden, hidden))
    return block_rtrl(Profile(cell, [torch.zeros(1, hidden)], 1), 64 * hidden, m, 1).macs_per_step


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


# ------------------------------------------------------------------ T*


CROSSING: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: torch_cell(nn.GRUCell),
    "layers": lambda: seeded(rtrl.cells.from_torch(nn.LSTM(3, 3, num_layers=2)), 0),
    "mixture": lambda: mixture(d_model=2, n_slots=3, n_experts=3, topk=1, read_slots=2),
}


@pytest.mark.parametrize("kind", CROSSING)
def test_bptt_really_holds_more_beyond_the_crossover_and_not_before(kind: str) -> None:
    """On runs a tenth shorter and a tenth longer: of both learners, what they hold is measured."""
    cell = CROSSING[kind]()
    found = rtrl.plan(cell, inputs(cell, 1, 2)[0], steps=10, blocks=[6], windows=[2], horizons=[])
    (row,) = [row for row in found.rows if row.method == "BlockRTRL"]
    last = found.crossover_steps
    assert last == row.crossover_steps
    assert last is not None and 20 < last < 1_000
    for steps, more in ((round((1 - BYTES) * last), False), (round((1 + BYTES) * last), True)):
        xs = inputs(cell, steps, 2)
        blocked, unrolled = (sum(held(make, cell, xs).values()) for make in (block(6, 2).make, BPTT))
        assert (unrolled > blocked) == more, (steps, unrolled, blocked)


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
        learner = rtrl.BlockRTRL(cell, 2, block=8)
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


def spent(monkeypatch: pytest.MonkeyPatch, cell: nn.Module, measure: Callable[..., Any]) -> tuple[int, float]:
    """Steps that a plan of a long run measures, and their multiply-adds."""
    steps, macs = 0, 0.0

    def counted(self: Profile, kind: type, count: int, *rest: Any) -> Any:
        nonlocal steps, macs
        found = measure(self, kind, count, *rest)
        steps, macs = steps + count, macs + found.macs[-1]
        return found

    monkeypatch.setattr(Profile, "_measure", counted)
    rtrl.plan(cell, steps=100_000)
    return steps, macs


def test_planning_for_a_gru_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps that are run and in multiply-adds, which do not depend on how busy the machine is: a few seconds."""
    cell = rtrl.cells.from_torch(nn.GRUCell(128, 128), nn.Linear(128, 128))
    steps, macs = spent(monkeypatch, cell, Profile._measure)
    assert 100 < steps < 1_000 and 1e9 < macs < 6e10


def test_planning_for_the_mixture_of_the_speed_claims_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps alone, not run but as if, of which each takes some 20 ms."""
    parts = dict.fromkeys(("influence", "tree", "block", "gradient", "steps", "state"), 1)

    def nothing(self: Profile, kind: type, count: int, *rest: Any) -> profiles.Run:
        return profiles.Run(list(range(count + 1)), [parts] * (count + 1), [1] * (count + 1))

    steps, _ = spent(monkeypatch, rtrl.RecurrentMoE(64, 64, d_model=64, n_slots=8, n_experts=16, topk=2), nothing)
    assert 100 < steps < 400


# ------------------------------------------------------------------ planted faults


def without(what: str) -> Callable[[Any], Any]:
    """Runs that measure nothing of one kind."""

    def wrong(measure: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            found = measure(*args)
            values = getattr(found, what)
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


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], Way, str, int]] = {
    "no multiply-adds": (Profile, "_measure", without("macs"), block(3), "GRU", 20),
    "nothing held": (Profile, "_measure", without("held"), block(3), "GRU", 20),
    "no peak": (Profile, "_measure", without("peaks"), block(3), "GRU", 20),
    "BPTT that does not grow": (others, "line", flat, FULL, "GRU", 20),
    "BPTT that grows with the square": (others, "line", squared, FULL, "GRU", 20),
    "BPTT without its graph": (Profile, "graph_bytes", lambda measure: lambda *_: 0, FULL, "GRU", 40),
    "a horizon that costs nothing": (others, "line", flat, truncated(9, True), "GRU", 16),
    "blocks that cost as much as shorter ones": (blocks, "line", flat, block(16), "GRU", 60),
    "blocks that cost the square of shorter ones": (blocks, "line", squared, block(16), "GRU", 60),
    "two blocks of which one counts": (blocks, "_few", lambda few: lambda *_: 1, block(3), "GRU", 20),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, way, kind, steps = FAULTS[fault]
    monkeypatch.setattr(blocks, "MOST_STEPS", 40 if steps == 60 else blocks.MOST_STEPS)
    cell = BIG[kind]()
    xs = inputs(cell, steps, 1)
    real = really(way.make, cell, xs)

    def errors() -> dict[str, float]:
        return off(way.planned(profiled(cell, xs), steps), real)

    limits = {"macs": COUNTS, "held": BYTES, "peak": BYTES}
    sound = errors()
    assert all(abs(sound[what]) <= limit for what, limit in limits.items()), sound
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    broken = errors()
    assert any(abs(broken[what]) > limit for what, limit in limits.items()), broken
