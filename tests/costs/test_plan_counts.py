"""Planned multiply-adds against counted ones: equal wherever the plan calls itself exact."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cost_cases import (
    BASELINES,
    BLOCKS,
    DENSE,
    SPARSE,
    TRUNCATED,
    block,
    counted,
    expect_counts,
    inputs,
    mixture,
    profiled,
    torch_cell,
)
from torch import nn

import rtrl
from rtrl._engine import untapped
from rtrl.costs import block_rtrl as block_rtrl_module
from rtrl.costs.block_rtrl import block_rtrl
from rtrl.costs.profile import profile

CELLS = DENSE | SPARSE


@pytest.mark.parametrize("kind", CELLS)
def test_baselines_are_counted_exactly(kind: str) -> None:
    """Each step of textbook RTRL is counted as its first one; of a mixture it takes hundreds of backward passes."""
    few = [BASELINES[0], TRUNCATED[3]]
    textbook = [] if kind == "stack of mixtures" else BASELINES[1:2]
    for steps, ways in ((2, textbook), (6, [*few, *TRUNCATED[:3]] if kind in ("LSTM", "mixture") else few)):
        cell = CELLS[kind]()
        xs = inputs(cell, steps, 2)
        found = profiled(cell, xs)
        for way in ways:
            expect_counts(way, cell, xs, found)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_short_and_longer_runs_are_counted_exactly(steps: int) -> None:
    cell = torch_cell(nn.GRUCell)
    xs = inputs(cell, steps, 2)
    found = profiled(cell, xs)
    for way in (*BASELINES, *BLOCKS):
        expect_counts(way, cell, xs, found)


@pytest.mark.parametrize("kind", CELLS)
def test_blocks_are_counted_exactly(kind: str) -> None:
    every = BLOCKS if kind in ("LSTM", "mixture") else [BLOCKS[1]] if "mixture" in kind else [BLOCKS[1], BLOCKS[3]]
    for size, steps, ways in ((1, 2, BLOCKS[1:2]), (3, 9, every)):
        cell = CELLS[kind]()
        xs = inputs(cell, steps, size)
        found = profiled(cell, xs)
        for way in ways:
            expect_counts(way, cell, xs, found)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "no analytic step", "parameters no tap covers", "mixture"])
def test_blocks_in_pieces_are_counted_exactly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untapped, "_CHUNK", 60)
    cell = CELLS[kind]()
    expect_counts(block(7), cell, inputs(cell, 16, 2))


def test_a_state_too_large_for_a_scan_is_counted_exactly() -> None:
    cell = torch_cell(nn.GRUCell, hidden=66)
    expect_counts(block(5), cell, inputs(cell, 11, 1))


@pytest.mark.parametrize("kind", ["GRU", "mixture"])
def test_a_stream_goes_on_as_it_went(kind: str) -> None:
    """A dense cell is exact for runs of any length; the stream of one that routes is repeated, and marked."""
    cell = CELLS[kind]()
    xs = inputs(cell, 40, 2)
    short = block_rtrl(profile(cell, list(xs[:20]), 2), 40, 4, 4)
    count = counted(lambda cell, size: rtrl.BlockRTRL(cell, size, block=4, window=4), cell, xs)
    assert short.estimated == (kind == "mixture")
    assert short.macs == count if kind == "GRU" else abs(short.macs - count) < 0.1 * count


def test_the_end_of_a_long_run_costs_what_the_middle_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going through fewer blocks one by one changes little."""
    cell = mixture()
    found = profile(cell, list(inputs(cell, 24, 2)), 2)
    every = block_rtrl(found, 240, 4, 4)
    monkeypatch.setattr(block_rtrl_module, "MOST_BLOCKS", 20)
    few = block_rtrl(found, 240, 4, 4)
    assert abs(few.macs - every.macs) < 0.05 * every.macs


def test_choices_drawn_at_random_cost_what_random_choices_cost() -> None:
    """Planned from one step, against a run whose routing is laid down at random."""
    cell, size, steps = mixture(n_experts=12), 2, 42
    xs = inputs(cell, steps, size)
    planned = block_rtrl(profile(cell, [xs[0]], size), steps, 3, 8)
    generator = torch.Generator().manual_seed(9)

    def draw(of: int, count: int) -> torch.Tensor:
        return torch.rand(size, of, generator=generator).argsort(dim=1)[:, :count]

    def make(cell: nn.Module, size: int) -> Any:
        learner = rtrl.BlockRTRL(cell, size, block=3, window=8)
        step = learner.step

        def forced(x: torch.Tensor) -> Any:
            reads = draw(5, 3)
            return step(x, replay=cell.choices(reads, reads[:, :1], draw(12, 2)))

        learner.step = forced  # type: ignore[method-assign]
        return learner

    count = counted(make, cell, xs)
    assert planned.estimated
    assert abs(planned.macs - count) < 0.1 * count


# ------------------------------------------------------------------ how the counts grow


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the last doubling."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def per_step(hidden: int, m: int, way: Callable[..., Any] = block_rtrl) -> float:
    cell = rtrl.cells.from_torch(nn.RNNCell(hidden, hidden))
    return float(way(profile(cell, [torch.zeros(1, hidden)], 1), 64 * hidden, m, 1).macs_per_step)


def test_textbook_rtrl_grows_with_the_fourth_power_and_blocks_with_the_third() -> None:
    """P = 2·H²: a step of block 1 takes H²·P, one of a block of H steps about 2·H·P + H³; of states too large for a
    scan."""
    sizes = [96, 192]
    textbook, blocked = ([per_step(h, m) for h, m in zip(sizes, many, strict=True)] for many in ([1, 1], sizes))
    assert 3.9 < exponent(sizes, textbook) < 4.05
    assert 2.9 < exponent(sizes, blocked) < 3.05
    hidden = sizes[-1]
    p = 2 * hidden * hidden + 2 * hidden
    assert textbook[-1] == pytest.approx(hidden * hidden * p, rel=0.05)
    assert blocked[-1] == pytest.approx(2 * hidden * p + hidden**3, rel=0.1)


def test_bptt_does_not_grow_a_step_and_textbook_rtrl_does_not_either() -> None:
    cell = torch_cell(nn.GRUCell)
    found = profile(cell, list(inputs(cell, 1, 2)), 2)
    for way in BASELINES:
        early, late = (way.planned(found, steps).macs_per_step for steps in (1_000, 100_000))
        assert late == pytest.approx(early, rel=0.01), way.name
