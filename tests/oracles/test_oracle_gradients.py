"""The derivations against one another, against analytic steps, and against recursions that are known to be wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cells import CELLS, F64, Case, Tanh, assert_same, cases, make_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles

EXACT = 1e-10


def reference(case: Case) -> dict[str, Tensor]:
    return oracles.bptt(case.cell, case.xs, case.loss_fn, case.h0, **case.schedule)


def dense(case: Case) -> dict[str, Tensor]:
    gradients: dict[str, Tensor] = oracles.dense_rtrl(case.cell, case.xs, case.loss_fn, case.h0, **case.schedule)
    return gradients


@given(case=cases())
def test_dense_recursion_gives_what_unrolling_gives(case: Case) -> None:
    assert_same(dense(case), reference(case), EXACT, zero=not any(case.loss_at))


@pytest.mark.parametrize("kind", CELLS)
def test_every_parameter_earns_something_but_the_idle_one(kind: str) -> None:
    gradients = reference(make_case(kind, steps=6, batch=3, start=True))
    assert [name for name, g in gradients.items() if not g.any()] == ["idle"] * (kind == "tanh")
    assert "frozen" not in gradients


class Linear(nn.Module):
    """h' = w h + u x and y = h' + h."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.tensor(0.5, dtype=F64)), nn.Parameter(torch.tensor(2.0, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, 1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = self.w * h + self.u * x
        return h_next + h, h_next


def test_scalar_linear_cell_in_closed_form() -> None:
    # h_3 = w³ + u (w² x_0 + w x_1 + x_2), h_2 = w² + u (w x_0 + x_1); the loss is h_3 + h_2, at step 2 alone.
    w, u, x = 0.5, 2.0, [3.0, -1.0, 0.25]
    by_w = (3 * w**2 + u * (2 * w * x[0] + x[1])) + (2 * w + u * x[0])
    by_u = (w**2 * x[0] + w * x[1] + x[2]) + (w * x[0] + x[1])
    xs = torch.tensor(x, dtype=F64).reshape(3, 1, 1)

    def loss_fn(t: int, y: Tensor) -> Tensor | None:
        return y.sum() if t == 2 else None

    for oracle in (oracles.bptt, oracles.dense_rtrl):
        gradients = oracle(Linear(), xs, loss_fn)
        assert gradients["w"].item() == by_w and gradients["u"].item() == by_u  # dyadic numbers: no rounding at all
    _, influences = oracles.dense_rtrl(Linear(), xs, loss_fn, return_influence=True)
    by_hand = [0.0, 1.0, 2 * w + u * x[0], 3 * w**2 + u * (2 * w * x[0] + x[1])]
    assert [s["w"].item() for s in influences] == by_hand


def test_scalar_linear_cell_with_parameters_that_move() -> None:
    # h_2 = (w + c_1)(w + c_0) + ..., the offsets being constants; x = 0, so u earns nothing.
    c0, c1 = 0.25, -1.5
    offsets = [{"w": torch.tensor(c0, dtype=F64)}, {"w": torch.tensor(c1, dtype=F64)}]
    for oracle in (oracles.bptt, oracles.dense_rtrl):
        gradients = oracle(
            Linear(), torch.zeros(2, 1, 1, dtype=F64), lambda t, y: y.sum() if t == 1 else None, offsets=offsets
        )
        assert gradients["w"].item() == (0.5 + c0) + (0.5 + c1) + 1.0  # dh_2/dw + dh_1/dw
        assert gradients["u"].item() == 0.0


def tanh_recursion_by_hand(case: Case, late: int) -> dict[str, Tensor]:
    """RTRL of `Tanh` with J_t, B_t from pencil and paper; with `late = 1` the adjoint meets S_{t+1} instead of S_t."""
    cell = case.cell
    assert isinstance(cell, Tanh)
    steps, batch, _ = case.xs.shape
    gradient, n = torch.zeros_like(cell.recurrent), cell.size
    h = cell.init_state(batch)
    influence = torch.zeros(batch, n, n, n, dtype=F64)  # ∂h[b, i] / ∂recurrent[j, k]
    with torch.no_grad():
        for t in range(steps):
            y, h_next = cell(case.xs[t], h)
            slope = 1 - h_next**2
            jacobian = slope[:, :, None] * cell.recurrent
            immediate = torch.einsum("bi,ij,bk->bijk", slope, torch.eye(n, dtype=F64), h)
            advanced = torch.einsum("bil,bljk->bijk", jacobian, influence) + immediate
            by_y = 2 * y  # the loss is the sum of squares
            by_next = by_y @ cell.readout
            adjoint = by_next * h + torch.einsum("bi,bil->bl", by_next, jacobian)
            met = advanced if late else influence
            gradient += torch.einsum("bi,bijk->jk", by_next, immediate) + torch.einsum("bi,bijk->jk", adjoint, met)
            influence, h = advanced, h_next
    return {"recurrent": gradient}


def test_adjoint_meets_the_influence_of_the_state_received() -> None:
    case = make_case("tanh", steps=6, batch=3, size=4)
    got = oracles.dense_rtrl(case.cell, case.xs, lambda t, y: y.pow(2).sum())["recurrent"]
    unrolled = oracles.bptt(case.cell, case.xs, lambda t, y: y.pow(2).sum())["recurrent"]
    right, wrong = (tanh_recursion_by_hand(case, late)["recurrent"] for late in (0, 1))
    scale = right.abs().max()
    assert (got - right).abs().max() <= 1e-13 * scale
    assert (unrolled - right).abs().max() <= 1e-13 * scale
    assert (got - wrong).abs().max() > 1e-2 * scale


def halves(case: Case, border: int, resets: Tensor | None = None) -> dict[str, Tensor]:
    """Gradient truncated at `border`: the second half starts from the first one's last state as from a constant."""
    first = replace(case, xs=case.xs[:border], loss_at=case.loss_at[:border])
    h = case.cell.init_state(case.xs.shape[1]) if case.h0 is None else case.h0  # type: ignore[operator]
    with torch.no_grad():
        for x in first.xs:
            h = case.cell(x, h)[1]
    second = replace(case, xs=case.xs[border:], h0=h, resets=resets)

    def shifted(t: int, y: Any) -> Tensor | None:
        return case.loss_fn(t + border, y)

    rest = oracles.bptt(second.cell, second.xs, shifted, second.h0, **second.schedule)
    return {name: g + rest[name] for name, g in reference(first).items()}


@pytest.mark.parametrize("kind", CELLS)
def test_truncation_at_a_border_is_seen(kind: str) -> None:
    case = make_case(kind, steps=6, losses="all", start=True)
    whole, truncated = reference(case), halves(case, 3)
    wrong = {name for name, g in whole.items() if (g - truncated[name]).abs().max() > 1e-3 * g.abs().max() > 0}
    assert wrong, "a truncated gradient passed for a whole one"
    nothing_follows = replace(case, loss_at=[t < 3 for t in range(6)])
    assert_same(halves(nothing_follows, 3), reference(nothing_follows), 1e-13)


@pytest.mark.parametrize("oracle", [reference, dense])
@pytest.mark.parametrize("kind", CELLS)
def test_reset_of_the_whole_batch_is_a_new_sequence(kind: str, oracle: Any) -> None:
    case = make_case(kind, steps=5, batch=2)
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[3] = True
    again = torch.zeros(2, 2, dtype=torch.bool)
    again[0] = True
    assert_same(oracle(replace(case, resets=resets)), halves(case, 3, again), 1e-13)


def loss_of_each_sample(t: int, y: Tensor) -> Tensor:
    return torch.sin(y + t).sum()


@given(seed=st.integers(0, 2**20), step=st.integers(0, 4), row=st.integers(0, 2))
def test_reset_of_one_sample_leaves_the_others_alone(seed: int, step: int, row: int) -> None:
    case = make_case("tanh", steps=5, batch=3, seed=seed)
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[step, row] = True
    alone = [case.xs[:, b : b + 1] for b in range(3) if b != row]
    runs = [(xs, 0) for xs in alone] + [(case.xs[step:, row : row + 1], step), (case.xs[:step, row : row + 1], 0)]
    parts = []
    for xs, start in runs:
        if len(xs):

            def late(t: int, y: Tensor, start: int = start) -> Tensor:
                return loss_of_each_sample(t + start, y)

            parts.append(oracles.bptt(case.cell, xs, late))
    expected = {name: sum((part[name] for part in parts), torch.zeros_like(g)) for name, g in parts[0].items()}
    for oracle in (oracles.bptt, oracles.dense_rtrl):
        assert_same(oracle(case.cell, case.xs, loss_of_each_sample, resets=resets), expected, 1e-12)


@given(case=cases(losses=("all",)))
def test_one_offset_for_all_steps_is_a_cell_that_moved(case: Case) -> None:
    generator = torch.Generator().manual_seed(1)
    shift = {
        n: 0.1 * torch.randn(p.shape, generator=generator, dtype=F64)
        for n, p in case.cell.named_parameters()
        if p.requires_grad
    }
    got = reference(replace(case, offsets=[shift] * len(case.xs)))
    with torch.no_grad():
        for name, c in shift.items():
            case.cell.get_parameter(name).add_(c)
    assert_same(got, reference(replace(case, offsets=None)), 1e-13)


class Exposed(nn.Module):
    """The cell with y = (state received, next state), so that a loss may pick one entry of a state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def init_state(self, batch_size: int) -> Tensor:
        state: Tensor = self.cell.init_state(batch_size)  # type: ignore[operator]
        return state

    def forward(self, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h_next: Tensor = self.cell(x, h)[1]
        return (h, h_next), h_next


@given(case=cases(), data=st.data())
def test_influence_is_the_derivative_of_the_state(case: Case, data: st.DataObject) -> None:
    steps, batch = case.xs.shape[:2]
    _, influences = oracles.dense_rtrl(
        case.cell, case.xs, case.loss_fn, case.h0, **case.schedule, return_influence=True
    )
    assert len(influences) == steps + 1
    t, b = data.draw(st.integers(0, steps)), data.draw(st.integers(0, batch - 1))
    size = next(iter(influences[0].values())).shape[1]
    i = data.draw(st.integers(0, size - 1))

    def entry(step: int, y: tuple[Tensor, Tensor]) -> Tensor | None:
        if step != min(t, steps - 1):
            return None
        return y[0 if t < steps else 1].flatten(1)[b, i]

    unrolled = oracles.bptt(Exposed(case.cell), case.xs, entry, case.h0, **prefixed(case))
    row = {f"cell.{name}": s[b, i].reshape(unrolled[f"cell.{name}"].shape) for name, s in influences[t].items()}
    assert_same(row, unrolled, EXACT, zero=not any(bool(g.any()) for g in unrolled.values()))
    constant = t == 0 or (t < steps and case.resets is not None and bool(case.resets[t, b]))
    assert not (constant and any(bool(s[b].any()) for s in influences[t].values()))
    direction = {name: torch.randn_like(g) for name, g in unrolled.items()}
    value, _ = oracles.directional_difference(
        Exposed(case.cell), case.xs, entry, direction, case.h0, method="complex", **prefixed(case)
    )
    terms = [float((row[name] * direction[name]).sum()) for name in row]
    assert abs(value - sum(terms)) <= 1e-12 * max(1.0, *map(abs, terms))


def prefixed(case: Case) -> dict[str, Any]:
    offsets = case.offsets and [{f"cell.{name}": c for name, c in step.items()} for step in case.offsets]
    return {"resets": case.resets, "offsets": offsets}


@pytest.mark.parametrize("kind", CELLS)
def test_last_influence_is_not_zero(kind: str) -> None:
    case = make_case(kind, steps=4)
    _, influences = oracles.dense_rtrl(case.cell, case.xs, lambda t, y: None, return_influence=True)
    assert all(bool(s.any()) for name, s in influences[-1].items() if name not in ("idle", "readout"))


@pytest.mark.parametrize("name", ["bptt", "dense_rtrl", "finite_difference"])
def test_nothing_is_written_to_the_cell_or_the_inputs(name: str) -> None:
    case = make_case("slots", steps=2, size=2, start=True, resets=True, offsets=True)
    case.xs.requires_grad_()
    before = [p.detach().clone() for p in case.cell.parameters()]
    with torch.no_grad():  # the caller's grad mode does not matter
        first = getattr(oracles, name)(case.cell, case.xs, case.loss_fn, case.h0, **case.schedule)
    second = getattr(oracles, name)(case.cell, case.xs, case.loss_fn, case.h0, **case.schedule)
    assert all(torch.equal(first[k], second[k]) for k in second)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(case.cell.parameters(), before, strict=True))
    assert case.xs.grad is None


def test_float32_keeps_its_dtype() -> None:
    case = make_case("stacked", steps=3)
    cell, xs = case.cell.float(), case.xs.float()
    h0 = torch.zeros(2, 2, 3)
    a = oracles.bptt(cell, xs, lambda t, y: y[0].pow(2).sum(), h0)
    b = oracles.dense_rtrl(cell, xs, lambda t, y: y[0].pow(2).sum(), h0)
    assert all(g.dtype == torch.float32 for g in a.values())
    assert_same(b, a, 1e-5)
