"""Every check catches a cell that is broken in its way and in no other."""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine.test_bad_cells import CLOSING
from helpers.adversarial_inputs import Breakable, Step, rows, stream
from torch import Tensor, nn

from rtrl import Sparsity
from rtrl.cells import AnalyticStep, UnitTap
from rtrl.testing import cell_checks, check_cell

F64 = torch.float64
XS = list(torch.randn(3, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(1)))


def broken(step: Step) -> Breakable:
    torch.manual_seed(0)
    cell = Breakable(step)
    cell.broken = True
    return cell


def changed(change: Callable[..., Any]) -> Step:
    """A good step of which (cell, x, h, y, h_next, sparsity) is changed."""
    return lambda cell, x, h: change(cell, x, h, *cell.good(x, h))


def row_two(change: Callable[[Breakable, Tensor, Tensor], Tensor]) -> Step:
    """A good step that gives the row nobody declares another value."""
    return changed(lambda c, x, h, y, n, s: (y, torch.cat([n[:, :2], change(c, x, h[:, 2:])], dim=1), s))


def more_y(extra: Callable[[Breakable, Tensor, Tensor], Tensor]) -> Step:
    return changed(lambda c, x, h, y, n, s: (y + extra(c, x, h), n, s))


def dense(change: Callable[[Tensor], Tensor]) -> Step:
    """A step that writes all rows and then changes the state."""
    return changed(lambda c, x, h, y, n, s: (y, change(n)))


def _counts(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    cell.count.add_(1.0)
    return cell.good(x, h)


def _remembers(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    cell.calls = getattr(cell, "calls", 0) + 1
    y, h_next, _ = cell.good(x, h)
    return y + 1e-12 * (cell.calls % 2), h_next


def _draws(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    random.random()
    return cell.good(x, h)


def _draws_numpy(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    np.random.rand()  # noqa: NPY002
    return cell.good(x, h)


def _changes_x(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    x.add_(0.0)
    return cell.good(x, h)


def _other_slices(cell: Breakable, *given: Any) -> Any:
    sparsity = given[-1]
    return given[2], given[3], sparsity._replace(active={"experts": (sparsity.active["experts"] + 1) % 3})


class _Old(torch.autograd.Function):
    """An old-style function, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _WrongVmap(torch.autograd.Function):
    """An identity whose own rule for vmap doubles."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: Tensor) -> Any:
        return 2 * value, in_dims[0]


class Aliased(nn.Module):
    """Uses a second reference to its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, dtype=F64))
        self.hidden = [self.weight]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ self.hidden[0] + x[:, :1])
        return h, h


class Router(nn.Module):
    """Writes the row with the largest state, whatever is replayed."""

    def init_state(self, batch_size: int) -> Tensor:
        return torch.linspace(-1.0, 1.0, 6, dtype=F64).reshape(1, 3, 2).repeat(batch_size, 1, 1)

    def step(self, x: Tensor, h: Tensor, writes: Tensor) -> Any:
        new = torch.tanh(h.mean(1, keepdim=True) + x[:, None, :2])
        h = h.scatter(1, writes.unsqueeze(2).expand(-1, -1, 2), new)
        return h.sum(1), h, Sparsity(None, writes)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.step(x, h, h.detach().sum(2).topk(1).indices)


class Deaf(Router):
    """Takes ``replay`` and does not listen."""

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> Any:
        return super().forward(x, h)


class Liar(Router):
    """Says that it obeys, and does not."""

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> Any:
        y, h, sparsity = super().forward(x, h)
        return y, h, sparsity if replay is None else replay


class Rounding(Router):
    """Replays its choices, and rounds differently where it does."""

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> Any:
        if replay is None:
            return super().forward(x, h)
        y, h, sparsity = self.step(x, h, replay.writes)
        return y + 1e-12, h, sparsity


class Crowded(Router):
    """Decides otherwise in a batch of several steps, and listens to no replay there."""

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> Any:
        writes = super().forward(x, h)[2].writes if replay is None else replay.writes
        return self.step(x, h, writes if x.shape[0] <= 3 else (writes + 1) % 3)


class Rows(nn.Module):
    """Two layers of two units: the upper one sees the lower one. Declares ``groups``."""

    def __init__(self, *groups: list[list[int]], coupling: float = 0.0) -> None:
        super().__init__()
        self.groups = groups
        self.own = nn.Parameter(torch.ones(4))
        self.other = nn.Parameter(torch.full((), coupling))

    def row_groups(self) -> list[Tensor]:
        return [torch.tensor(rows) for rows in self.groups]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (self.own * h + x[:, :1]).chunk(2, dim=1)
        low = torch.tanh(low + self.other * low.flip(1))
        h = torch.cat([low, torch.tanh(high + low.sum(1, keepdim=True))], dim=1)
        return h, h


LAYERS = [[0], [1]], [[2], [3]]


class Known(nn.Module):
    """``tanh(x₀ + W h)``, with derivatives of its own: those by h times ``slope``, and the value off by ``shift``."""

    def __init__(self, slope: float, shift: float = 0.0) -> None:
        super().__init__()
        self.slope, self.shift = slope, shift
        self.weight = nn.Parameter(torch.eye(4, dtype=F64))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x[:, :1] + h @ self.weight.T)
        return h, h

    def analytic_step(self, x: Tensor, h: Tensor) -> AnalyticStep:
        h_next = (self(x, h)[1].detach() + self.shift).requires_grad_()
        slope = self.slope * (1 - h_next.detach().square())[:, None, None]
        return AnalyticStep(h_next, h_next, [UnitTap(self.weight, None, h.detach(), slope, part=0)])


class Early(nn.Module):
    """Several steps at once give the state before each step, not after it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, dtype=F64) / 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(h @ self.weight)
        return h_next, h_next

    def unroll(self, xs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        states = [h]
        for x in xs:
            states.append(self(x, states[-1])[1])
        return torch.stack(states[1:]), torch.stack(states[:-1])


BROKEN: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "a list": ("returns", lambda: broken(lambda c, x, h: [x, h]), "got list"),
    "raises": ("returns", lambda: broken(lambda c, x, h: 1 // 0), "ZeroDivisionError"),
    "a row that is none": (
        "returns",
        lambda: broken(changed(lambda c, x, h, y, n, s: (y, n, s._replace(reads=rows(x, 3))))),
        "must lie in 0 … 2",
    ),
    "fewer rows": ("state form", lambda: broken(dense(lambda n: n[:, :2])), "another shape"),
    "float32 state": ("state form", lambda: broken(dense(lambda n: n.float())), "another shape, dtype"),
    "y reduced": (
        "y per sample",
        lambda: broken(changed(lambda c, x, h, y, n, s: ({"loss": y.sum()}, n, s))),
        "batch as dimension 0",
    ),
    "infinite y": ("finite", lambda: broken(changed(lambda c, x, h, y, n, s: (y / 0.0, n, s))), "infinity in y"),
    "infinite slope": ("finite", lambda: broken(dense(lambda n: n + (n - n).sqrt())), "derivative by"),
    "counts": ("pure", lambda: broken(_counts), "parameter or buffer of its own in place"),
    "changes x": ("pure", lambda: broken(_changes_x), "changes x in place"),
    "draws": ("pure", lambda: broken(_draws), "Python or NumPy"),
    "draws NumPy's": ("pure", lambda: broken(_draws_numpy), "Python or NumPy"),
    "remembers": ("deterministic", lambda: broken(_remembers), "not the same bit for bit"),
    "a detached decay": (
        "unwritten rows are copied",
        lambda: broken(row_two(lambda c, x, r: r - 0.1 * r.detach())),
        "not declared as written changes",
    ),
    "a detached copy": (
        "unwritten rows are copied in derivative",
        lambda: broken(row_two(lambda c, x, r: r.detach())),
        "not that of a copy",
    ),
    "a parameter that moves no value": (
        "unwritten rows are copied in derivative",
        lambda: broken(row_two(lambda c, x, r: r + (c.zero - c.zero.detach()))),
        "moves with parameter 'zero'",
    ),
    "reads more": (
        "reads are declared",
        lambda: broken(changed(lambda c, x, h, y, n, s: (y, n, s._replace(reads=rows(x, 0))))),
        "written rows depend on",
    ),
    "y reads more behind a zero gate": (
        "reads are declared",
        lambda: broken(more_y(lambda c, x, h: c.zero * h[:, 2])),
        "y depend on",
    ),
    "y reads a sign": (
        "reads are declared",
        lambda: broken(more_y(lambda c, x, h: (h[:, 2] > 0).to(h))),
        r"\(value\)",
    ),
    "other slices": (
        "active slices are declared",
        lambda: broken(changed(_other_slices)),
        "a slice of parameter 'experts'",
    ),
    "a row that sees another": ("row groups hold", lambda: Rows(*LAYERS, coupling=0.5), "of group 0 depends on"),
    "a row that learns to see another": ("row groups hold", lambda: Rows(*LAYERS), "at the perturbed point"),
    "a group that sees a later one": (
        "row groups hold",
        lambda: Rows([[2], [3]], [[0, 1]]),
        "a row of group 0 depends on a state entry outside itself and the groups before it",
    ),
    "an entry in no row": ("row groups hold", lambda: Rows([[0], [1]], [[2]]), "entry 3 occurs 0 times"),
    "an entry in two rows": ("row groups hold", lambda: Rows([[0, 1]], [[1, 2, 3]]), "entry 1 occurs 2 times"),
    "rows that are none": ("row groups hold", lambda: Rows([0, 1], [2, 3]), r"group 0 is torch.int64 \(2,\)"),
    "normalises over the batch": (
        "independent samples",
        lambda: broken(changed(lambda c, x, h, y, n, s: (y.softmax(0), n, s))),
        "of one sample depends on",
    ),
    "a sample sees the one before": (
        "independent samples",
        lambda: broken(dense(lambda n: n.cumsum(0))),
        "h_next of one sample depends on the state of another",
    ),
    "branches on the batch": (
        "independent samples",
        lambda: broken(dense(lambda n: n if n.shape[0] > 1 else -n)),
        "another h_next alone",
    ),
    "y sees other x": ("independent samples", lambda: broken(more_y(lambda c, x, h: x.mean())), r"x\[0\] of another"),
    "routes, no replay": ("replay", Router, "forward must take replay=None"),
    "routes, deaf": ("replay", Deaf, "does not make the choices"),
    "routes, lies": ("replay", Liar, "writes other rows"),
    "routes, rounds": ("replay", Rounding, "replaying its own choices changes y"),
    "routes, crowded": ("replay", Crowded, "as one batch, several steps make other choices"),
    "float32 y": (
        "dtype and device",
        lambda: broken(changed(lambda c, x, h, y, n, s: (y.float(), n, s))),
        "does not keep the dtype",
    ),
    "float64 only": (
        "dtype and device",
        lambda: broken(dense(lambda n: n @ torch.eye(2, dtype=F64))),
        "does not run in torch.float32",
    ),
    "wrong vmap rule": ("torch.func", lambda: broken(dense(_WrongVmap.apply)), "under torch.func.vmap a sample"),
    "half a derivative": ("analytic step", lambda: Known(0.5), "another derivative with respect to the state"),
    "states too early": ("unroll", Early, "unroll gives another value of the next state than single steps"),
    "another value": ("analytic step", lambda: Known(1.0, 1e-3), "another value of the next state"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cell_is_caught_by_exactly_its_check(name: str) -> None:
    check, maker, message = BROKEN[name]
    cell = maker()
    state = None if hasattr(cell, "init_state") else torch.ones(3, 4, dtype=F64)
    report = check_cell(cell, XS, state=state, on_fail="return")
    assert {failure.check for failure in report.failures} == {check}, str(report)
    assert any(re.search(message, str(failure)) for failure in report.failures), str(report)


def test_every_check_catches_a_broken_cell() -> None:
    assert {check for check, _, _ in BROKEN.values()} == set(cell_checks())


def test_a_cell_that_torch_func_refuses_passes_with_a_note() -> None:
    report = check_cell(broken(dense(_Old.apply)), XS)
    assert any("does not run under torch.func" in note and "setup_context" in note for note in report.notes)


def test_a_parameter_in_a_list_is_substituted() -> None:
    report = check_cell(Aliased(), XS, state=torch.ones(3, 4, dtype=F64))
    assert not report.notes


def test_derivatives_in_closed_form_that_are_right_pass() -> None:
    assert check_cell(Known(1.0), XS, state=torch.ones(3, 4, dtype=F64)).passed


def test_row_groups_that_hold_pass() -> None:
    assert check_cell(Rows([[0, 1]], *LAYERS[1:], coupling=0.5), XS, state=torch.ones(3, 4, dtype=F64)).passed


def test_an_unbroken_cell_passes_what_its_broken_kin_do_not() -> None:
    assert check_cell(broken(Breakable.good), XS).checks == cell_checks()


LONE = ["independent samples", "reads are declared", "active slices are declared"]


@pytest.mark.parametrize("name", [name for name, case in BROKEN.items() if case[0] in LONE])
def test_a_lone_sample_of_a_single_step_hides_nothing(name: str) -> None:
    check, maker, _ = BROKEN[name]
    report = check_cell(maker(), [XS[0][:1]], on_fail="return")
    assert check in {failure.check for failure in report.failures}


def test_a_zero_parameter_that_moves_an_undeclared_row_is_caught_by_value_and_by_derivative() -> None:
    report = check_cell(broken(row_two(lambda c, x, r: r + c.zero * x[:, None, :2])), XS, on_fail="return")
    assert {failure.check for failure in report.failures} == {
        "unwritten rows are copied",
        "unwritten rows are copied in derivative",
    }
    assert "at the perturbed point" in report.failures[0].where


@pytest.mark.parametrize("step", [pytest.param(case[1], id=case[0]) for case in CLOSING])
def test_what_the_learner_refuses_when_a_block_closes_is_found_beforehand(step: Step) -> None:
    assert not check_cell(broken(step), stream()[:2], on_fail="return").passed
