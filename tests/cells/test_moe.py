"""``RecurrentMoE`` against the plain NumPy loops, and the invariants that its sparsity promises."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.strategies import normal, seeds
from helpers.toy_cells import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
import rtrl
from rtrl.cells import load_balancing_loss, router_statistics

Drawn = tuple[rtrl.RecurrentMoE, Tensor, Tensor, rtrl.Sparsity]


@st.composite
def moes(draw: Callable[..., Any]) -> Drawn:
    """A cell, an input, a state, and choices to force on it."""
    heads = draw(st.integers(1, 2))
    n_slots, n_experts = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    reads, seed = draw(st.integers(1, n_slots)), draw(seeds)
    writes, topk = draw(st.integers(1, reads)), draw(st.integers(1, n_experts))
    cell = rtrl.RecurrentMoE(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        d_model=2 * heads,
        n_slots=n_slots,
        n_experts=n_experts,
        topk=topk,
        n_heads=heads,
        read_slots=reads,
        write_slots=writes,
        expert_hidden=draw(st.integers(1, 3)),
        ffn_hidden=draw(st.integers(1, 3)),
        router_output=draw(st.booleans()),
    )
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    shape = (batch, cell.d_in) if tokens == 0 else (batch, tokens, cell.d_in)
    forced = [draw(st.permutations(range(n_slots))) for _ in range(batch)]
    experts = [draw(st.permutations(range(n_experts))) for _ in range(batch)]
    r, k = draw(st.integers(1, n_slots)), draw(st.integers(1, n_experts))
    w = draw(st.integers(0, r))
    index = [
        torch.tensor([own[:size] for own in sets], dtype=torch.int64)
        for sets, size in ((forced, r), (forced, w), (experts, k))
    ]
    return (
        seeded(cell, seed),
        normal(seed, *shape),
        normal(seed + 1, batch, n_slots, cell.d_model),
        cell.choices(*index),
    )


def loops(cell: rtrl.RecurrentMoE, x: Tensor, h: Tensor, forced: rtrl.Sparsity | None) -> Any:
    parameters = {name: p.detach().numpy() for name, p in cell.named_parameters()}
    sizes = {name: getattr(cell, name) for name in ("n_heads", "topk", "read_slots", "write_slots")}
    if forced is not None:
        assert forced.reads is not None
        assert forced.writes is not None
        sizes |= {
            "reads": forced.reads.numpy(),
            "writes": forced.writes.numpy(),
            "experts": forced.active["expert_up"].numpy(),
        }
    return oracles.moe.forward(parameters, x.numpy(), h.numpy(), **sizes)


def sets(index: Any) -> list[set[int]]:
    return [set(own) for own in index.tolist()]


def assert_near(actual: Tensor, expected: np.ndarray[Any, Any]) -> None:
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(
        actual.detach().numpy(), expected, rtol=1e-11, atol=1e-12 * max(1.0, float(np.abs(expected).max(initial=0)))
    )


@given(moes(), st.booleans())
def test_forward_equals_the_numpy_loops(drawn: Drawn, force: bool) -> None:
    cell, x, h, choices = drawn
    y, h_next, used = cell(x, h, replay=choices if force else None)
    expected = loops(cell, x, h, choices if force else None)
    if cell.router_output:
        assert_near(y.router_logits, expected.router_logits)
        assert sets(y.experts) == sets(expected.experts)
        y = y.output
    assert_near(y, expected.y)
    assert_near(h_next, expected.h_next)
    assert sets(used.reads) == sets(expected.reads)
    assert sets(used.writes) == sets(expected.writes)
    assert sets(used.active["expert_up"]) == sets(expected.experts)


@given(moes(), st.booleans())
def test_unwritten_rows_are_copied_bit_for_bit(drawn: Drawn, force: bool) -> None:
    cell, x, h, choices = drawn
    _, h_next, used = cell(x, h, replay=choices if force else None)
    for b in range(h.shape[0]):
        for row in set(range(cell.n_slots)) - sets(used.writes)[b]:
            assert torch.equal(h_next[b, row], h[b, row])


@given(moes())
def test_only_declared_rows_are_read(drawn: Drawn) -> None:
    """Fill every row outside reads and writes with NaN: neither y nor the written rows may notice."""
    cell, x, h, choices = drawn
    y, h_next, used = cell(x, h, replay=choices)
    poisoned = h.clone()
    for b in range(h.shape[0]):
        outside = [row for row in range(cell.n_slots) if row not in sets(used.reads)[b] | sets(used.writes)[b]]
        poisoned[b, outside] = math.nan
    y_again, h_again, _ = cell(x, poisoned, replay=choices)
    for a, b in zip(torch.utils._pytree.tree_leaves(y), torch.utils._pytree.tree_leaves(y_again), strict=True):
        assert torch.equal(a, b)
    written = used.writes.unsqueeze(-1).expand(-1, -1, cell.d_model)
    assert torch.equal(h_next.gather(1, written), h_again.gather(1, written))


@given(moes())
def test_only_active_slices_have_a_gradient(drawn: Drawn) -> None:
    """And not by luck: at least one slice of each declared parameter outside the router has one."""
    cell, x, h, choices = drawn
    for b in range(h.shape[0]):
        one = rtrl.Sparsity(
            choices.reads[b : b + 1], choices.writes[b : b + 1], {n: i[b : b + 1] for n, i in choices.active.items()}
        )
        y, h_next, used = cell(x[b : b + 1], h[b : b + 1], replay=one)
        leaves = [*torch.utils._pytree.tree_leaves(y), h_next]
        total = sum((leaf * normal(7, *leaf.shape)).sum() for leaf in leaves if leaf.is_floating_point())
        names = list(used.active)
        grads = torch.autograd.grad(total, [cell.get_parameter(name) for name in names])
        for name, grad in zip(names, grads, strict=True):
            outside = [i for i in range(grad.shape[0]) if i not in set(used.active[name][0].tolist())]
            assert not grad[outside].count_nonzero(), name
            if name.startswith("expert"):
                assert grad[used.active[name][0]].count_nonzero(), name


@given(moes())
def test_replaying_ones_own_choices_changes_no_bit(drawn: Drawn) -> None:
    cell, x, h, _ = drawn
    y, h_next, used = cell(x, h)
    y_again, h_again, used_again = cell(x, h, replay=used)
    for a, b in zip(
        torch.utils._pytree.tree_leaves((y, h_next, used)),
        torch.utils._pytree.tree_leaves((y_again, h_again, used_again)),
        strict=True,
    ):
        assert torch.equal(a, b)


@given(moes())
def test_samples_do_not_meet(drawn: Drawn) -> None:
    cell, x, h, choices = drawn
    _, together, _ = cell(x, h, replay=choices)
    for b in range(h.shape[0]):
        one = rtrl.Sparsity(
            choices.reads[b : b + 1], choices.writes[b : b + 1], {n: i[b : b + 1] for n, i in choices.active.items()}
        )
        _, alone, _ = cell(x[b : b + 1], h[b : b + 1], replay=one)
        np.testing.assert_allclose(alone[0].detach(), together[b].detach(), rtol=1e-12, atol=1e-13)


@given(moes(), st.randoms())
def test_relabelled_experts_compute_the_same(drawn: Drawn, random: Any) -> None:
    cell, x, h, choices = drawn
    y, h_next, _ = cell(x, h, replay=choices)
    order = list(range(cell.n_experts))
    random.shuffle(order)
    place = torch.tensor(order).argsort()
    with torch.no_grad():
        for name in ("router.weight", "expert_up", "expert_up_bias", "expert_down", "expert_down_bias"):
            parameter = cell.get_parameter(name)
            parameter.copy_(parameter[order].clone())
    moved = cell.choices(choices.reads, choices.writes, place[choices.active["expert_up"]])
    y_again, h_again, _ = cell(x, h, replay=moved)
    assert torch.equal(h_next, h_again)
    value, again = (v.output if cell.router_output else v for v in (y, y_again))
    assert torch.equal(value, again)


def test_initialisation_is_deterministic_under_a_generator() -> None:
    def make(seed: int) -> rtrl.RecurrentMoE:
        return rtrl.RecurrentMoE(
            3, 2, d_model=4, n_slots=3, n_experts=4, topk=2, generator=torch.Generator().manual_seed(seed)
        )

    torch.manual_seed(1)
    first = make(0)
    torch.manual_seed(2)
    second, other = make(0), make(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_choice_of_one_teaches_nothing_about_the_choice() -> None:
    """A softmax over one entry is constant: its parameters receive a gradient of exactly zero."""
    one_slot = {"read_query.weight", "out_query.weight", "out_key.weight"}
    for k, r, silent in ((1, 2, {"router.weight"}), (2, 1, one_slot), (2, 2, set())):
        cell = seeded(rtrl.RecurrentMoE(2, 2, 4, 3, 4, topk=k, read_slots=r, write_slots=1), 1)
        found = oracles.bptt(cell, normal(1, 6, 2, 2), lambda t, y: y.square().sum())
        assert {name for name, g in found.items() if not g.count_nonzero()} == silent


def test_balancing_loss_and_router_statistics() -> None:
    logits = normal(0, 6, 4)
    experts = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0], [2, 0], [0, 1]])
    load = torch.tensor([6, 4, 2, 0], dtype=torch.float64) / 12
    importance = logits.softmax(dim=1).mean(dim=0)
    statistics = router_statistics(logits, experts)
    torch.testing.assert_close(statistics.load, load)
    torch.testing.assert_close(statistics.importance, importance)
    p = logits.softmax(dim=1)
    torch.testing.assert_close(statistics.entropy, -(p * p.log()).sum(dim=1).mean())
    assert statistics.unused == 1
    assert router_statistics(torch.zeros(2, 4), torch.tensor([[0], [1]])).unused == 2
    torch.testing.assert_close(load_balancing_loss(logits, experts), 4 * (load * importance).sum())
    logits.requires_grad_()
    load_balancing_loss(logits, experts).backward()
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == logits.numel()


def test_a_balancing_loss_trains_the_whole_router() -> None:
    """With ``router_output`` every row of the router is active, and its gradient is BPTT's."""
    cell = seeded(rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=5, topk=2, router_output=True), 3)
    xs = normal(5, 9, 2, 2)

    def loss(t: int, y: Any) -> Tensor:
        return y.output.square().sum() + load_balancing_loss(y.router_logits, y.experts)

    learner = rtrl.BlockRTRL(cell, 2, block=4)
    for t, x in enumerate(xs):
        learner.backward(loss(t, learner.step(x)))
    learner.sync()
    expected = oracles.bptt(cell, xs, loss)
    assert bool((expected["router.weight"].abs().sum(dim=1) > 0).all())
    torch.testing.assert_close(cell.router.weight.grad, expected["router.weight"], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_are_carried_through(dtype: torch.dtype, device: torch.device) -> None:
    cell = rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=4, topk=2, device=device, dtype=dtype)
    learner = rtrl.BlockRTRL(cell, 2, block=3)
    for _ in range(7):
        y = learner.step(torch.ones(2, 2, device=device, dtype=dtype))
        assert (y.dtype, y.device.type) == (dtype, device.type)
        learner.backward(y.sum())
    learner.sync()
    for name, p in cell.named_parameters():
        assert p.grad is not None
        assert (p.grad.dtype, p.grad.device.type) == (dtype, device.type), name
        assert (learner.influence(name).dtype, learner.influence(name).device.type) == (dtype, device.type)
