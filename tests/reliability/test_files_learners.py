"""A saved learner: every bit of it counts, every part is checked against the others, and no size in it takes memory."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES
from helpers.toy_cells import PlainRNN, seeded
from reliability.damage import at, hostile, places, put

import rtrl
from rtrl._utils.plain_content import digest
from rtrl.cells import MinGRU
from rtrl.errors import ConfigError
from rtrl.learners import BPTT

F64 = torch.float64


def mixture(**arguments: Any) -> rtrl.BlockRTRL:
    torch.manual_seed(0)
    cell = rtrl.RecurrentMoE(2, 1, d_model=4, n_slots=3, n_experts=4, topk=1, read_slots=1, write_slots=1).to(F64)
    return rtrl.BlockRTRL(cell, 2, **{"block": 2, "window": 3, "audit": "off", **arguments})


def rows(**arguments: Any) -> rtrl.BlockRTRL:
    torch.manual_seed(0)
    return rtrl.BlockRTRL(MinGRU(2, 3).to(F64), 2, **{"block": 2, "audit": "off", **arguments})


def taken(learner: Any, steps: int = 9, start: int = 0) -> Any:
    for t in range(start, start + steps):
        x = torch.full((2, 2), 0.1 * t + 0.2).to(learner.state)
        learner.backward(learner.step(x).square().sum())
    return learner


def gradients(learner: Any) -> list[torch.Tensor]:
    learner.cell.zero_grad()
    learner.sync()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.cell.parameters()]


def forged(saved: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    """A saved learner with another value at a place, and the right digest of that."""
    changed = {name: each for name, each in copy.deepcopy(saved).items() if name != "digest"}
    put(changed, path, value)
    return {**changed, "digest": digest(changed)}


def test_every_changed_field_is_refused_and_changes_nothing() -> None:
    draws = random.Random(0)
    makes: list[Callable[[], Any]] = [mixture, rows]
    makes += [lambda make=case.values[0]: make(seeded(PlainRNN(2, 2), 0), 2) for case in BASELINES[:1]]
    for make in makes:
        learner, twin = taken(make()), taken(make())
        saved = learner.state_dict()
        for path in draws.sample(list(places(saved)), 10):
            value = draws.choice(hostile(at(saved, path), draws))
            changed = put(copy.deepcopy(saved), path, value)
            if digest(changed) == digest(saved):
                continue
            with pytest.raises(ConfigError):
                learner.load_state_dict(changed)
        assert all(torch.equal(a, b) for a, b in zip(gradients(learner), gradients(twin), strict=True))


def test_what_was_changed_on_purpose_is_loaded_without_a_digest() -> None:
    learner = taken(mixture())
    saved = learner.state_dict()
    saved["state"] += 1e-9
    with pytest.raises(ConfigError, match=r"damaged, or was changed.*leave out its 'digest'"):
        learner.load_state_dict(saved)
    del saved["digest"]
    learner.load_state_dict(saved)
    assert torch.equal(learner.state, saved["state"])


def _forgeries(saved: dict[str, Any]) -> list[tuple[tuple[Any, ...], Any, str]]:
    name = next(n for n, held in saved["buffers"]["influences"].items() if held["sliced"] and len(held["sample"]) > 1)
    held, history = saved["buffers"]["influences"][name], saved["buffers"]["history"]
    path, of_history = ("buffers", "influences", name), ("buffers", "history")
    used = held["row"] >= 0
    cols, written = history["blocks"][0][1], history["blocks"][0][0]
    return [
        ((*path, "sample"), held["sample"].flip(0), "not that of the sample"),
        ((*path, "slice"), held["slice"] + 1, "not that of the slice"),
        ((*path, "row"), torch.where(used, 0, -1), "two slices refer to one row"),
        ((*path, "row"), held["row"] - 5, "none that there is"),
        ((*path, "values"), torch.cat([held["values"]] * 50), "damaged"),
        ((*path, "sliced"), 1, "slice by slice"),
        ((*of_history, "capacity"), 10**9, "not the window of 3"),
        ((*of_history, "capacity"), True, "not the window|count"),
        ((*of_history, "start"), -1, "count"),
        ((*of_history, "start"), 10**30, "count"),
        ((*of_history, "bounds"), [10**9, 3], "bound"),
        ((*of_history, "blocks"), history["blocks"] * 9, "blocks, but holds"),
        ((*of_history, "blocks", 0, 1), cols + 7, "must lie in"),
        ((*of_history, "blocks", 0, 1), cols[:, :1] * 0 + (written[:, :1] + 1) % 3, "leave out|fit the state"),
        ((*of_history, "plans", "composed"), [[0, 1]] * 10**4, "at most 3 lists"),
        ((*of_history, "plans", "composed"), [[0, 10**9]], "no node"),
        ((*of_history, "plans", "credits"), [[10**9, 0, 1]], "not that of a node"),
        (("buffers", "accumulated_until"), 99, "do not fit together"),
        (("layout", "window"), 10**9, "call sync"),
        (("layout", "block"), 0, "no learner has"),
        (("layout", "lazy"), 1, "no learner has"),
        (("layout",), {**saved["layout"], "more": 1}, "does not know"),
        (("steps_taken",), 10**30, "count"),
        (("steps_taken",), 1, "do not fit"),
        (("open_steps", 0, "number"), True, "do not fit"),
        (("open_steps", 0, "h"), saved["state"] * float("nan"), "NaN"),
        (("open_steps", 0, "reached"), saved["state"], "are not known"),
        (("first_influence",), {"nobody": saved["state"]}, "damaged|not that of"),
    ]  # fmt: skip


def test_parts_that_do_not_fit_together_are_refused() -> None:
    learner, twin = taken(mixture()), taken(mixture())
    saved = learner.state_dict()
    for path, value, words in _forgeries(saved):
        with pytest.raises(ConfigError, match=words):
            learner.load_state_dict(forged(saved, *path, value=value))
    assert all(torch.equal(a, b) for a, b in zip(gradients(learner), gradients(twin), strict=True))


def test_a_learner_with_a_huge_window_is_loaded_into_a_small_one_without_its_memory() -> None:
    learner = taken(mixture(), 10)
    learner.sync()
    saved = learner.state_dict()
    huge = forged(forged(saved, "layout", "window", value=10**9), "buffers", "history", "capacity", value=10**9)
    huge = forged(huge, "buffers", "history", "plans", value=saved["buffers"]["history"]["plans"])
    other = mixture(window=5)
    other.load_state_dict(huge)
    for one in (learner, other):
        taken(one, 6, 10)
    for a, b in zip(gradients(learner), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_a_history_that_memory_cannot_hold_is_refused_before_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"window=1000000000.*GiB"):
        taken(mixture(window=10**9), 3)


@pytest.mark.parametrize(
    ("make", "dtypes"), [(mixture, (F64, torch.float32)), (rows, (F64, torch.float32)), (rows, (torch.float32, F64))]
)
def test_a_learner_is_loaded_in_another_dtype_at_the_end_of_a_block(make: Any, dtypes: Any) -> None:
    before, after = dtypes
    learner, moved = make().to(before), make().to(before)
    for one in (learner, moved):
        taken(one, 10)
        one.sync()
    other = make().to(after)
    other.load_state_dict(learner.state_dict())
    moved.to(after)
    assert other.state.dtype == after
    for one in (moved, other):
        taken(one, 6, 10)
    assert all(torch.equal(a, b) for a, b in zip(gradients(moved), gradients(other), strict=True))


def test_why_a_learner_is_not_loaded_in_another_dtype() -> None:
    single, double = mixture().to(torch.float32), taken(mixture())
    with pytest.raises(ConfigError, match=r"float64, this one torch.float32, and it has an open block; call sync\(\)"):
        single.load_state_dict(double.state_dict())
    double.sync()
    saved = double.state_dict()
    name = next(iter(saved["buffers"]["influences"]))
    huge = saved["buffers"]["influences"][name]["values"] + 1e300
    with pytest.raises(ConfigError, match=r"values that torch\.float32 cannot hold"):
        single.load_state_dict(forged(saved, "buffers", "influences", name, "values", value=huge))
    held, other = taken(BPTT(seeded(PlainRNN(2, 2), 0), 2)), BPTT(seeded(PlainRNN(2, 2), 0).float(), 2)
    held.sync()
    with pytest.raises(ConfigError, match="steps that were taken in it"):
        other.load_state_dict(held.state_dict())


def test_parameters_frozen_beside_a_structure_are_saved_and_loaded() -> None:
    learner, other = rows(), rows()
    for one in (learner, other):
        taken(one, 4)
        one.sync()
        next(one.cell.parameters()).requires_grad_(False)
        taken(one, 4, 4)
        one.sync()
    fresh = rows()
    next(fresh.cell.parameters()).requires_grad_(False)
    fresh.load_state_dict(learner.state_dict())
    for one in (other, fresh):
        taken(one, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(gradients(other), gradients(fresh), strict=True))


def test_a_digest_depends_on_every_bit_and_on_nothing_else() -> None:
    tree = {"a": torch.tensor([0.0, 1.0]), "b": [1, True, None, "x", (2.5,)], "c": torch.tensor(3)}
    assert digest(tree) == digest(
        {"c": torch.tensor(3), "b": (1, True, None, "x", [2.5]), "a": torch.tensor([0.0, 1.0])}
    )
    for path, value in [
        (("a",), torch.tensor([-0.0, 1.0])), (("a",), torch.tensor([[0.0, 1.0]])), (("a",), torch.tensor([0, 1])),
        (("b", 0), True), (("b", 0), 1.0), (("b", 2), "None"), (("b", 3), b"x"), (("c",), 3), (("b",), []),
    ]:  # fmt: skip
        assert digest(put(copy.deepcopy(tree), path, value)) != digest(tree), path
