"""The claims about learning: each measures at toy size, and its verdict follows from what was measured."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rtrl.learners import BPTT
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.verification.claim import Claim, Finding, Settings
from rtrl.verification.harness.training_runs import Course, Lesson, in_step, rounds_of, teach
from rtrl.verification.learning import anbn_learns, anbn_lr, byte_stream, haystack_bptt, haystack_long, haystack_rtrl

SETTINGS = Settings()
MODULES = (anbn_learns, anbn_lr, haystack_bptt, haystack_rtrl, haystack_long, byte_stream)

CASE = haystack_bptt.Case("GRU", 6, 2, (8, 10), 0.02, batch_size=4, rounds=2)
TRIAL = haystack_rtrl.Trial(CASE, 3, 4, True)
MIXTURE = haystack_rtrl.Trial(haystack_bptt.Case("RecurrentMoE", 4, 2, (8, 9), 3e-3, batch_size=2), 3, 2, False)
LONG = haystack_long.Sizes(gaps=(70, 72), batch_size=4, rounds=1, exam_steps=80)
ANBN = anbn_learns.Sizes(
    batch_size=4, rounds=2, twin_width=4, twin_updates=2, whole_width=4, whole_rounds=1, exam_steps=12
)
RATES = anbn_lr.Sizes(width=4, hidden=4, seeds=2, batch_size=4, rounds=2, every=1)
BYTES = byte_stream.Sizes(steps=120, hidden=2, block=8, points=6)


class Listener:
    """Keeps what a measurement told of its progress."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def __call__(self, piece: str, done: int, pieces: int) -> None:
        self.told.append((piece, done, pieces))


def check(finding: Finding, listener: Listener) -> Finding:
    """What every finding must have."""
    assert finding.result and finding.threshold
    assert (finding.verdict == "holds") == (finding.condition == "")
    assert finding.tables and finding.plots
    for grid in finding.tables:
        assert grid.rows and all(len(row) == len(grid.columns) for row in grid.rows)
    for plot in finding.plots:
        assert all(len(line.x) == len(line.y) > 0 and all(map(math.isfinite, line.y)) for line in plot.series)
    json.dumps(finding.data, allow_nan=False)
    assert len(listener.told) > 1 and all(0 <= done < pieces for _, done, pieces in listener.told)
    return finding


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_a_claim_says_how_it_is_measured(module: Any) -> None:
    assert isinstance(module.CLAIM, Claim)
    assert module.CLAIM.id == module.__name__.rsplit(".", 1)[-1].replace("_", "-")
    for part in ("Claim: ", "**How it is measured.**", "**Why that is fair.**", "**What it leaves open.**"):
        assert part in module.__doc__


# ---------------------------------------------------------------------- lessons


def gru_lesson(**changes: Any) -> tuple[torch.nn.Module, Lesson]:
    return haystack_bptt.make_cell(CASE, 0, torch.float64), replace(haystack_bptt.lesson_of(CASE, 0), **changes)


def test_a_round_is_one_episode_from_a_fresh_state() -> None:
    _, lesson = gru_lesson()
    rounds = rounds_of(lesson, torch.zeros(1, dtype=torch.float64))
    for _ in range(5):
        moments = next(rounds)
        assert [bool(m.fresh.all()) for m in moments] == [True] + [False] * (len(moments) - 1)
        assert bool(moments[-1].asked.all()) and moments[0].x.dtype == torch.float64


def test_a_lesson_ends_when_it_is_solved_and_not_before() -> None:
    cell, lesson = gru_lesson(rounds=7, check_every=2)
    whole = teach(copy.deepcopy(cell), lesson, BPTT, lambda n: None)
    assert whole.rounds == [2, 4, 6, 7] and not whole.solved and whole.most_bytes > 0
    early = teach(copy.deepcopy(cell), replace(lesson, until=0.0), BPTT, lambda n: None)
    assert early.rounds == [2] and early.solved and early.scores == whole.scores[:1]


def test_twins_differ_where_learners_do() -> None:
    cell, lesson = gru_lesson(rounds=3)
    same = in_step(cell, lesson, BPTT, lambda c, b: BlockRTRL(c, b, block=4), lambda n: None)
    other = in_step(
        cell, lesson, BPTT, lambda c, b: haystack_rtrl.learner_type("truncate")(c, b, block=4), lambda n: None
    )
    assert len(same) == len(other) == 3
    assert max(same) < 1e-12 and min(other) > 1e-6


# ---------------------------------------------------------------------- aⁿbⁿ


def test_anbn_learns_measures() -> None:
    told = Listener()
    finding = check(anbn_learns.measure_sizes(ANBN, SETTINGS, told), told)
    assert not finding.failures
    assert [(m["learner"], m["width"]) for m in finding.data["marks"]] == [("BPTT", 8), ("BlockRTRL", 8), ("BPTT", 4)]


def marks(*rows: tuple[str, int, float, float, float]) -> list[anbn_learns.Marks]:
    return [
        anbn_learns.Marks(name, 8, seed, trained, between, beyond, 9) for name, seed, trained, between, beyond in rows
    ]


@pytest.mark.parametrize(
    ("rows", "apart", "verdict", "words"),
    [
        ([("BPTT", 0, 1.0, 1.0, 1.0), ("BlockRTRL", 0, 1.0, 1.0, 1.0)], 0.0, "holds", ""),
        ([("BPTT", 0, 1.0, 0.5, 0.5), ("BlockRTRL", 0, 1.0, 0.5, 0.5)], 0.0, "holds when", "not to count"),
        ([("BPTT", 0, 1.0, 1.0, 1.0), ("BlockRTRL", 0, 0.9, 1.0, 1.0)], 0.0, "holds when", "behind"),
        ([("BPTT", 0, 0.7, 0.5, 0.5), ("BlockRTRL", 0, 0.7, 0.5, 0.5)], 0.0, "does not hold", "no run"),
        ([("BPTT", 0, 0.9, 0.5, 0.5), ("BlockRTRL", 0, 0.7, 0.5, 0.5)], 0.0, "does not hold", "BPTT learns"),
        ([("BPTT", 0, 1.0, 1.0, 1.0), ("BlockRTRL", 0, 1.0, 1.0, 1.0)], 1e-3, "does not hold", "BPTT learns"),
        ([("BPTT", 0, 1.0, 1.0, 1.0), ("BlockRTRL", 0, 1.0, 1.0, 1.0)], math.nan, "does not hold", "BPTT learns"),
    ],
)
def test_anbn_learns_judges(rows: Any, apart: float, verdict: str, words: str) -> None:
    finding = anbn_learns.judge(ANBN, marks(*rows), [apart])
    assert finding.verdict == verdict and words in finding.condition
    assert bool(finding.failures) == (apart != 0.0)


def test_anbn_lr_measures() -> None:
    told = Listener()
    finding = check(anbn_lr.measure_sizes(RATES, SETTINGS, told), told)
    assert len(finding.plots[0].series) == 2 + 4


def test_stacked_runs_are_those_of_cells_that_learn_alone() -> None:
    sizes = replace(RATES, rounds=4)
    cells = [anbn_lr.make_cell(4, 4, seed, torch.float64) for seed in (0, 1)]
    alone = [copy.deepcopy(cell) for cell in cells]
    rates = (2e-3, 1e-2)
    anbn_lr.stacked_runs(cells, rates, sizes, 5, lambda n: None)
    for cell, one, rate in zip(cells, alone, rates, strict=True):
        teach(one, Lesson(sizes.task, 4, rate, 4, clip=math.inf, seed=5), BPTT, lambda n: None)
        for p, q in zip(cell.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "words"),
    [
        ([1.0, 1.0], [0.48, 0.5], "holds", ""),
        ([1.0, 1.0], [0.7, 0.6], "holds when", "65.0 %"),
        ([1.0, 0.8], [0.5, 0.5], "holds when", "good one"),
        ([0.8, 0.8], [0.5, 0.5], "does not hold", "no seed converges"),
        ([1.0, 1.0], [0.9, 1.0], "does not hold", "no seed stalls"),
    ],
)
def test_anbn_lr_judges(low: list[float], high: list[float], verdict: str, words: str) -> None:
    finding = anbn_lr.judge(RATES, {2e-3: low, 1e-2: high})
    assert finding.verdict == verdict and words in finding.condition and not finding.failures


# ---------------------------------------------------------------------- short haystacks


def test_haystack_bptt_measures() -> None:
    told = Listener()
    finding = check(haystack_bptt.measure_cases((CASE,), SETTINGS, told, exam_steps=20), told)
    assert finding.verdict == "does not hold"  # nothing is learned in two rounds


@pytest.mark.parametrize(
    ("scores", "verdict"), [([1.0, 1.0], "holds"), ([1.0, 0.9], "holds when"), ([0.9, 0.2], "does not hold")]
)
def test_haystack_bptt_judges(scores: list[float], verdict: str) -> None:
    finding = haystack_bptt.judge([haystack_bptt.Result(CASE, score, Course()) for score in scores])
    assert finding.verdict == verdict and bool(finding.condition) == (verdict != "holds")


def test_haystack_rtrl_measures() -> None:
    told = Listener()
    finding = check(haystack_rtrl.measure_sizes(haystack_rtrl.Sizes((TRIAL, MIXTURE), 20), SETTINGS, told), told)
    assert not finding.failures
    assert max(max(t["apart"]) for t in finding.data["trials"]) < 1e-12


@pytest.mark.parametrize("broken", ["truncate", "off-by-one", "keep-over-resets"])
def test_a_broken_learner_fails_haystack_rtrl(broken: str) -> None:
    trial = replace(MIXTURE if broken == "off-by-one" else TRIAL, to_the_end=False)
    finding = haystack_rtrl.measure_sizes(haystack_rtrl.Sizes((trial,), 20, broken), SETTINGS, Listener())
    assert finding.failures and finding.verdict == "does not hold"


@pytest.mark.parametrize(
    ("apart", "accuracy", "verdict", "fails"),
    [
        ([1e-9], 1.0, "holds", False),
        ([1e-9], 0.24, "does not hold", False),
        ([1e-9, 2e-6], 1.0, "does not hold", True),
        ([math.nan], 1.0, "does not hold", True),
        ([], 1.0, "does not hold", True),
    ],
)
def test_haystack_rtrl_judges(apart: list[float], accuracy: float, verdict: str, fails: bool) -> None:
    finding = haystack_rtrl.judge([haystack_rtrl.Result(TRIAL, apart, accuracy, Course([1], [1.0]))])
    assert finding.verdict == verdict and bool(finding.failures) == fails


# ---------------------------------------------------------------------- long haystacks


def test_haystack_long_measures_at_equal_memory() -> None:
    told = Listener()
    finding = check(haystack_long.measure_sizes(LONG, SETTINGS, told), told)
    (pair,) = finding.data["pairs"]
    assert pair["horizon"] < 70 and not finding.failures
    # one more step would not have fitted in
    a_step = pair["tbptt_bytes"] / pair["horizon"]
    assert 0 <= pair["rtrl_bytes"] - pair["tbptt_bytes"] < 2 * a_step


def pair(rtrl: float, tbptt: float, **changes: int) -> haystack_long.Pair:
    rest = {"rtrl_bytes": 1000, "tbptt_bytes": 990, "horizon": 60, "rtrl_rounds": 10, "tbptt_rounds": 15, **changes}
    return haystack_long.Pair(0, rtrl, tbptt, **rest)


@pytest.mark.parametrize(
    ("pairs", "verdict", "words"),
    [
        ([pair(1.0, 0.5)], "holds when", "60 steps"),
        ([pair(1.0, 0.5), pair(0.5, 0.5)], "holds when", "1 of 2"),
        ([pair(0.5, 0.5)], "does not hold", "either"),
        ([pair(1.0, 0.8)], "does not hold", "learns something"),
        ([pair(1.0, 0.5, horizon=71)], "not measured", "reaches over"),
    ],
)
def test_haystack_long_judges(pairs: list[haystack_long.Pair], verdict: str, words: str) -> None:
    finding = haystack_long.judge(LONG, pairs)
    assert finding.verdict == verdict and words in finding.condition and not finding.failures


def test_more_bytes_than_allowed_are_a_failure() -> None:
    assert haystack_long.judge(LONG, [pair(1.0, 0.5, tbptt_bytes=1001)]).failures


# ---------------------------------------------------------------------- bytes


def test_byte_stream_measures() -> None:
    told = Listener()
    finding = check(byte_stream.measure_sizes(BYTES, SETTINGS, told), told)
    exact, *others = finding.data["runs"]
    assert not finding.failures and len(set(exact["held"])) == 1
    assert others[0]["horizon"] == BYTES.block
    assert all(max(r["held"]) <= max(exact["held"]) for r in others)


def stream_run(bits: float, held: list[int], horizon: int | None = None) -> byte_stream.Run:
    return byte_stream.Run(f"horizon {horizon}", bits, [bits], held, horizon, 1.0)


@pytest.mark.parametrize(
    ("bits", "held", "verdict", "fails"),
    [
        (3.0, [10, 10], "holds", False),
        (3.3, [10, 10], "holds when", False),
        (5.1, [10, 10], "does not hold", False),
        (3.0, [10, 12], "does not hold", True),
    ],
)
def test_byte_stream_judges(bits: float, held: list[int], verdict: str, fails: bool) -> None:
    finding = byte_stream.judge(BYTES, stream_run(bits, held), [stream_run(3.1, [9], 8), stream_run(4, [9], 16)], 5.0)
    assert finding.verdict == verdict and bool(finding.failures) == fails


def test_of_several_byte_streams_the_worst_counts() -> None:
    good, bad = (
        byte_stream.judge(BYTES, stream_run(3.0, held), [stream_run(3.1, [9], 8)], 5.0) for held in ([10, 10], [10, 12])
    )
    for order in ([good, bad], [bad, good]):
        whole = byte_stream.together(order)
        assert (whole.verdict, whole.condition, whole.failures) == ("does not hold", "memory grows", bad.failures)
        assert whole.result == f"{order[0].result}. {order[1].result}"
    assert byte_stream.together([good]).verdict == "holds"
    assert {sizes.steps for sizes in byte_stream.FULL} == {10**5, 10**6}
