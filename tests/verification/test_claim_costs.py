"""The claims about cost, memory and structure: their verdicts from planted outcomes, and each measured in small."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from rtrl.report import Finding, plain
from rtrl.verification import record, runner
from rtrl.verification.claim import Claim, Judgement, Settings
from rtrl.verification.gradients import conditioning, toggles
from rtrl.verification.harness import dormant_slice, memory, problems, subprocesses
from rtrl.verification.harness.problems import LearnerRun, Mixture, problem
from rtrl.verification.memory import bptt_limit, gpu, long_stream, memory_constant, memory_table
from rtrl.verification.model import extraction, patterns
from rtrl.verification.speed import catch_up, crossover, dormancy, per_step, read_write, sparse_vs_full

TINY = Mixture("tiny", 2, 2, 4, 3, 4)
BRIEF = (3, 6, 9)
SMALL: dict[Any, Any] = {
    bptt_limit.measure: bptt_limit.measure.small,
}


def found(claim: Claim[Any, Any], config: Any = None, seed: int = 0) -> Finding:
    """The finding of a claim in small; every piece of work has a name."""
    pieces: list[str] = []
    settings = Settings(seed=seed, progress=pieces.append)
    finding = runner.measure_one(claim, settings, config or SMALL[claim]).finding
    assert pieces and all(pieces)
    return finding


@pytest.mark.parametrize("claim", SMALL, ids=lambda claim: claim.id)
def test_each_is_measured_in_small(claim: Claim[Any, Any]) -> None:
    finding = found(claim, seed=1)
    assert finding.failures == []
    assert finding.verdict != "not measured"
    assert finding.result
    assert finding.threshold
    assert "H = " in finding.model or "dormant" in finding.model or "P = " in finding.model
    assert (
        (finding.verdict == "holds") == (finding.condition == "")
        or finding.verdict == "holds when"
        or finding.condition
    )
    for table in finding.tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
    for plot in finding.plots:
        assert all(len(series.x) == len(series.y) > 0 for series in plot.series), plot.title
    entry = record.entry(runner.Outcome(claim, finding, 0.0))
    json.dumps(plain(asdict(record.record([entry], Settings(), "test"))), allow_nan=False)


# ---------------------------------------------------------------------- verdicts from planted outcomes


def test_speed_is_judged_by_the_clock_against_lazy_first() -> None:
    def verdict(lazy: float, full: float) -> Judgement:
        return sparse_vs_full.judge({"lazy=False": lazy, "full": full}, {"lazy=False": 1.3, "full": 32.0}, 2.72)

    assert verdict(2.8, 2.0).name == "holds"
    when = verdict(1.1, 7.0)
    assert when.name == "holds when"
    assert "full RTRL: 7 × by the clock (32 × by count)" in when.condition
    assert "it is 1.1 × by the clock (1.3 × by count)" in when.condition
    assert verdict(1.1, 2.0).name == "does not hold"
    full = sparse_vs_full.anbn.full
    assert (full.mixture.d_model, full.mixture.n_slots, full.mixture.n_experts) == (64, 8, 16)
    assert sparse_vs_full.haystack.full.mixture is problems.HAYSTACK


def test_a_switch_that_changes_no_count_is_none() -> None:
    def verdict(**counts: float) -> Judgement:
        macs = {"nothing": 1.0, **dict.fromkeys(toggles.SWITCHES, 1.1), **counts}
        ablation = toggles.Ablation(mixture=TINY, parameters=9, errors={}, macs=macs, seconds={}, held={})
        return toggles.verdict(toggles.Variants(config=toggles.Config(), ablations=[ablation]))

    assert verdict().name == "holds"
    assert verdict(tree=1.0).condition == "switching off tree changes no counted cost"
    assert verdict(blocks=0.7).name == "holds"


def test_the_crossover_is_between_the_sizes_around_it() -> None:
    assert crossover.crossings({16: 0.5, 64: 2.0, 256: 3.0}) == [pytest.approx(32.0)]
    assert crossover.crossings({16: 2.0, 64: 2.0}) == []

    def verdict(ratio: float) -> Judgement:
        seconds = {"steps": [1.0], "sequences": [1.0], "eager BPTT": [ratio], "TBPTT": [ratio]}
        rows = [crossover.SizeMeasured("RNN", 16, 9, 4, 4, {**seconds, "eager BPTT": [2.0]}, 9, (1.0, 1.0))]
        return crossover.verdict(crossover.Ratios(config=crossover.measure.small, rows=rows, error=0.0))

    assert verdict(1.5).name == "holds"
    assert "than TBPTT, in steps, at 0 of 1 sizes" in verdict(0.5).condition


def peaks(bptt: dict[int, int], peak: int, claimed: dict[int, tuple[int, int]], lengths: Any = ()) -> Any:
    """Measurements of memory_table with these bytes."""
    config = memory_table.Config(TINY, tuple(bptt), lengths)
    peak_bytes, held = dict.fromkeys(bptt, peak), dict.fromkeys(bptt, 9)
    return memory_table.Peaks(
        config=config,
        bptt=bptt,
        peak=peak_bytes,
        held=held,
        short=(0, 1),
        formula=9,
        planned=9,
        parameters=9,
        claimed=claimed,
    )


def test_memory_over_time() -> None:
    table = {32: (100, 10), 64: (200, 10)}
    assert memory_table.judge(peaks({32: 110, 64: 190}, 11, table)).name == "holds"
    when = memory_table.judge(peaks({32: 110, 64: 190}, 150, table))
    assert when.name == "holds when"
    assert "T > 48" in when.condition
    never = memory_table.judge(peaks({32: 110, 64: 190}, 300, table))
    assert never.name == "does not hold"
    assert memory_table.judge(peaks({32: 110, 64: 190}, 300, table, (1000,))).name == "holds when"


def test_memory_that_grows_is_a_failure() -> None:
    def bytes_of(held: list[int], rss: list[int | None], last: int = 10**6) -> memory_constant.Bytes:
        steps = [100, 500, 1000, last]
        return memory_constant.Bytes(
            held={"a": dict(zip(steps, held, strict=True))}, rss={"a": dict(zip(steps, rss, strict=True))}, least=5
        )

    flat, grown = [5, 5, 5, 5], [5, 5, 5, 6]
    steady = bytes_of(flat, [100, 120, 200, 201])
    assert (memory_constant.verdict(steady).name, steady.failures) == ("holds", [])
    more = bytes_of(grown, [200] * 4)
    assert memory_constant.verdict(more).name == "does not hold"
    assert "change with T" in more.failures[0]
    assert bytes_of(flat, [100, 100, 100, 102]).failures == ["the process grows by 2.0%, a"]
    assert bytes_of([4] * 4, [100] * 4).failures == ["the learner says 4 bytes; the formula says 5"]
    assert memory_constant.verdict(bytes_of(flat, [None] * 4)).name == "holds when"
    assert memory_constant.verdict(bytes_of(flat, [100] * 4, 5000)).name == "not measured at the claimed size"


@pytest.mark.nightly
def test_a_leak_from_step_200_on_fails_the_table_of_memory() -> None:
    finding = runner.measure_one(memory_table.measure, Settings(), broken="leak").finding
    assert any("the peak of BlockRTRL grows with T" in failure for failure in finding.failures)


def test_what_a_new_process_cannot_do_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the process 'no_such_run' ended with 1: .*KeyError: 'no_such_run'"):
        subprocesses.launch("no_such_run")


def test_long_streams() -> None:
    assert long_stream.judge(500, False, []).name == "holds"
    assert long_stream.judge(500, True, []).name == "holds when"
    assert "500 parameters" in long_stream.judge(500, True, []).condition
    assert long_stream.judge(None, True, []).name == "does not hold"
    assert long_stream.judge(500, False, ["grows"]).name == "does not hold"


@pytest.mark.parametrize("mixture", [TINY, Mixture("wide", 3, 2, 6, 5, 3)])
@pytest.mark.parametrize(("block", "window"), [(1, 3), (4, 1)])
def test_bytes_by_formula_are_those_held(mixture: Mixture, block: int, window: int) -> None:
    run = LearnerRun(problem(mixture, 9), block=block, window=window)
    memory.use_all_slices(run)
    formula = memory.influence_bytes(mixture) + memory.tree_bytes(mixture, block, window) + 4 * mixture.hidden
    assert memory.bytes_after_sync(run.learner) == formula


def test_extraction_verdicts() -> None:
    assert extraction.judge(0.0499, 0.125, 64).name == "holds"
    assert extraction.judge(0.085, 0.125, 392) == Judgement(
        "holds when",
        "an expert is 392 wide or wider; as configured 8.5% of the parameters are active",
    )
    assert extraction.judge(0.085, 0.125, None).name == "does not hold"
    assert extraction.judge(0.01, 0.25, 64).name == "does not hold"


def test_dormancy_verdicts() -> None:
    for counts, name in (((7, 3, 6.0), "holds"), ((99, 3, 6.0), "holds when"), ((99, 99, 99.0), "does not hold")):
        assert dormancy.verdict(dormancy.Combinations(counts={100: counts}, errors={})).name == name


def test_a_tree_out_of_order_fails_dormancy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dormancy.CountingTree, "_combine", lambda self, first, second: second + first)
    config = dormancy.Config((10,), 4, 3, ())
    assert any("another string" in line for line in found(dormancy.measure, config).failures)


def test_catching_up_verdicts() -> None:
    claimed = {100: 14.0, 1000: 20.0}
    good, bad = {100: 15.0, 1000: 21.0}, {100: 1.3, 1000: 5.0}
    assert catch_up.judge(good, good, claimed).name == "holds"
    assert catch_up.judge(good, bad, claimed).name == "holds when"
    assert catch_up.judge({**good, 1000: 19.0}, bad, claimed).name == "does not hold"


@pytest.mark.parametrize("touched", [2, 6])
def test_all_ways_to_catch_up_agree_and_cost_what_is_known(touched: int) -> None:
    dormant = dormant_slice.Dormancy(9, 6, 2, touched, 3, torch.float64)
    assert dormant_slice.worst_error(dormant) < 1e-13
    counts = dormant_slice.costs(dormant)
    columns = 3 * dormant.hidden
    assert counts.one_by_one == 9 * (touched * 2) ** 2 * columns
    assert counts.full == 9 * dormant.hidden**2 * columns
    assert counts.planned <= min(counts.one_by_one, counts.composed)
    if touched == 6:
        assert counts.composed == 8 * (dormant.hidden**3 + dormant.hidden**2) + dormant.hidden**2 * columns


def step_and_tree(rows: int, tree: dict[int, float]) -> Judgement:
    macs = {"full": rows, "row-sparse": 1}
    measured = read_write.StepAndTree(config=read_write.Config(), macs=macs, seconds={}, tree=tree, replay={})
    return read_write.judge(measured)


def test_read_write_verdicts() -> None:
    assert step_and_tree(64, {100: 900.0}).name == "holds"
    late = step_and_tree(64, {100: 71.0, 3000: 900.0})
    assert late.name == "holds when"
    assert "about 3000 dormant steps" in late.condition
    assert "do not multiply" in step_and_tree(64, {100: 71.0}).condition
    assert step_and_tree(60, {100: 900.0}).name == "does not hold"
    assert step_and_tree(64, {100: 64.0}).condition == "the tree saves nothing: 64 × with it at most"


def test_per_step_verdicts() -> None:
    assert per_step.judge({1: 2100.0, 16: 1.0}, 0.03).name == "holds"
    when = per_step.judge({1: 100.0, 256: 2500.0}, 0.085)
    assert when.name == "holds when"
    assert "blocks of 256 or more" in when.condition
    assert per_step.judge({1: 100.0, 256: 500.0}, 0.085).name == "does not hold"


def test_the_limit_of_bptt() -> None:
    assert bptt_limit.judge({"a": 9_000.0}).name == "holds"
    assert bptt_limit.judge({"a": 20_000.0, "b": 9_000.0}).name == "holds when"
    assert bptt_limit.judge({"a": 20_000.0}).name == "does not hold"


def test_a_process_that_runs_bptt_grows_by_more_than_its_tensors() -> None:
    """And by about as much again when a configuration before it keeps its graph."""
    alone = subprocesses.bptt_growth(["quick"], (50, 250), 0)["quick"]
    both = subprocesses.bptt_growth(["haystack", "quick"], (50, 250), 0)["quick"]
    if alone is None or both is None:
        pytest.skip("this system does not tell the memory of a process")
    stream = problem(problems.CONFIGS["quick"], 64, 0)
    tensors = (memory.bptt_on_cpu(stream, 24) - memory.bptt_on_cpu(stream, 8)) / 16
    assert alone > tensors
    assert both == pytest.approx(alone, rel=0.1)


def test_bptt_limit_says_when_a_process_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for growth, said in ((None, True), (2e5, False)):
        monkeypatch.setattr(bptt_limit, "bptt_growth", lambda *_, growth=growth: {"quick": growth})
        finding = found(bptt_limit.measure, bptt_limit.Config(("quick",), BRIEF))
        assert ("by tensors alone" in finding.condition) == said


def test_conditioning_verdicts() -> None:
    assert conditioning.judge({"a": 5.0}, {"a": 1e-5}).name == "holds"
    assert conditioning.judge({"a": 5.0, "b": 500.0}, {"a": 1e-5, "b": 1e-5}).name == "holds when"
    assert conditioning.judge({"a": 5.0}, {"a": 1e-2}).name == "does not hold"
    assert conditioning.judge({"a": math.nan}, {"a": 1e-5}).name == "does not hold"


def test_products_of_known_matrices() -> None:
    steps = [torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))] * 4
    assert conditioning.products(steps, 2) == (pytest.approx(4.0), pytest.approx(16.0))
    assert conditioning.products([torch.diag(torch.tensor([1.0, 0.0]))], 1) == (1.0, math.inf)


def test_jacobians_are_those_of_the_oracle() -> None:
    cell = problems.byte_model(0)
    text = torch.nn.functional.one_hot(torch.tensor([[3], [7], [3]]), 256).double()
    jacobians, _ = conditioning.jacobians(cell, text)
    h = cell.init_state(1)
    for x, jacobian in zip(text, jacobians, strict=True):

        def after(h: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return cell(x, h)[1]

        expected = torch.autograd.functional.jacobian(after, h).reshape(32, 32)
        torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)
        h = after(h).detach()


def test_patterns_find_what_is_not_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    for strays, looked_at, name in ((0, 10, "holds"), (3, 10, "does not hold"), (0, 0, "does not hold")):
        config = patterns.Config(d_model=32)
        picture = patterns.Picture(config=config, experts=1, slots=1, marks=[], strays=strays, looked_at=looked_at)
        assert patterns.verdict(picture).name == name
    dead = patterns.Picture(config=config, experts=2, slots=1, marks=[], looked_at=10, uses=[3, 0])
    assert patterns.verdict(dead).name == "does not hold" and dead.dead == [1]
    cell = problems.byte_model(0)
    x = torch.eye(256, dtype=torch.float64)[None, 5]
    h = torch.ones(1, 4, 8, dtype=torch.float64)
    used = cell(x, h)[2]
    assert patterns.strays(cell, x, h, used)[0] == 0
    fewer = used._replace(active={**used.active, "expert_up": used.active["expert_up"][:, :1]})
    assert patterns.strays(cell, x, h, fewer)[0] > 0
    assert patterns.strays(cell, x, h, used._replace(writes=used.writes[:, :0]))[0] > 0


def test_dormancies_are_counted() -> None:
    marks = [patterns.Mark(t, [expert], [0], [0]) for t, expert in enumerate([0, 1, 1, 0, 1])]
    assert patterns.dormancies(marks, 3) == {0: (2, 2), 1: (3, 1), 2: (0, 5)}


def test_a_gpu_is_measured_or_not() -> None:
    for bptt, name in (({32: 10, 64: 20}, "holds when"), ({32: 10, 64: 12}, "does not hold")):
        peaks = gpu.Peaks(config=gpu.Config(), bptt=bptt, rtrl=dict.fromkeys(bptt, 15), held={}, device="")
        assert gpu.verdict(peaks).name == name
    if not torch.cuda.is_available():
        finding = runner.measure_one(gpu.measure, Settings()).finding
        assert (finding.verdict, finding.condition) == ("not measured", "no device")


def test_what_gpus_would_be_asked_runs_with_another_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with a meter that tells what was planted, up to the allocator itself."""

    class Flat:
        def __init__(self, device: str) -> None:
            assert device == "cpu"
            self.peak = 1000

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "planted")
    monkeypatch.setattr(gpu, "CudaPeak", Flat)
    monkeypatch.setattr(gpu, "problem", lambda *args, device, **more: problem(*args, **more))
    monkeypatch.setattr(gpu, "_device", lambda settings: "cpu")
    finding = found(gpu.measure, gpu.Config(TINY, (8, 16), 4, 2))
    assert finding.failures == []
    assert "planted" in finding.result
