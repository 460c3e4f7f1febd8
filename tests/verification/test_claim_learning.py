"""The claims about learning: each measures at toy size, and its verdict follows from what was measured."""

import copy
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from rtrl.learners import BPTT
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report import Finding, plain
from rtrl.verification import record, runner
from rtrl.verification.claim import Claim, Settings
from rtrl.verification.harness import training_runs
from rtrl.verification.harness.training_runs import History, TrainingConfig, episodes, train, train_in_lockstep
from rtrl.verification.learning import anbn_learns, anbn_lr, byte_stream, haystack_bptt, haystack_long, haystack_rtrl

MODULES = (anbn_learns, anbn_lr, haystack_bptt, haystack_rtrl, haystack_long, byte_stream)

CASE = haystack_bptt.Case("GRU", 6, 2, (8, 10), 0.02, batch_size=4, episodes=2)
TRIAL = haystack_rtrl.Trial(CASE, 3, 4, True)
MIXTURE = haystack_rtrl.Trial(haystack_bptt.Case("RecurrentMoE", 4, 2, (8, 9), 3e-3, batch_size=2), 3, 2, False)
LONG = haystack_long.Config(gaps=(70, 72), batch_size=4, episodes=1, evaluation_steps=80)
ANBN = anbn_learns.Config(
    batch_size=4, episodes=2, twin_width=4, twin_updates=2, whole_width=4, whole_episodes=1, evaluation_steps=12
)
RATES = anbn_lr.Config(width=4, hidden=4, seeds=2, batch_size=4, episodes=2, every=1)
BYTES = byte_stream.StreamConfig(steps=120, hidden=2, block=8, points=6)


def silent(n: int) -> None:
    return


def found(claim: Claim[Any, Any], config: Any) -> Finding:
    """The finding of a claim in small, with what every finding must have."""
    pieces: list[str] = []
    outcome = runner.measure_one(claim, Settings(progress=pieces.append), config)
    finding = outcome.finding
    assert finding.result and finding.threshold
    assert (finding.verdict == "holds") == (finding.condition == "")
    assert finding.tables and finding.plots
    for table in finding.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    for plot in finding.plots:
        assert all(len(line.x) == len(line.y) > 0 and all(map(math.isfinite, line.y)) for line in plot.series)
    json.dumps(plain(asdict(record.entry(outcome))), allow_nan=False)
    assert len(pieces) > 1 and all(pieces)
    return finding


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_a_claim_says_how_it_is_measured(module: Any) -> None:
    assert isinstance(module.measure, Claim)
    assert module.measure.id == module.__name__.rsplit(".", 1)[-1].replace("_", "-")
    for part in ("Claim: ", "**How it is measured.**", "**Why that is fair.**", "**What it leaves open.**"):
        assert part in module.measure.explanation


# ---------------------------------------------------------------------- training


def gru(**changes: Any) -> tuple[torch.nn.Module, TrainingConfig]:
    return haystack_bptt.make_cell(CASE, 0, torch.float64), replace(CASE.training(0), **changes)


def test_an_episode_begins_in_the_first_state() -> None:
    _, config = gru()
    endless = episodes(config, torch.zeros(1, dtype=torch.float64))
    for _ in range(5):
        steps = next(endless)
        assert [bool(step.is_first.all()) for step in steps] == [True] + [False] * (len(steps) - 1)
        assert bool(steps[-1].has_target.all()) and steps[0].x.dtype == torch.float64


def test_training_ends_when_the_task_is_solved_and_not_before() -> None:
    cell, config = gru(episodes=7, check_every=2)
    whole = train(copy.deepcopy(cell), config, BPTT, silent)
    assert list(whole.scores) == [2, 4, 6, 7] and not whole.solved and whole.most_bytes > 0
    assert whole.episodes == 7
    early = train(copy.deepcopy(cell), replace(config, until=0.0), BPTT, silent)
    assert early.solved and early.scores == {2: whole.scores[2]}


def test_twins_differ_where_learners_do() -> None:
    cell, config = gru(episodes=3)
    truncating = haystack_rtrl.learner_type("truncate")
    same = train_in_lockstep(cell, config, BPTT, lambda c, b: BlockRTRL(c, b, block=4), silent)
    other = train_in_lockstep(cell, config, BPTT, lambda c, b: truncating(c, b, block=4), silent)
    assert len(same) == len(other) == 3
    assert max(same) < 1e-12 and min(other) > 1e-6


@pytest.mark.parametrize("metered", [0, 3])
def test_episodes_are_unrolled_as_far_as_a_block_has_room(metered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks border neither on the steps that are taken one by one nor on episodes."""
    monkeypatch.setattr(training_runs, "_METERED", metered)
    cell, config = gru(episodes=3)
    apart = train_in_lockstep(cell, config, BPTT, lambda c, b: BlockRTRL(c, b, block=4), silent)
    assert len(apart) == 3 and max(apart) < 1e-12


# ---------------------------------------------------------------------- aⁿbⁿ


def test_anbn_learns_measures() -> None:
    finding = found(anbn_learns.measure, ANBN)
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
    runs = anbn_learns.Runs(config=ANBN, marks=marks(*rows), apart=[apart], curves={})
    judged = anbn_learns.verdict(runs)
    assert judged.name == verdict and words in judged.condition
    assert bool(runs.failures) == (apart != 0.0)


def test_anbn_lr_measures() -> None:
    finding = found(anbn_lr.measure, RATES)
    assert len(finding.plots[0].series) == 2 + 4


def test_stacked_runs_are_those_of_cells_that_learn_alone() -> None:
    config = replace(RATES, episodes=4)
    cells = [anbn_lr.make_cell(4, 4, seed, torch.float64) for seed in (0, 1)]
    alone = [copy.deepcopy(cell) for cell in cells]
    rates = (2e-3, 1e-2)
    anbn_lr.stacked_runs(cells, rates, config, 5, silent)
    for cell, one, rate in zip(cells, alone, rates, strict=True):
        train(one, TrainingConfig(config.task, 4, rate, 4, clip=math.inf, seed=5), BPTT, silent)
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
    judged = anbn_lr.judge(RATES, {2e-3: low, 1e-2: high})
    assert judged.name == verdict and words in judged.condition
    curves = {(rate, seed): [a] for rate, last in ((2e-3, low), (1e-2, high)) for seed, a in enumerate(last)}
    assert anbn_lr.verdict(anbn_lr.Accuracies(config=RATES, curves=curves)).name == verdict


# ---------------------------------------------------------------------- short haystacks


def test_haystack_bptt_measures() -> None:
    finding = found(haystack_bptt.measure, haystack_bptt.Config((CASE,), 20))
    assert finding.verdict == "does not hold"  # nothing is learned in two episodes


@pytest.mark.parametrize(
    ("scores", "verdict"), [([1.0, 1.0], "holds"), ([1.0, 0.9], "holds when"), ([0.9, 0.2], "does not hold")]
)
def test_haystack_bptt_judges(scores: list[float], verdict: str) -> None:
    results = [haystack_bptt.Result(CASE, 0, score, History()) for score in scores]
    judged = haystack_bptt.verdict(haystack_bptt.Results(results=results))
    assert judged.name == verdict and bool(judged.condition) == (verdict != "holds")


def test_haystack_rtrl_measures() -> None:
    finding = found(haystack_rtrl.measure, haystack_rtrl.Config((TRIAL, MIXTURE), 20))
    assert not finding.failures
    assert max(max(result["apart"]) for result in finding.data["results"]) < 1e-12


@pytest.mark.parametrize("broken", ["truncate", "off-by-one", "keep-over-resets"])
def test_a_broken_learner_fails_haystack_rtrl(broken: str) -> None:
    trial = replace(MIXTURE if broken == "off-by-one" else TRIAL, to_the_end=False)
    config = haystack_rtrl.Config((trial,), 20, broken)
    finding = runner.measure_one(haystack_rtrl.measure, Settings(), config).finding
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
    results = haystack_rtrl.Results(results=[haystack_rtrl.Result(TRIAL, apart, accuracy, History({1: 1.0}))])
    assert haystack_rtrl.measure.judge(results).name == verdict and bool(results.failures) == fails


# ---------------------------------------------------------------------- long haystacks


def test_haystack_long_measures_at_equal_memory() -> None:
    finding = found(haystack_long.measure, LONG)
    (pair,) = finding.data["pairs"]
    assert pair["horizon"] < 70 and not finding.failures
    # one more step would not have fitted in
    a_step = pair["tbptt_bytes"] / pair["horizon"]
    assert 0 <= pair["rtrl_bytes"] - pair["tbptt_bytes"] < 2 * a_step


def pair(rtrl: float, tbptt: float, **changes: int) -> haystack_long.Pair:
    rest = {"rtrl_bytes": 1000, "tbptt_bytes": 990, "horizon": 60, "rtrl_episodes": 10, "tbptt_episodes": 15, **changes}
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
    measured = haystack_long.Pairs(config=LONG, pairs=pairs, curves={})
    judged = haystack_long.verdict(measured)
    assert judged.name == verdict and words in judged.condition and not measured.failures


def test_more_bytes_than_allowed_are_a_failure() -> None:
    assert haystack_long.Pairs(config=LONG, pairs=[pair(1.0, 0.5, tbptt_bytes=1001)], curves={}).failures


# ---------------------------------------------------------------------- bytes


def test_byte_stream_measures() -> None:
    finding = found(byte_stream.measure, (BYTES,))
    (stream,) = finding.data["streams"]
    exact, others = stream["exact"], stream["others"]
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
    others = [stream_run(3.1, [9], 8), stream_run(4, [9], 16)]
    result = byte_stream.StreamResult(BYTES, stream_run(bits, held), others, 5.0)
    assert byte_stream.judge(result).name == verdict
    assert bool(byte_stream.Streams(streams=[result]).failures) == fails


def test_of_several_byte_streams_the_worst_counts() -> None:
    good, bad = (
        byte_stream.StreamResult(BYTES, stream_run(3.0, held), [stream_run(3.1, [9], 8)], 5.0)
        for held in ([10, 10], [10, 12])
    )
    for order in ([good, bad], [bad, good]):
        finding = byte_stream.measure.finding(byte_stream.Streams(streams=order))
        assert (finding.verdict, finding.condition) == ("does not hold", "memory grows")
        assert finding.failures == ["the bytes held grew by 2 over 120 steps"]
        alone = [byte_stream.measure.finding(byte_stream.Streams(streams=[result])).result for result in order]
        assert finding.result == f"{alone[0]}. {alone[1]}"
    assert byte_stream.measure.finding(byte_stream.Streams(streams=[good])).verdict == "holds"
    assert {config.steps for config in byte_stream.measure.full} == {10**5, 10**6}
