"""The claims about learning: each measures at toy size, and its verdict follows from what was measured."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

import oracles
from rtrl.learners import BPTT
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report import Finding, plain
from rtrl.tasks.haystack import Haystack
from rtrl.testing import check_cell
from rtrl.verification import record, runner
from rtrl.verification.breaks import planted
from rtrl.verification.claim import Claim, Settings
from rtrl.verification.harness import training_runs
from rtrl.verification.harness.training_runs import History, TrainingConfig, episodes, train, train_in_lockstep
from rtrl.verification.learning import (
    anbn_learns,
    anbn_lr,
    byte_stream,
    haystack_bptt,
    haystack_long,
    haystack_rtrl,
    parting,
)
from rtrl.verification.learning.counting_mixture import CountingMixture

MODULES = (anbn_learns, anbn_lr, haystack_bptt, haystack_rtrl, haystack_long, byte_stream)

CASE = haystack_bptt.Case("GRU", 6, 2, (8, 10), 0.02, batch_size=4, episodes=2)
TRIAL = haystack_rtrl.Trial(CASE, 3, 2, True, True)
LONG = haystack_long.Config(gap=32, batch_size=4, episodes=1, evaluation_steps=42)
ANBN = anbn_learns.Config(
    anbn_learns.SideBySide(4, 1, 1, (4,), 3, 2),
    (anbn_learns.Training(anbn_learns.LSTM, 2, 1, episodes=1, batch_size=2),),
    evaluation_steps=24,
    longest=2,
)
RATES = anbn_lr.Config(width=4, hidden=4, seeds=2, batch_size=4, episodes=2, every=1, control=1)
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
    cell, config = gru(episodes=3, check_every=2)
    whole = train(cell, config, BPTT, silent)
    assert list(whole.scores) == [2, 3] and not whole.solved and whole.most_bytes > 0
    assert whole.episodes == 3
    early = train(gru()[0], replace(config, until=0.0), BPTT, silent)
    assert early.solved and early.scores == {2: whole.scores[2]}


def test_twins_differ_where_learners_do() -> None:
    cell, config = gru(episodes=2)
    same = train_in_lockstep(cell, config, BPTT, lambda c, b: BlockRTRL(c, b, block=4), silent)
    with planted("truncate"):
        other = train_in_lockstep(cell, config, BPTT, lambda c, b: BlockRTRL(c, b, block=4, audit="off"), silent)
    assert len(same) == len(other) == 2
    assert max(same) < 1e-12 and min(other) > 1e-6


@pytest.mark.parametrize("metered", [0, 3])
def test_episodes_are_unrolled_as_far_as_a_block_has_room(metered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks border neither on the steps that are taken one by one nor on episodes."""
    monkeypatch.setattr(training_runs, "_METERED", metered)
    cell, config = gru(episodes=2)
    apart = train_in_lockstep(cell, config, BPTT, lambda c, b: BlockRTRL(c, b, block=4), silent)
    assert len(apart) == 2 and max(apart) < 1e-12


# ---------------------------------------------------------------------- aⁿbⁿ


def test_anbn_learns_measures() -> None:
    finding = found(anbn_learns.measure, ANBN)
    assert not finding.failures and finding.verdict == "not measured at the claimed size"
    assert [(m["cell"], m["learner"]) for m in finding.data["marks"]] == [("LSTM", "BPTT"), ("LSTM", "BlockRTRL")]
    assert [list(by_n) for by_n in finding.data["by_n"].values()] == [[1, 2]] * 2


def marks(*rows: tuple[str, int, str, float, float, float]) -> list[anbn_learns.Marks]:
    return [anbn_learns.Marks(cell, width, learner, 0, *scores, 9) for cell, width, learner, *scores in rows]


OURS = "RecurrentMoE"
LSTM = anbn_learns.LSTM


@pytest.mark.parametrize(
    ("rows", "apart", "verdict", "words"),
    [
        ([(OURS, 32, "BPTT", 1.0, 1.0, 1.0), (OURS, 32, "BlockRTRL", 1.0, 1.0, 1.0)], 0.0, "holds", ""),
        ([(OURS, 32, "BPTT", 1.0, 0.5, 0.5), (LSTM, 8, "BPTT", 1.0, 1.0, 1.0)], 0.0, "holds when", "LSTM 1 of 1"),
        ([(OURS, 32, "BPTT", 1.0, 1.0, 1.0), (OURS, 32, "BlockRTRL", 0.9, 1.0, 1.0)], 0.0, "holds when", "behind"),
        ([(OURS, 32, "BPTT", 0.7, 0.5, 0.5)], 0.0, "does not hold", "even on trained n"),
        ([(OURS, 8, "BPTT", 1.0, 1.0, 1.0)], 0.0, "not measured at the claimed size", ""),
        ([(OURS, 32, "BPTT", 1.0, 1.0, 1.0)], 1e-3, "does not hold", "updates of BPTT"),
        ([(OURS, 32, "BPTT", 1.0, 1.0, 1.0)], math.nan, "does not hold", "updates of BPTT"),
    ],
)
def test_anbn_learns_judges(rows: Any, apart: float, verdict: str, words: str) -> None:
    runs = anbn_learns.Runs(config=ANBN, beside=parting.Parting([apart], [0]), marks=marks(*rows))
    judged = anbn_learns.measure.judge(runs)
    assert judged.name == verdict and words in judged.condition
    assert bool(runs.failures) == (apart != 0.0)


@pytest.mark.parametrize(("before", "fails"), [(9e-13, False), (2e-12, True), (math.nan, True)])
def test_weights_may_part_only_where_a_choice_differs(before: float, fails: bool) -> None:
    parted = parting.Parting([1e-14, before, 0.1], [0, 0, 3])
    assert parted.first_flip == 3
    runs = anbn_learns.Runs(config=ANBN, beside=parting.Parting([0.0], [0]), parting=parted)
    assert bool(runs.failures) == fails
    (line,) = parting.parting_plot("", {"a": parted}).vertical_lines
    assert line.x == 3 and parting.Parting([0.1], [0]).before_flip == 0.1
    assert parting.Parting([1e-3], [0]).steepest > 1e11  # a wrong first update


@pytest.mark.parametrize("sizes", [{}, {"topk": 4, "read_slots": 4}])
def test_the_counting_mixture_keeps_to_what_it_declares(sizes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    cell = CountingMixture(2, 2, 3, **sizes, generator=generator, dtype=torch.float64)
    xs = torch.randn(11, 2, 2, generator=generator, dtype=torch.float64)
    reference = oracles.bptt(cell, xs, lambda t, y: y.square().sum())
    learner = BlockRTRL(cell, 2, block=3, window=2)
    for x in xs:
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    for name, p in cell.named_parameters():
        torch.testing.assert_close(p.grad, reference[name], rtol=1e-10, atol=1e-12)


@pytest.mark.nightly
def test_the_counting_mixture_passes_check_cell() -> None:
    cell = CountingMixture(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check_cell(cell, list(torch.randn(6, 2, 2, dtype=torch.float64)))


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
    at_size = anbn_lr.Accuracies(config=replace(RATES, width=32), curves=curves, apart={})
    assert anbn_lr.verdict(at_size).name == verdict
    smaller = anbn_lr.verdict(replace(at_size, config=RATES))
    assert smaller.name == "not measured at the claimed size" and words in smaller.condition


# ---------------------------------------------------------------------- short haystacks


@pytest.mark.parametrize(
    ("scores", "verdict"), [([1.0, 1.0], "holds"), ([1.0, 0.9], "holds when"), ([0.9, 0.2], "does not hold")]
)
def test_haystack_bptt_judges(scores: list[float], verdict: str) -> None:
    results = [haystack_bptt.Result(CASE, 0, score, History()) for score in scores]
    judged = haystack_bptt.verdict(haystack_bptt.Results(results=results))
    assert judged.name == verdict and bool(judged.condition) == (verdict != "holds")


def test_haystack_rtrl_measures() -> None:
    finding = found(haystack_rtrl.measure, haystack_rtrl.Config((TRIAL,), 20))
    assert not finding.failures
    (result,) = finding.data["results"]
    assert max(result["apart"]) < 1e-12 and result["cut_apart"] > 1e-6 and min(result["held"]) > 0
    assert result["accuracy"] is not None and result["cut_accuracy"] is not None


HAYSTACK = replace(TRIAL, case=replace(CASE, cell="RecurrentMoE", width=32))


@pytest.mark.parametrize(
    ("trial", "apart", "cut", "accuracy", "verdict", "fails"),
    [
        (HAYSTACK, [1e-9], 1e-2, 1.0, "holds", False),
        (HAYSTACK, [1e-9], 1e-2, 0.24, "does not hold", False),
        (TRIAL, [1e-9], 1e-2, 1.0, "not measured at the claimed size", False),
        (HAYSTACK, [1e-9, 2e-6], 1e-2, 1.0, "does not hold", True),
        (HAYSTACK, [1e-9], 1e-9, 1.0, "does not hold", True),
        (HAYSTACK, [math.nan], 1e-2, 1.0, "does not hold", True),
        (HAYSTACK, [], 1e-2, 1.0, "does not hold", True),
    ],
)
def test_haystack_rtrl_judges(
    trial: haystack_rtrl.Trial, apart: list[float], cut: float, accuracy: float, verdict: str, fails: bool
) -> None:
    result = haystack_rtrl.Result(trial, 9, 9, apart, cut, (9, 9), accuracy, None, History({1: 1.0}))
    results = haystack_rtrl.Results(results=[result])
    assert haystack_rtrl.measure.judge(results).name == verdict and bool(results.failures) == fails


# ---------------------------------------------------------------------- long haystacks


def test_haystack_long_measures_at_equal_memory() -> None:
    finding = found(haystack_long.measure, LONG)
    exact, straight, growing = finding.data["runs"]
    assert finding.data["equal"] == straight["horizon"] < LONG.gap and not finding.failures
    assert (straight["curriculum"], growing["curriculum"]) == (False, True)
    # one more step would not have fitted in
    a_step = straight["held"] / straight["horizon"]
    assert 0 <= exact["held"] - straight["held"] < 2 * a_step


def long_runs(exact: list[float], straight: list[float], growing: list[float], gap: int = 256) -> haystack_long.Runs:
    arms = [("BlockRTRL", None, False, exact), ("TBPTT", 60, False, straight), ("TBPTT", 60, True, growing)]
    runs = [
        haystack_long.Run(name, horizon, curriculum, seed, accuracy, 1000, 10, 100)
        for name, horizon, curriculum, accuracies in arms
        for seed, accuracy in enumerate(accuracies)
    ]
    return haystack_long.Runs(config=replace(LONG, gap=gap), equal=60, apart=[1e-9], cut_apart=0.1, runs=runs)


@pytest.mark.parametrize(
    ("runs", "verdict", "words"),
    [
        (long_runs([1.0], [0.5], [0.5]), "holds", ""),
        (long_runs([1.0, 1.0], [0.5, 0.5], [1.0, 0.5]), "holds when", "on 1 of 2 where the gaps may grow"),
        (long_runs([0.5], [0.5], [0.5]), "does not hold", "either"),
        (long_runs([1.0], [0.8], [0.5]), "does not hold", "learns something"),
        (long_runs([1.0], [0.5], [0.5], gap=100), "not measured at the claimed size", "100"),
        (long_runs([1.0], [0.5], [0.5], gap=50), "not measured", "reaches over"),
    ],
)
def test_haystack_long_judges(runs: haystack_long.Runs, verdict: str, words: str) -> None:
    judged = haystack_long.verdict(runs)
    assert judged.name == verdict and words in judged.condition and not runs.failures
    assert haystack_long.near_chance(Haystack(2)) == pytest.approx(0.55)


@pytest.mark.parametrize(("apart", "cut"), [(1e-3, 0.1), (math.nan, 0.1), (1e-9, 1e-9)])
def test_sides_that_are_not_what_they_are_called_are_a_failure(apart: float, cut: float) -> None:
    assert haystack_long.Runs(config=LONG, equal=60, apart=[apart], cut_apart=cut).failures


# ---------------------------------------------------------------------- bytes


LENGTH = byte_stream.StreamConfig(steps=10**5)


@pytest.mark.parametrize(("process", "fails"), [([], False), ([0, 9, 2**24], False), ([0, 9, 2**25], True)])
def test_what_the_process_holds_may_not_grow(process: list[int], fails: bool) -> None:
    exact = byte_stream.Run("", 3.0, [3.0], [10], None, 1.0, process)
    result = byte_stream.StreamResult(LENGTH, exact, [exact], 5.0)
    assert bool(byte_stream.Streams(streams=[result]).failures) == fails


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
    result = byte_stream.StreamResult(LENGTH, stream_run(bits, held), others, 5.0)
    assert byte_stream.judge(result).name == verdict
    if not fails:
        assert byte_stream.judge(replace(result, config=BYTES)).name == "not measured at the claimed size"
    assert bool(byte_stream.Streams(streams=[result]).failures) == fails


def test_of_several_byte_streams_the_worst_counts() -> None:
    good, bad = (
        byte_stream.StreamResult(LENGTH, stream_run(3.0, held), [stream_run(3.1, [9], 8)], 5.0)
        for held in ([10, 10], [10, 12])
    )
    for order in ([good, bad], [bad, good]):
        finding = byte_stream.measure.finding(byte_stream.Streams(streams=order))
        assert (finding.verdict, finding.condition) == ("does not hold", "memory grows")
        assert finding.failures == ["the bytes held grew by 2 over 100000 steps"]
        alone = [byte_stream.measure.finding(byte_stream.Streams(streams=[result])).result for result in order]
        assert finding.result == f"{alone[0]}. {alone[1]}"
    assert byte_stream.measure.finding(byte_stream.Streams(streams=[good])).verdict == "holds"
    assert {config.steps for config in byte_stream.measure.full} == {10**5, 10**6}
