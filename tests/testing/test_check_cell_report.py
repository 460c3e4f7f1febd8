"""What is said of a broken cell, what is refused, and what is left alone."""

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adversarial_inputs import Breakable
from torch import Tensor, nn

import rtrl
from rtrl.errors import ConfigError, RTRLError
from rtrl.testing import CheckFailed, Failure, Report, cell_checks, check_cell

F64 = torch.float64
XS = list(torch.randn(3, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1)))


def _twice(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    """Row 2 decays, undeclared, and the samples of y meet."""
    y, h, sparsity = cell.good(x, h)
    return y + y.mean(0), torch.cat([h[:, :2], 0.5 * h[:, 2:]], dim=1), sparsity


def _later(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    """A row that nobody declares changes in sample 1 of step 2."""
    y, h, sparsity = cell.good(x, h)
    bump = torch.zeros_like(h).index_fill_(1, torch.tensor([2]), 0.25) * (x[:, :1, None] == XS[2][1, 0])
    return y, h + bump, sparsity


def _cell(step: Any) -> Breakable:
    torch.manual_seed(0)
    cell = Breakable(step)
    cell.broken = True
    return cell


def test_all_failures_of_a_cell_are_collected() -> None:
    with pytest.raises(CheckFailed) as caught:
        check_cell(_cell(_twice), XS)
    report = caught.value.report
    assert {failure.check for failure in report.failures} == {
        "unwritten rows are copied",
        "unwritten rows are copied in derivative",
        "independent samples",
    }
    assert report.checks == cell_checks()
    assert isinstance(caught.value, RTRLError)
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value) == str(report)


def test_the_report_names_check_step_sample_row_values_seed_and_script() -> None:
    report = check_cell(_cell(_later), XS, seed=5, on_fail="return")
    (failure,) = report.failures
    assert (failure.check, failure.step, failure.sample) == ("unwritten rows are copied", 2, 1)
    assert failure.where == "row 2, element (0,) at the point as given"
    assert float(failure.found) == float(failure.expected) + 0.25
    text = str(report)
    for part in ("unwritten rows are copied", "step 2, sample 1, row 2", failure.found, failure.expected, "(seed 5)"):
        assert part in text
    assert text.endswith("    from rtrl.testing import check_cell\n    check_cell(make_cell(), inputs, seed=5)")


def test_the_script_of_a_report_reproduces_it() -> None:
    state = torch.full((2, 3, 2), 0.5, dtype=F64)
    report = check_cell(_cell(_twice), XS, state=state, seed=3, on_fail="return")
    assert "state=state" in report.script
    with pytest.raises(CheckFailed) as caught:
        exec(report.script, {"make_cell": lambda: _cell(_twice), "inputs": XS, "state": state})
    assert str(caught.value) == str(report)


def test_a_failure_of_a_parameter_names_it_and_its_element() -> None:
    def step(cell: Breakable, x: Tensor, h: Tensor) -> Any:
        y, h, sparsity = cell.good(x, h)
        return y, h, sparsity._replace(active={"experts": (sparsity.active["experts"] + 1) % 3})

    (failure,) = check_cell(_cell(step), XS, on_fail="return").failures
    assert failure.where.startswith("parameter experts[")
    assert float(failure.found) != 0
    assert failure.expected == "0"


@pytest.mark.parametrize("step", [_twice, Breakable.good])
def test_nothing_of_the_callers_changes(step: Any) -> None:
    def draws(cell: Breakable, x: Tensor, h: Tensor) -> Any:
        cell.count.add_(random.random() + np.random.rand())  # noqa: NPY002
        return step(cell, x + torch.rand_like(x), h)

    cell = _cell(draws)
    cell.enter.weight.grad = torch.ones_like(cell.enter.weight)
    xs, state = [x.clone() for x in XS], cell.init_state(2)
    held = copy.deepcopy((cell.state_dict(), xs, state, cell.training))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    attributes = set(vars(cell))
    check_cell(cell, xs, state=state, on_fail="return")
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(before[0], now[0])
    assert before[1] == now[1]
    assert repr(before[2]) == repr(now[2])
    torch.testing.assert_close((cell.state_dict(), xs, state, cell.training), held, rtol=0, atol=0)
    assert torch.equal(cell.enter.weight.grad, torch.ones_like(cell.enter.weight))
    assert all(p.grad is None for name, p in cell.named_parameters() if name != "enter.weight")
    assert set(vars(cell)) == attributes


def test_a_cell_that_runs_only_in_its_own_dtype_is_judged_there() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recur = nn.Linear(4, 4)
            self.table = [torch.eye(4)]

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.recur(h) @ self.table[0] + x[:, :1])
            return h.cumsum(0), h

    report = check_cell(Single(), [x.float() for x in XS], state=torch.zeros(2, 4), on_fail="return")
    assert {f.check for f in report.failures} == {"independent samples", "dtype and device"}


def test_what_cannot_be_judged_is_said_to_be_skipped() -> None:
    report = check_cell(_cell(lambda cell, x, h: [x, h]), XS, on_fail="return")
    assert report.checks == ["returns"]
    assert [*report.checks, *report.skipped] == cell_checks()
    assert "not judged" in str(report)


def test_a_report_without_failures_raises_nothing_and_says_what_passed() -> None:
    report = check_cell(rtrl.cells.from_torch(nn.RNNCell(3, 4)).double(), XS)
    report.raise_for_failures()
    assert str(report).startswith(f"0 of {len(cell_checks())} checks failed (seed 0)\npassed: returns, ")


def test_what_is_raised_travels_between_processes() -> None:
    error = CheckFailed(Report([Failure("finite", "NaN in y", 3, 1, "y", "nan", "a finite number")], ["finite"]))
    again = pickle.loads(pickle.dumps(error))
    assert again.report == error.report
    assert str(again) == str(error)


GRU = rtrl.cells.from_torch(nn.GRUCell(3, 4)).double()
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no module", {"cell": lambda x, h: (x, h)}, "torch.nn.Module, got function"),
    ("a lazy module", {"cell": nn.LazyLinear(3)}, "has no shape yet"),
    ("one tensor", {"inputs": XS[0]}, r"sequence of the x of each step, got Tensor; .*\[x\]"),
    ("a generator", {"inputs": iter(XS)}, "sequence of the x"),
    ("no inputs", {"inputs": []}, "at least one step"),
    ("no tensor in x", {"inputs": [{"x": 1}]}, r"inputs\[0\] must be a tree of tensors"),
    ("a scalar x", {"inputs": [torch.ones(())]}, r"inputs\[0\] must be a tree of tensors"),
    ("two batches", {"inputs": [XS[0], XS[1][:1]]}, r"got batches of \[1, 2\]"),
    ("an empty batch", {"inputs": [XS[0][:0]]}, r"at least 1, got batches of \[0\]"),
    ("no first state", {"cell": nn.Linear(3, 3)}, "Linear has no init_state"),
    ("an integer state", {"state": torch.zeros(2, 4, dtype=torch.int64)}, "floating-point or complex tensor"),
    ("no state at all", {"state": [0.0]}, "got list"),
    ("a state of another batch", {"state": torch.zeros(3, 4, dtype=F64)}, r"shape \(2, n, ...\)"),
    ("a state with NaN", {"state": torch.full((2, 4), float("nan"), dtype=F64)}, "NaN or infinity"),
    ("a seed that is none", {"seed": True}, "seed must be an integer"),
    ("a negative seed", {"seed": -1}, "seed must be an integer"),
    ("a choice that is none", {"on_fail": "warn"}, "'raise', 'return', got 'warn'"),
]


@pytest.mark.parametrize(("arguments", "match"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_bad_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_cell(**{"cell": GRU, "inputs": XS, **arguments})


def test_a_cell_that_cannot_be_copied_is_refused() -> None:
    cell = rtrl.cells.from_torch(nn.GRUCell(3, 4)).double()
    cell.kept = cell.cell.weight_hh * 2
    with pytest.raises(ConfigError, match="cannot be copied"):
        check_cell(cell, XS)
