"""Forward-only derivatives: against autograd, within their own error estimates, and what must not pass."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from cells import CELLS, F64, Case, assert_same, cases, make_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
from oracles._ridders import ridders


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("extras", [False, True])
def test_all_entries_agree_with_both_derivations(kind: str, extras: bool) -> None:
    case = make_case(kind, steps=3, batch=2, size=2, start=extras, resets=extras, offsets=extras)
    arguments = (case.cell, case.xs, case.loss_fn, case.h0)
    unrolled = oracles.bptt(*arguments, **case.schedule)
    dense = oracles.dense_rtrl(*arguments, **case.schedule)
    by_imaginary = oracles.finite_difference(*arguments, method="complex", **case.schedule)
    central, error = oracles.finite_difference(*arguments, **case.schedule, return_error=True)
    assert_same(by_imaginary, unrolled, 1e-12)
    assert_same(by_imaginary, dense, 1e-12)
    for name, g in unrolled.items():
        assert bool(((central[name] - g).abs() <= error[name]).all()), name
        assert error[name].max() <= 1e-8 * max(1.0, g.abs().max().item()), name


@given(case=cases(), seed=st.integers(0, 2**20))
def test_random_directions(case: Case, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    gradients = oracles.bptt(case.cell, case.xs, case.loss_fn, case.h0, **case.schedule)
    direction = {n: torch.randn(p.shape, generator=g, dtype=F64) for n, p in gradients.items()}
    exact = [float((gradients[n] * d).sum()) for n, d in direction.items()]
    scale = max(map(abs, exact))
    methods: list[tuple[Literal["central", "complex"], float]] = [("complex", 1e-12), ("central", 1e-6)]
    for method, tolerance in methods:
        value, error = oracles.directional_difference(
            case.cell, case.xs, case.loss_fn, direction, case.h0, method=method, **case.schedule
        )
        assert abs(value - sum(exact)) <= max(tolerance * scale, error)
        assert math.isfinite(value) and (scale > 0) is any(case.loss_at)
        # Where a selection flips close by, the estimate must own up to it; elsewhere it must be small.
        assert error <= tolerance * max(1.0, scale) or (method == "central" and "router" in gradients)


def test_directions_add_up_and_a_wrong_gradient_is_seen() -> None:
    case = make_case("slots")
    gradients = oracles.bptt(case.cell, case.xs, case.loss_fn)
    direction = {"gate": torch.ones(3, 3, dtype=F64)}
    value, error = oracles.directional_difference(case.cell, case.xs, case.loss_fn, direction)
    twice, _ = oracles.directional_difference(case.cell, case.xs, case.loss_fn, {"gate": 2 * direction["gate"]})
    assert abs(twice - 2 * value) <= 4 * error
    assert abs(gradients["gate"].sum().item() - value) <= error < 1e-9
    assert abs(1.0001 * gradients["gate"].sum().item() - value) > 1e3 * error


@pytest.mark.parametrize(
    ("function", "derivative"),
    [(math.exp, 1.0), (lambda x: math.sin(7 * x), 7.0), (lambda x: 3.0, 0.0), (lambda x: x**3 - 2 * x, -2.0)],
)
def test_ridders_on_known_functions(function: object, derivative: float) -> None:
    assert callable(function)
    value, error = ridders(function, 1e-2)
    assert abs(value - derivative) <= error <= 1e-10


def test_ridders_passes_over_a_jump_beyond_its_smaller_steps() -> None:
    value, error = ridders(lambda x: math.exp(x) + (5.0 if x > 6e-4 else 0.0), 1e-2)
    assert abs(value - 1.0) <= error <= 1e-8


def test_ridders_owns_up_to_a_jump_and_to_a_kink() -> None:
    assert ridders(lambda x: 1.0 if x > 0 else 0.0, 1e-2)[1] > 1.0
    assert not ridders(lambda x: math.nan, 1e-2)[1] < 1.0


class Rectified(nn.Module):
    """|W h| has a complex twin that is not analytic: the complex step must refuse it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5], dtype=F64))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = (self.w * h + x).abs()
        return h_next, h_next


def test_complex_step_refuses_what_drops_the_imaginary_part() -> None:
    xs, h0 = torch.ones(2, 1, 2, dtype=F64), torch.ones(1, 2, dtype=F64)
    with pytest.raises(ValueError, match="imaginary"):
        oracles.finite_difference(Rectified(), xs, lambda t, y: y.sum(), h0, method="complex")
    case = make_case("tanh")
    with pytest.raises(ValueError, match="imaginary"):
        oracles.finite_difference(case.cell, case.xs, lambda t, y: y.abs().sum(), method="complex")
    central = oracles.finite_difference(Rectified(), xs, lambda t, y: y.sum(), h0)  # away from its kink it is smooth
    assert_same(central, oracles.bptt(Rectified(), xs, lambda t, y: y.sum(), h0), 1e-9)
