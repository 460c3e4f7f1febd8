"""The claims about cost, memory and structure: their verdicts from planted outcomes, and each measured in small."""

import json
import math
from typing import Any

import pytest
import torch

from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.verification import record, runner
from rtrl.verification.claim import Finding, Settings
from rtrl.verification.gradients import conditioning, toggles
from rtrl.verification.harness import bptt_process, dormant_slice, long_run, memory, problems, speed
from rtrl.verification.harness.problems import Mixture, Run, problem
from rtrl.verification.memory import bptt_limit, gpu, long_stream, memory_constant, memory_table
from rtrl.verification.model import extraction, patterns
from rtrl.verification.speed import anbn_speed, catch_up, dormancy, haystack_speed, per_step, read_write

TINY = Mixture("tiny", 2, 2, 4, 3, 4)
SMALL: list[tuple[Any, Any]] = [
    (anbn_speed, speed.Sizes(Mixture("small", 8, 4, 6, 4, 6), 6, 8, 4, 2, 1, (4,), 3)),
    (memory_table, memory_table.Sizes(TINY, (8, 16, 32), (1000,), 4, 4)),
    (long_stream, long_stream.Sizes(widths=(4,), warm=8, steps=16, flow=TINY)),
    (extraction, extraction.Sizes(Mixture("small", 2, 2, 8, 4, 16), 12, 4, (8, 64, 4096))),
    (dormancy, dormancy.Sizes((1, 3, 10, 100), 40, 3)),
    (catch_up, catch_up.Sizes((3, 100), ((20, 16),), 32, 1, 1)),
    (read_write, read_write.Sizes(16, 4, 2, 8, (3, 20), 4, 1, 1)),
    (per_step, per_step.Sizes(Mixture("small", 2, 2, 16, 4, 6), (4, 8, 6), (1, 4), 4, 4, 8, 4, 1)),
    (bptt_limit, bptt_limit.Sizes(("quick",), (3, 6, 9), process=(50, 150))),
    (toggles, toggles.Sizes(Mixture("small", 2, 2, 4, 4, 6), 8, 4, 2)),
    (conditioning, conditioning.Sizes(8, 1, (4, 8), 4, 2)),
    (patterns, patterns.Sizes(48, 24, 8, 8, 2)),
]


def quiet(piece: str, done: int, pieces: int) -> None:
    assert piece
    assert 0 <= done <= pieces


@pytest.mark.parametrize(("module", "sizes"), SMALL, ids=lambda value: getattr(value, "__name__", "").split(".")[-1])
def test_each_is_measured_in_small(module: Any, sizes: Any) -> None:
    threads = torch.get_num_threads()
    finding = module.measure(Settings(seed=1), quiet, sizes)
    assert isinstance(finding, Finding)
    assert finding.failures == []
    assert finding.verdict != "not measured"
    assert finding.result
    assert finding.threshold
    assert (
        (finding.verdict == "holds") == (finding.condition == "")
        or finding.verdict == "holds when"
        or finding.condition
    )
    for grid in finding.tables:
        assert grid.rows
        assert all(len(row) == len(grid.columns) for row in grid.rows), grid.title
    for plot in finding.plots:
        assert all(len(series.x) == len(series.y) > 0 for series in plot.series), plot.title
    entry = record.entry(runner.Outcome(module.CLAIM, finding, 0.0))
    json.dumps(record.record([entry], Settings(), "test"), allow_nan=False)
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------------- verdicts from planted outcomes


def verdict(found: tuple[Any, ...]) -> str:
    return str(found[0])


def test_speed() -> None:
    assert verdict(speed.judge(3.0, 2.8, 2.72, {16: 2.8}, 3.0)) == "holds"
    when = speed.judge(30.0, 1.2, 2.72, {16: 1.2, 64: 2.9, 128: 4.0}, 7.0)
    assert when[0] == "holds when"
    assert "from 64 experts on" in when[1]
    assert "clock" not in when[1]
    never = speed.judge(30.0, 1.2, 2.72, {16: 1.2}, 1.1)
    assert "not reached up to 16 experts" in never[1]
    assert "by the clock even full RTRL is only 1.1 ×" in never[1]
    assert verdict(speed.judge(3.0, 2.8, 2.72, {}, 1.0)) == "holds when"
    assert verdict(speed.judge(2.0, 1.0, 2.72, {}, 2.0)) == "does not hold"


def test_speed_of_a_learner_with_wrong_gradients_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(BlockRTRL):
        def sync(self, dormant: bool = True) -> None:
            super().sync(dormant)
            if self.lazy:
                for p in self.cell.parameters():
                    if p.grad is not None:
                        p.grad *= 1.01

    monkeypatch.setattr(problems, "BlockRTRL", Wrong)
    sizes = speed.Sizes(Mixture("small", 2, 2, 4, 3, 3), 4, 8, 2, 1, 1, ())
    finding = anbn_speed.measure(Settings(), quiet, sizes)
    assert finding.verdict == "does not hold"
    assert any("sparse, float64" in failure for failure in finding.failures)
    assert not any("lazy=False" in failure for failure in finding.failures)


def test_memory_over_time() -> None:
    table = {32: (100, 10), 64: (200, 10)}
    assert verdict(memory_table.judge({32: 110.0, 64: 190.0}, {32: 11.0, 64: 11.0}, 9, 2, True, table)) == "holds"
    when = memory_table.judge({32: 110.0, 64: 190.0}, {32: 150.0, 64: 150.0}, 90, 48, True, table)
    assert when[0] == "holds when"
    assert "T > 48" in when[1]
    assert verdict(memory_table.judge({32: 1.0}, {32: 9.0}, 9, 300, False, table)) == "does not hold"


def test_memory_that_grows_is_a_failure() -> None:
    flat, grown = [5, 5, 5, 5], [5, 5, 5, 6]
    assert memory_constant.judge(flat, [100, 120, 200, 201])[0::3] == ("holds", [])
    assert memory_constant.judge(grown, [200] * 4)[0] == "does not hold"
    assert "change with T" in memory_constant.judge(grown, [200] * 4)[3][0]
    assert memory_constant.judge(flat, [100, 100, 100, 102])[3] == ["the process grows by 2.0%"]
    assert memory_constant.judge(flat, [None] * 4)[0] == "holds when"


def test_a_learner_that_holds_more_and_more_fails_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def growing(learner: Any) -> int:
        asked.append(1)
        return memory.between_blocks(learner) + len(asked)

    monkeypatch.setattr(memory_table, "between_blocks", growing)
    finding = memory_table.measure(Settings(), quiet, memory_table.Sizes(TINY, (4, 8), (), 4, 4))
    assert any("changes with T" in failure for failure in finding.failures)
    assert any("the formula says" in failure for failure in finding.failures)


def test_a_long_run_here_and_in_a_process_of_its_own() -> None:
    told = (TINY, (8, 16, 24), 4, 2, 3)
    here = long_run.run(*told)
    there = long_run.in_a_fresh_process(*told)
    assert here["held_bytes"] == there["held_bytes"]
    assert len(set(here["held_bytes"])) == 1
    assert all(value is None or value > 10**7 for value in there["rss_bytes"])


def test_what_a_process_of_its_own_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_run, "__name__", "json.no_such_module")
    with pytest.raises(RuntimeError, match=r"ended with 1: .*no_such_module"):
        long_run.in_a_fresh_process(TINY, (4,), 4, 2, 0)


def test_long_streams() -> None:
    assert verdict(long_stream.judge(500, False, [])) == "holds"
    assert long_stream.judge(500, True, [])[0] == "holds when"
    assert "500 parameters" in long_stream.judge(500, True, [])[1]
    assert verdict(long_stream.judge(None, True, [])) == "does not hold"
    assert verdict(long_stream.judge(500, False, ["grows"])) == "does not hold"


@pytest.mark.parametrize("mixture", [TINY, Mixture("wide", 3, 2, 6, 5, 3)])
@pytest.mark.parametrize(("block", "window"), [(1, 3), (4, 1)])
def test_bytes_by_formula_are_those_held(mixture: Mixture, block: int, window: int) -> None:
    side = Run(problem(mixture, 9), block=block, window=window)
    memory.wake_all(side)
    formula = memory.influence_bytes(mixture) + memory.tree_bytes(mixture, block, window) + 4 * mixture.hidden
    assert memory.between_blocks(side.learner) == formula


def test_extraction_verdicts() -> None:
    assert verdict(extraction.judge(0.0499, 0.125, 64)) == "holds"
    assert extraction.judge(0.085, 0.125, 392) == (
        "holds when",
        "an expert is 392 wide or wider; as configured 8.5% of the parameters are active",
    )
    assert verdict(extraction.judge(0.085, 0.125, None)) == "does not hold"
    assert verdict(extraction.judge(0.01, 0.25, 64)) == "does not hold"


def test_a_cell_that_declares_too_little_fails_extraction(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = extraction.RecurrentMoE.choices

    def less(self: Any, reads: Any, writes: Any, experts: Any) -> Any:
        return choices(self, reads, writes[:, :1], experts)

    monkeypatch.setattr(extraction.RecurrentMoE, "choices", less)
    finding = extraction.measure(Settings(), quiet, SMALL[3][1])
    assert finding.verdict == "does not hold"
    assert any("outside the rows declared written changed" in failure for failure in finding.failures)
    assert any("check_cell" in failure for failure in finding.failures)


def test_dormancy_verdicts() -> None:
    assert verdict(dormancy.judge({100: (7, 3, 6.0)})) == "holds"
    assert verdict(dormancy.judge({100: (99, 3, 6.0)})) == "holds when"
    assert verdict(dormancy.judge({100: (99, 99, 99.0)})) == "does not hold"


def test_a_tree_out_of_order_fails_dormancy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dormancy.Counting, "_combine", lambda self, earlier, later: later + earlier)
    assert any("another string" in line for line in dormancy.measure(Settings(), quiet, SMALL[4][1]).failures)


def test_catching_up_verdicts() -> None:
    claimed = {100: 14.0, 1000: 20.0}
    good, bad = {100: 15.0, 1000: 21.0}, {100: 1.3, 1000: 5.0}
    assert verdict(catch_up.judge(good, good, claimed)) == "holds"
    assert verdict(catch_up.judge(good, bad, claimed)) == "holds when"
    assert verdict(catch_up.judge({**good, 1000: 19.0}, bad, claimed)) == "does not hold"


@pytest.mark.parametrize("touched", [2, 6])
def test_all_ways_to_catch_up_agree_and_cost_what_is_known(touched: int) -> None:
    sleep = dormant_slice.Sleep(9, 6, 2, touched, 3, torch.float64)
    assert dormant_slice.worst_error(sleep) < 1e-13
    found = dormant_slice.counted(sleep)
    columns = 3 * sleep.hidden
    assert found.one_by_one == 9 * (touched * 2) ** 2 * columns
    assert found.full == 9 * sleep.hidden**2 * columns
    assert found.planned <= min(found.one_by_one, found.composed)
    if touched == 6:
        assert found.composed == 8 * (sleep.hidden**3 + sleep.hidden**2) + sleep.hidden**2 * columns


def test_read_write_verdicts() -> None:
    assert verdict(read_write.judge(64.0, {100: 900.0})) == "holds"
    late = read_write.judge(64.0, {100: 71.0, 3000: 900.0})
    assert late[0] == "holds when"
    assert "about 3000 steps" in late[1]
    assert "do not multiply" in read_write.judge(64.0, {100: 71.0})[1]
    assert verdict(read_write.judge(60.0, {100: 900.0})) == "does not hold"


def test_per_step_verdicts() -> None:
    assert verdict(per_step.judge({1: 2100.0, 16: 1.0}, 0.03)) == "holds"
    when = per_step.judge({1: 100.0, 256: 2500.0}, 0.085)
    assert when[0] == "holds when"
    assert "blocks of 256 or more" in when[1]
    assert verdict(per_step.judge({1: 100.0, 256: 500.0}, 0.085)) == "does not hold"


def test_counts_are_carried_over_along_the_right_powers() -> None:
    def formula(d: float) -> float:
        return 3 * d**4 + 5 * d**3

    assert per_step.carried((4, 8), (formula(4), formula(8)), 64) == pytest.approx(formula(64), rel=1e-12)


def test_the_limit_of_bptt() -> None:
    assert verdict(bptt_limit.judge({"a": 9_000.0})) == "holds"
    assert bptt_limit.judge({"a": 20_000.0, "b": 9_000.0})[0] == "holds when"
    assert bptt_limit.judge({"a": 20_000.0})[0] == "does not hold"


def test_a_process_that_runs_bptt_grows_by_more_than_its_tensors() -> None:
    """And by about as much again when a configuration before it keeps its graph."""
    alone = bptt_process.growth(["quick"], (50, 250), 0)["quick"]
    both = bptt_process.growth(["haystack", "quick"], (50, 250), 0)["quick"]
    if alone is None or both is None:
        pytest.skip("this system does not tell the memory of a process")
    stream = problem(problems.CONFIGS["quick"], 64, 0)
    tensors = (memory.bptt_on_cpu(stream, 24) - memory.bptt_on_cpu(stream, 8)) / 16
    assert alone > tensors
    assert both == pytest.approx(alone, rel=0.1)


def test_bptt_limit_says_when_a_process_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = bptt_limit.Sizes(("quick",), (3, 6, 9))
    for growth, told in ((None, True), (2e5, False)):
        monkeypatch.setattr(bptt_limit, "growth", lambda *_, growth=growth: {"quick": growth})
        finding = bptt_limit.measure(Settings(), quiet, sizes)
        assert ("by tensors alone" in finding.condition) == told


def test_conditioning_verdicts() -> None:
    assert verdict(conditioning.judge({"a": 5.0}, {"a": 1e-5})) == "holds"
    assert verdict(conditioning.judge({"a": 5.0, "b": 500.0}, {"a": 1e-5, "b": 1e-5})) == "holds when"
    assert verdict(conditioning.judge({"a": 5.0}, {"a": 1e-2})) == "does not hold"
    assert verdict(conditioning.judge({"a": math.nan}, {"a": 1e-5})) == "does not hold"


def test_products_of_known_matrices() -> None:
    steps = [torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))] * 4
    assert conditioning.products(steps, 2) == (pytest.approx(4.0), pytest.approx(16.0))
    assert conditioning.products([torch.diag(torch.tensor([1.0, 0.0]))], 1) == (1.0, math.inf)


def test_jacobians_are_those_of_the_oracle() -> None:
    cell = conditioning.byte_model(0, torch.device("cpu"))
    text = torch.nn.functional.one_hot(torch.tensor([[3], [7], [3]]), 256).double()
    found, _ = conditioning.jacobians(cell, text)
    h = cell.init_state(1)
    for x, jacobian in zip(text, found, strict=True):

        def after(h: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return cell(x, h)[1]

        expected = torch.autograd.functional.jacobian(after, h).reshape(32, 32)
        torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)
        h = after(h).detach()


def test_patterns_find_what_is_not_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(patterns.judge(0, 10)) == "holds"
    assert verdict(patterns.judge(3, 10)) == "does not hold"
    assert verdict(patterns.judge(0, 0)) == "does not hold"
    cell = patterns.byte_model(0, torch.device("cpu"))
    x = torch.eye(256, dtype=torch.float64)[None, 5]
    h = torch.ones(1, 4, 8, dtype=torch.float64)
    used = cell(x, h)[2]
    assert patterns.strays(cell, x, h, used)[0] == 0
    fewer = used._replace(active={**used.active, "expert_up": used.active["expert_up"][:, :1]})
    assert patterns.strays(cell, x, h, fewer)[0] > 0
    assert patterns.strays(cell, x, h, used._replace(writes=used.writes[:, :0]))[0] > 0


def test_sleeps_are_counted() -> None:
    marks = [patterns.Mark(t, [expert], [0], [0]) for t, expert in enumerate([0, 1, 1, 0, 1])]
    assert patterns.sleeps(marks, 3) == {0: (2, 2), 1: (3, 1), 2: (0, 5)}


def test_a_gpu_is_measured_or_not() -> None:
    assert verdict(gpu.judge({32: 10, 64: 20}, {32: 15, 64: 15})) == "holds when"
    assert verdict(gpu.judge({32: 10, 64: 12}, {32: 15, 64: 15})) == "does not hold"
    if not torch.cuda.is_available():
        finding = gpu.measure(Settings(), quiet)
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
    finding = gpu.measure(Settings(), quiet, gpu.Sizes(TINY, (8, 16), 4, 2))
    assert finding.failures == []
    assert "planted" in finding.result


def test_haystack_speed_is_that_of_its_own_config() -> None:
    assert haystack_speed.QUICK.mixture is problems.HAYSTACK
    assert anbn_speed.QUICK.mixture is problems.SPEED
