"""The oracles differentiate the module itself, and leave it as it was; what one cannot represent, it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import F64, assert_same, make_case
from torch import Tensor, nn
from whole_modules import BY_HAND, MOVING, Cell, Clipping, Held, LearnedStart, Noisy, parameter

import oracles

ONES = torch.ones(3, 1, 1, dtype=F64)


def total(t: int, y: Tensor) -> Tensor:
    return y.sum()


def trainable(cell: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in cell.named_parameters() if p.requires_grad}


def by_offsets(cell: nn.Module, xs: Tensor, loss_fn: Any, **options: Any) -> dict[str, Tensor]:
    """BPTT on the path of moving parameters, which stay where they are."""
    zeros = {name: torch.zeros_like(p) for name, p in trainable(cell).items()}
    return oracles.bptt(cell, xs, loss_fn, offsets=[zeros] * len(xs), **options)


ORACLES: dict[str, Callable[..., Any]] = {
    "bptt": oracles.bptt,
    "bptt with offsets": by_offsets,
    "dense_rtrl": oracles.dense_rtrl,
    "finite_difference": oracles.finite_difference,
}


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("kind", BY_HAND)
def test_every_oracle_gives_the_gradient_found_by_hand(kind: str, oracle: str) -> None:
    make, name, expected = BY_HAND[kind]
    found = ORACLES[oracle](make(), ONES, total)[name]
    assert found.layout is torch.strided and not found.requires_grad
    assert found.item() == pytest.approx(expected, rel=1e-9 if oracle == "finite_difference" else 1e-14)


def moving_streams(cell: Cell, seed: int = 5) -> tuple[Tensor, dict[str, Any]]:
    """Inputs, and parameters that move at all steps but the last, with resets of one sample and of all."""
    g = torch.Generator().manual_seed(seed)
    xs = torch.randn(5, 2, 2 if cell.width > 1 else 1, generator=g, dtype=F64)
    some = [{n: 0.1 * torch.randn(p.shape, generator=g, dtype=F64) for n, p in trainable(cell).items()} for _ in xs]
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[1, 0] = True
    resets[3] = True
    return xs, {"offsets": [*some[:-1], {}], "resets": resets}


def curved(t: int, y: Tensor) -> Tensor:
    return (y - 0.1 * t).pow(2).sum() + y.sum()


@pytest.mark.parametrize("kind", MOVING)
def test_derivations_agree_where_parameters_move(kind: str) -> None:
    cell = MOVING[kind]()
    xs, schedule = moving_streams(cell)
    unrolled = oracles.bptt(cell, xs, curved, **schedule)
    assert_same(oracles.dense_rtrl(cell, xs, curved, **schedule), unrolled, 1e-12)
    g = torch.Generator().manual_seed(1)
    direction = {name: torch.randn(p.shape, generator=g, dtype=F64) for name, p in unrolled.items()}
    value, error = oracles.directional_difference(cell, xs, curved, direction, **schedule)
    terms = [float((unrolled[name] * d).sum()) for name, d in direction.items()]
    assert abs(value - sum(terms)) <= error + 1e-12 * max(map(abs, terms))
    assert error <= 1e-7 * max(map(abs, terms))
    still = oracles.bptt(cell, xs, curved, resets=schedule["resets"])
    assert any((still[n] - g).abs().max() > 1e-3 * g.abs().max() for n, g in unrolled.items())


@pytest.mark.parametrize("kind", MOVING)
def test_without_offsets_the_answer_is_that_of_plain_autograd(kind: str) -> None:
    cell = MOVING[kind]()
    xs, _ = moving_streams(cell)
    h = cell.init_state(2)
    loss = torch.zeros((), dtype=F64)
    for t, x in enumerate(xs):
        y, h = cell(x, h)
        loss = loss + curved(t, y)
    loss.backward()
    plain = {name: p.grad for name, p in trainable(cell).items()}
    for name, oracle in ORACLES.items():
        if name != "finite_difference":
            found = oracle(cell, xs, curved)
            assert_same(found, plain, 1e-12)  # type: ignore[arg-type]


def test_learned_first_state_has_an_influence_from_the_start_and_from_each_reset() -> None:
    cell, resets = LearnedStart(1.0, 0.5), torch.zeros(3, 2, dtype=torch.bool)
    resets[2, 1] = True
    xs = torch.zeros(3, 2, 1, dtype=F64)
    gradients, influences = oracles.dense_rtrl(cell, xs, total, resets=resets, return_influence=True)
    assert influences[0]["h0"].flatten().tolist() == [2.0, 2.0]  # h_0 = h0²
    assert influences[2]["h0"][1].item() == 2.0 and influences[2]["w"][1].item() == 0.0
    assert 0 < influences[2]["h0"][0].item() < 1
    assert_same(gradients, oracles.bptt(cell, xs, total, resets=resets), 1e-14)
    by_imaginary = oracles.finite_difference(cell, xs, total, resets=resets, method="complex")
    assert_same(by_imaginary, gradients, 1e-13)
    given = oracles.bptt(cell, xs, total, torch.ones(2, 1, dtype=F64))  # of the same value, but constant
    assert given["h0"].item() == 0.0 and given["w"].item() != 0.0


@pytest.mark.parametrize("oracle", ["bptt", "dense_rtrl", "finite_difference"])
def test_given_first_state_that_requires_a_gradient_is_refused(oracle: str) -> None:
    with pytest.raises(ValueError, match=r"h0 requires a gradient.* h0\.detach\(\)"):
        getattr(oracles, oracle)(Held(), ONES, total, torch.zeros(1, 1, dtype=F64, requires_grad=True))


@pytest.mark.parametrize("oracle", ORACLES)
def test_hooks_of_parameters_see_the_whole_gradient_once(oracle: str) -> None:
    cell, seen = Held(), []
    cell.a.register_hook(lambda g: seen.append(g.item()))
    cell.a.register_hook(lambda g: g.clamp(max=1.25))
    found = ORACLES[oracle](cell, ONES, total)
    assert found["a"].item() == 1.25
    assert seen == [pytest.approx(3.0, rel=1e-9)]


def test_clipped_gradients_are_those_of_autograd_or_refused() -> None:
    xs = torch.ones(4, 1, 1, dtype=F64)

    def three(t: int, y: Tensor) -> Tensor:
        return 3 * y.sum()

    for how, expected in [("function", 21.0), ("hook on a copy", 21.0), ("hook on the state", 12.0)]:
        assert oracles.bptt(Clipping(how), xs, three)["a"].item() == expected
        with pytest.raises(ValueError, match=r"oracles\.bptt"):
            oracles.dense_rtrl(Clipping(how), xs, three)
        # Forward passes know nothing of it: this is the derivative of the loss.
        assert oracles.finite_difference(Clipping(how), xs, three)["a"].item() == pytest.approx(30.0, rel=1e-9)
    for how in ("function", "hook on a copy"):
        assert by_offsets(Clipping(how), xs, three)["a"].item() == 21.0
    with pytest.raises(ValueError, match="hook on the state that it receives"):
        by_offsets(Clipping("hook on the state"), xs, three)


@pytest.mark.parametrize("where", ["start", "step", "memory"])
def test_finite_differences_refuse_what_is_not_a_pure_function(where: str) -> None:
    for method in ("central", "complex"):
        with pytest.raises(ValueError, match="two passes at the same parameters"):
            oracles.finite_difference(Noisy(where), ONES, total, method=method)  # type: ignore[call-overload]


def test_a_backward_pass_that_drops_what_is_small_is_refused() -> None:
    class Deaf(Held):
        def step(self, x: Tensor, h: Tensor) -> Tensor:
            h = self.a * h + x
            if h.requires_grad:
                h.register_hook(lambda grad: grad * (grad.abs() > 1e-3))
            return h.clone()

    with pytest.raises(ValueError, match="not linear"):
        oracles.dense_rtrl(Deaf(), ONES, total)


def test_a_mask_holds_for_the_influence_of_a_learned_first_state() -> None:
    cell, xs = LearnedStart(1.0, 0.5), torch.zeros(3, 2, 1, dtype=F64)
    resets = torch.zeros(3, 2, dtype=torch.bool)
    resets[2, 1] = True
    mask = {"h0": torch.zeros(1, 1, dtype=torch.bool)}
    for cut, kept in (({}, 2.0), (mask, 0.0)):
        found = oracles.dense_rtrl(cell, xs, total, resets=resets, mask=cut, return_influence=True)[1]
        assert found[0]["h0"].flatten().tolist() == [kept, kept] and found[2]["h0"][1].item() == kept
        assert found[2]["w"][0].item() != 0.0


class Broken(Exception):
    pass


@pytest.mark.parametrize("oracle", ["bptt", "dense_rtrl", "finite_difference", "complex"])
@pytest.mark.parametrize("fails", ["", "first", "last"])
def test_cell_is_as_it_was_afterwards(oracle: str, fails: str) -> None:
    case = make_case("slots", steps=3, size=2, offsets=True, resets=True)
    cell = case.cell
    cell.register_buffer("mean", torch.ones(2, dtype=F64))
    with torch.no_grad():
        cell.gate[0, 0] = -0.0
    cell.gate.grad, kept = torch.ones_like(cell.gate), torch.ones_like(cell.gate)
    cell.gate.register_hook(lambda g: 2 * g)
    hooks, view = cell.gate._backward_hooks, cell.gate.detach()[0]
    held = dict([*cell.named_parameters(), *cell.named_buffers()])
    bits = {n: t.detach().clone().view(torch.int64) for n, t in held.items()}
    places = {n: t.data_ptr() for n, t in held.items()}
    passes = 0

    def loss_fn(t: int, y: Any) -> Any:
        nonlocal passes
        passes += t == 0
        if fails and t == (0 if fails == "first" else 2) and (passes > 3 or "diff" not in oracle):
            raise Broken
        return case.loss_fn(t, y)

    method = {"finite_difference": {"method": "central"}, "complex": {"method": "complex"}}.get(oracle, {})
    run = getattr(oracles, "finite_difference" if oracle == "complex" else oracle)
    if fails:
        with pytest.raises(Broken):
            run(cell, case.xs, loss_fn, **case.schedule, **method)
    else:
        run(cell, case.xs, loss_fn, **case.schedule, **method)
    assert [n for n, _ in [*cell.named_parameters(), *cell.named_buffers()]] == list(held)
    for name, t in [*cell.named_parameters(), *cell.named_buffers()]:
        assert t is held[name] and t.dtype == F64 and t.data_ptr() == places[name], name
        assert torch.equal(t.detach().view(torch.int64), bits[name]), name
    assert all(p.requires_grad for p in cell.parameters())
    assert cell.gate._backward_hooks is hooks and len(hooks) == 1
    assert torch.equal(cell.gate.grad, kept) and torch.equal(view, cell.gate.detach()[0])


class TwoViews(Cell):
    """Two parameters on one piece of memory, or one that is expanded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a = parameter(0.5)
        if kind == "parameters":
            self.b = nn.Parameter(self.a.detach())
        elif kind == "buffer":
            self.register_buffer("b", self.a.detach())
        else:
            self.a, self.b = nn.Parameter(torch.ones(1, dtype=F64).expand(2)), 1.0

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return (self.a * h + self.b * x).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "match"), [("parameters", "share memory"), ("buffer", "share memory"), ("", "expand")]
)
def test_memory_that_is_shared_is_refused_where_it_would_be_changed(kind: str, match: str) -> None:
    cell = TwoViews(kind)
    for oracle in (oracles.bptt, oracles.dense_rtrl):
        assert oracle(cell, ONES, total)["a"].any()
    for oracle in (by_offsets, oracles.finite_difference):
        with pytest.raises(ValueError, match=match):
            oracle(cell, ONES, total)


def test_lazy_parameters_are_refused() -> None:
    class Lazy(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.LazyLinear(1)

    with pytest.raises(ValueError, match=r"'map.weight' has no values yet; run one step"):
        oracles.bptt(Lazy(), ONES, total)


class Watched(Held):
    """Notes whether the state that it receives carries a graph."""

    graphs: tuple[bool, ...] = ()

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        self.graphs += (h.requires_grad,)
        return super().step(x, h)


def test_no_graph_outlives_the_step_of_a_finite_difference() -> None:
    cell = Watched()
    oracles.finite_difference(cell, ONES, total)
    assert len(cell.graphs) > 3 and not any(cell.graphs)
