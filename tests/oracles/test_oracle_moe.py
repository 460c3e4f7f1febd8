"""The mixture in loops: against tensor algebra, against analytic steps, and the properties the page promises."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cells import F64
from hypothesis import given
from hypothesis import strategies as st
from mixture import Mixture, draw_mixture
from numpy.typing import NDArray

import oracles
from oracles import moe

Array = NDArray[np.float64]


class Drawn(NamedTuple):
    parameters: dict[str, Array]
    x: Array
    h: Array
    settings: dict[str, int]

    def run(self, **changes: Any) -> moe.Step:
        return moe.forward(self.parameters, **{"x": self.x, "h": self.h, **self.settings, **changes})


def make(
    seed: int = 0, batch: int = 2, tokens: int = 2, slots: int = 4, experts: int = 4, heads: int = 2, width: int = 2,
    read: int = 3, write: int = 2, topk: int = 2,
) -> Drawn:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    d, read, topk = heads * width, min(read, slots), min(topk, experts)
    parameters = draw_mixture(3, d, slots, experts, 5, 3, 2, g)
    return Drawn(
        {name: p.numpy() for name, p in parameters.items()},
        torch.randn(batch, tokens, 3, generator=g, dtype=F64).numpy(),
        torch.randn(batch, slots, d, generator=g, dtype=F64).numpy(),
        {"n_heads": heads, "topk": topk, "read_slots": read, "write_slots": min(write, read)},
    )


drawn = st.builds(
    make, seed=st.integers(0, 2**20), batch=st.integers(1, 3), tokens=st.integers(1, 3), slots=st.integers(1, 4),
    experts=st.integers(1, 4), heads=st.integers(1, 3), width=st.integers(2, 3), read=st.integers(1, 4),
    write=st.integers(0, 3), topk=st.integers(1, 3),
)  # fmt: skip


def as_module(case: Drawn) -> Mixture:
    s = case.settings
    tensors = {name: torch.from_numpy(p.copy()) for name, p in case.parameters.items()}
    return Mixture(tensors, s["n_heads"], s["topk"], s["read_slots"], s["write_slots"])


def assert_close(a: Array, b: Array, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape and np.isfinite(b).all() and b.any()
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@given(case=drawn)
def test_loops_agree_with_tensor_algebra(case: Drawn) -> None:
    step, cell = case.run(), as_module(case)
    with torch.no_grad():
        (y, logits), h_next = cell(torch.from_numpy(case.x), torch.from_numpy(case.h))
    for ours, theirs in ((step.y, y), (step.router_logits, logits), (step.h_next, h_next)):
        assert_close(ours, theirs.numpy())
    assert cell.chosen is not None
    for chosen, other in zip((step.reads, step.writes, step.experts), cell.chosen, strict=True):
        assert chosen.tolist() == other.tolist()


@given(case=drawn)
def test_properties_of_the_choices(case: Drawn) -> None:
    step = case.run()
    forced = case.run(
        reads=step.reads[:, ::-1], writes=step.writes[:, ::-1], experts=step.experts[:, ::-1],
        read_slots=1, write_slots=0, topk=1,
    )  # fmt: skip
    for field in ("y", "h_next", "router_logits"):
        assert_close(
            getattr(forced, field), getattr(step, field), 1e-13
        )  # in another order, and whatever the settings say
    for b in range(len(case.h)):
        assert set(step.writes[b]) <= set(step.reads[b]) and len(set(step.reads[b])) == case.settings["read_slots"]
        kept = [j for j in range(case.h.shape[1]) if j not in step.writes[b]]
        assert step.h_next[b, kept].tobytes() == case.h[b, kept].tobytes()
        assert all(np.abs(step.h_next[b, j] - case.h[b, j]).min() > 0 for j in step.writes[b])
        alone = case.run(x=case.x[b : b + 1], h=case.h[b : b + 1])
        assert all(np.array_equal(one[0], many[b]) for one, many in zip(alone, step, strict=True))


@given(case=drawn, seed=st.integers(0, 2**20))
def test_names_of_slots_experts_and_tokens_do_not_matter(case: Drawn, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots, experts = rng.permutation(case.h.shape[1]), rng.permutation(len(case.parameters["router.weight"]))
    p = dict(case.parameters)
    p["slot_embedding"] = p["slot_embedding"][slots]
    for name in ("router.weight", "expert_up", "expert_up_bias", "expert_down", "expert_down_bias"):
        p[name] = p[name][experts]
    step = case.run()
    moved = moe.forward(p, case.x[:, rng.permutation(case.x.shape[1])], case.h[:, slots], **case.settings)
    assert_close(moved.y, step.y)
    assert_close(moved.h_next, step.h_next[:, slots])
    assert_close(moved.router_logits, step.router_logits[:, experts])
    assert np.array_equal(slots[moved.reads], step.reads) and np.array_equal(slots[moved.writes], step.writes)
    assert np.array_equal(experts[moved.experts], step.experts)


def test_what_is_not_chosen_is_not_looked_at() -> None:
    case = make(batch=1)
    choice: dict[str, Any] = {"reads": [[2, 0]], "writes": [[0]], "experts": [[3, 1]]}
    clean = case.run(**choice)
    p, h = {name: value.copy() for name, value in case.parameters.items()}, case.h.copy()
    p["slot_embedding"][[1, 3]] = np.nan
    h[:, [1, 3]] = np.nan
    for name in ("router.weight", "expert_up", "expert_up_bias", "expert_down", "expert_down_bias"):
        p[name][[0, 2]] = np.nan
    poisoned = moe.forward(p, case.x, h, **case.settings, **choice)
    assert np.array_equal(poisoned.y, clean.y) and np.isfinite(clean.y).all()
    assert np.array_equal(poisoned.h_next[:, [0, 2]], clean.h_next[:, [0, 2]])
    assert np.isnan(poisoned.h_next[:, [1, 3]]).all()


@pytest.mark.parametrize("name", sorted(make().parameters))
def test_every_parameter_matters(name: str) -> None:
    case = make(slots=2, experts=2, read=2, write=2)
    step = case.run()
    p = case.parameters[name]
    moved = p + 0.3 * np.cos(np.arange(p.size)).reshape(p.shape)
    other = moe.forward({**case.parameters, name: moved}, case.x, case.h, **case.settings)
    assert np.abs(other.y - step.y).max() > 1e-3


def test_write_in_closed_form() -> None:
    case = make(heads=1, width=2, slots=3, read=2, write=1)
    p = {name: np.zeros_like(value) for name, value in case.parameters.items()}
    p["candidate.bias"], p["gate.bias"] = np.array([0.5, -1.0]), np.array([2.0, 0.0])
    p["head.bias"] = np.array([3.0, -4.0])
    step = moe.forward(p, case.x, case.h, **case.settings)
    gate = 1 / (1 + np.exp(-p["gate.bias"]))
    assert step.reads.tolist() == [[0, 1]] * 2 and step.writes.tolist() == [[0]] * 2  # ties: the lower index first
    assert step.experts.tolist() == [[0, 1]] * 2 and not step.router_logits.any()
    assert_close(step.h_next[:, 0], case.h[:, 0] + gate * (np.tanh(p["candidate.bias"]) - case.h[:, 0]), 1e-15)
    assert np.array_equal(step.h_next[:, 1:], case.h[:, 1:])
    assert np.array_equal(step.y, [[3.0, -4.0]] * 2)


def test_read_experts_and_head_in_closed_form() -> None:
    # One slot, one expert, no attention: z̄ = h + E + bias of the expert, and y = rms(z̄).
    case = make(heads=1, width=2, slots=1, experts=1, batch=1, write=0)
    p = {name: np.zeros_like(value) for name, value in case.parameters.items()}
    p["slot_embedding"] = np.array([[0.25, -0.5]])
    p["expert_down_bias"] = np.array([[1.0, 2.0]])
    p["head.weight"] = np.eye(2)
    step = moe.forward(p, case.x, case.h, **case.settings)
    z = case.h[0, 0] + [1.25, 1.5]
    assert_close(step.y[0], z / np.sqrt((z @ z) / 2 + 1e-6), 1e-15)
    assert step.writes.shape == (1, 0) and np.array_equal(step.h_next, case.h)


def test_attention_scale_and_shares_in_closed_form() -> None:
    # Two slots with scores of known difference: z_j = 2 p_j (h_j + E_j), seen through a head that passes rms(z̄).
    case = make(heads=1, width=4, slots=2, read=2, write=0, batch=1, tokens=1)
    p = {name: np.zeros_like(value) for name, value in case.parameters.items()}
    p["embed.bias"] = np.array([1.0, 0.0, 0.0, 0.0])
    p["read_query.weight"] = np.eye(4)
    p["head.weight"] = np.eye(4)[:2]
    h = np.array([[[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]])  # scores 2/√4 = 1 and 0
    step = moe.forward(p, case.x, h, **case.settings)
    share = np.e / (1 + np.e)
    z = share * h[0, 0] + (1 - share) * h[0, 1]  # the mean of 2 p_j h_j
    assert_close(step.y[0], (z / np.sqrt((z @ z) / 4 + 1e-6))[:2], 1e-15)


def test_one_token_may_come_without_its_axis() -> None:
    case = make(tokens=1)
    assert all(np.array_equal(a, b) for a, b in zip(case.run(), case.run(x=case.x[:, 0]), strict=True))


@pytest.mark.parametrize("method", ["bptt", "dense_rtrl"])
def test_gradients_of_the_mixture(method: str) -> None:
    case = make(batch=2, slots=3, read=2, write=1, experts=3)
    cell = as_module(case)
    g = torch.Generator().manual_seed(3)
    xs = torch.randn(4, 2, 2, 3, generator=g, dtype=F64)

    def loss_fn(t: int, y: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | None:
        return None if t == 1 else y[0].pow(2).sum() + y[1].logsumexp(1).mean()

    gradients = getattr(oracles, method)(cell, xs, loss_fn)
    assert all(bool(v.any()) for v in gradients.values())
    for _ in range(4):
        direction = {name: torch.randn(v.shape, generator=g, dtype=F64) for name, v in gradients.items()}
        value, error = oracles.directional_difference(cell, xs, loss_fn, direction)
        exact = sum(float((gradients[name] * d).sum()) for name, d in direction.items())
        assert abs(value - exact) <= error <= 1e-6 * abs(exact)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("need", {"n_heads": 3}),
    ("need", {"n_heads": 0}),
    ("need", {"topk": 5}),
    ("need", {"topk": 0}),
    ("need", {"read_slots": 5}),
    ("need", {"write_slots": 4}),
    ("need", {"write_slots": -1}),
    ("at least 1", {"read_slots": 0, "write_slots": 0}),
    ("x must", {"x": np.zeros(3)}),
    ("x must", {"x": np.zeros((3, 2, 3))}),
    ("x must", {"h": np.zeros((2, 4))}),
    ("wrong shape", {"x": np.zeros((2, 4))}),
    ("wrong shape", {"h": np.zeros((2, 3, 4))}),
    ("integers", {"reads": [[0, 4]] * 2}),
    ("integers", {"reads": [[0, -1]] * 2}),
    ("integers", {"experts": [[0.5]] * 2}),
    ("integers", {"experts": [[4]] * 2}),
    ("twice", {"reads": [[1, 1]] * 2}),
    ("shape", {"reads": [[0, 1]]}),
    ("shape", {"reads": np.zeros((2, 0), int)}),
    ("shape", {"writes": [0, 1]}),
    ("among", {"reads": [[0, 1]] * 2, "writes": [[2]] * 2}),
    ("only 1", {"reads": [[0]] * 2}),
]


@pytest.mark.parametrize(("match", "changes"), BAD)
def test_bad_input(match: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        make().run(**changes)


@pytest.mark.parametrize("name", ["embed.bias", "router.weight", "gate.weight"])
def test_bad_parameters(name: str) -> None:
    case = make()
    rest = {n: p for n, p in case.parameters.items() if n != name}
    for wrong in (rest, {**case.parameters, "query.bias": np.zeros(4)}, {**rest, name: np.zeros((7, 7))}):
        with pytest.raises(ValueError, match=r"lack|missing, unknown or of a wrong shape"):
            case._replace(parameters=wrong).run()
