"""Parameters that change under a learner, learners that were saved elsewhere, and the way out of a stuck block."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adversarial_inputs import (
    AT,
    F64,
    NAN,
    B,
    Breakable,
    Plain,
    assert_same,
    attacked,
    finish,
    make,
    mixture,
    plain,
    refused,
    stream,
)
from torch import Tensor, nn

import rtrl
from rtrl.errors import CellError, ConfigError, LossError, NonFiniteError, ParameterChangedError, ShapeError
from rtrl.learners import BPTT

# ---------------------------------------------------------------------- parameters that change inside an open block


def _in_place(cell: Plain) -> None:
    with torch.no_grad():
        cell.head.weight.mul_(2.0)


def _optimizer(cell: Plain) -> None:
    cell.recur.weight.grad = torch.ones_like(cell.recur.weight)
    torch.optim.SGD([cell.recur.weight], lr=0.1).step()
    cell.recur.weight.grad = None


def _new_object(cell: Plain) -> None:
    cell.head.weight = nn.Parameter(cell.head.weight.detach() * 2.0)


CHANGES = [
    pytest.param(
        _in_place, ParameterChangedError, "'head.weight' changed inside the open block of steps 3 … 4", id="in place"
    ),
    pytest.param(_optimizer, ParameterChangedError, "'recur.weight' changed .*call sync", id="optimizer"),
    pytest.param(
        lambda cell: cell.head.bias.add_(1.0), ParameterChangedError, "'head.bias' changed", id="frozen parameter"
    ),
    pytest.param(lambda cell: cell.scale.add_(1.0), ParameterChangedError, "'scale' changed", id="buffer"),
    pytest.param(
        lambda cell: setattr(cell.head.weight, "data", cell.head.weight * 2),
        ParameterChangedError,
        "'head.weight'",
        id="data assigned",
    ),
    pytest.param(
        lambda cell: setattr(cell, "scale", cell.scale * 2),
        ParameterChangedError,
        "'scale' changed",
        id="buffer assigned",
    ),
    pytest.param(
        lambda cell: cell.recur.weight.data.mul_(2.0), CellError, r"steps 3 … 4: .*sync\(\) first", id="data in place"
    ),
    pytest.param(
        lambda cell: cell.head.weight.data.mul_(2.0),
        CellError,
        r"steps 3 … 4: .*a different output.*sync\(\) first",
        id="data in place, read by y alone",
    ),
    pytest.param(
        lambda cell: cell.scale.data.mul_(2.0),
        CellError,
        r"steps 3 … 4: .*a different output.*sync\(\) first",
        id="data of a buffer in place, read by y alone",
    ),
    pytest.param(_new_object, ParameterChangedError, "one was replaced.*make a new learner", id="new object"),
]
CLOSES = [
    pytest.param(lambda learner: learner.sync(), id="sync"),
    pytest.param(lambda learner: learner.influence("enter.weight"), id="influence"),
    pytest.param(lambda learner: learner.reset(), id="reset"),
]
SEEN_AT_ONCE = [case for case in CHANGES if case.values[1] is ParameterChangedError]
ATTACKS = [(*case.values, close.values[0]) for close in CLOSES[:2] for case in CHANGES]
ATTACKS += [(*case.values, CLOSES[2].values[0]) for case in SEEN_AT_ONCE]  # it does not run the block again


@pytest.mark.parametrize(("change", "error", "match", "close"), ATTACKS)
def test_a_parameter_changed_inside_an_open_block_is_refused(change, error, match, close):
    learner, twin, xs = plain(), plain(), stream()
    for one in (learner, twin):
        for x in xs[: AT + 1]:
            one.backward(one.step(x).square().sum())
    held = {
        name: (t, t.data, t.detach().clone())
        for name, t in [*learner.cell.named_parameters(), *learner.cell.named_buffers()]
    }
    change(learner.cell)
    with refused(learner, error, match):
        close(learner)
    for name, (tensor, data, value) in held.items():  # put back what was there; a reload takes its word for it
        owner, _, leaf = name.rpartition(".")
        setattr(learner.cell.get_submodule(owner), leaf, tensor)
        tensor.data = data.copy_(value)
    learner.load_state_dict(learner.state_dict())
    assert_same(finish(learner, xs[AT + 1 :]), finish(twin, xs[AT + 1 :]))


def test_a_parameter_changed_inside_an_open_block_is_refused_by_the_next_step():
    learner = plain()
    learner.step(stream()[0])
    _in_place(learner.cell)
    with refused(learner, ParameterChangedError, "steps 0 … 0"):
        learner.step(stream()[1])


STRANGERS = {
    "replaced": _new_object,
    "all frozen": lambda cell: cell.requires_grad_(False),
    "added": lambda cell: setattr(cell, "extra", nn.Parameter(torch.ones(1, dtype=F64))),
    "removed": lambda cell: delattr(cell, "enter"),
}


@pytest.mark.parametrize("do", [*(case.values[0] for case in CLOSES), lambda learner: learner.step(stream()[1])])
@pytest.mark.parametrize("change", STRANGERS.values(), ids=STRANGERS)
def test_a_parameter_that_the_learner_does_not_know_is_refused(change, do):
    learner = plain()
    learner.backward(learner.step(stream()[0]).sum())
    learner.sync()
    change(learner.cell)
    with refused(learner, ParameterChangedError, "replaced, added or removed.*make a new learner"):
        do(learner)


# ---------------------------------------------------------------------- what was saved


def _saved_by(learner: rtrl.BlockRTRL, steps: int = 2) -> dict[str, Any]:
    for x in stream()[:steps]:
        learner.step(x[:1].expand(learner.batch_size, -1)[:, : learner.cell.enter.in_features])
    return learner.state_dict()


def _of(cell: nn.Module, **arguments: Any) -> rtrl.BlockRTRL:
    return rtrl.BlockRTRL(cell, B, block=3, **arguments)


class Renamed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(1, dtype=F64))


class Factor(nn.Module):
    """A parameter that is met as (4, 2) or, transposed, as (2, 4)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 4, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x[:, :2] @ self.weight.reshape(2, 4))
        return h, h


def _without(saved: dict[str, Any], *path: Any) -> dict[str, Any]:
    """A deep copy that lacks one entry."""
    edited = copy.deepcopy(saved)
    functools.reduce(lambda held, key: held[key], path[:-1], edited).pop(path[-1])
    return edited


def _with(value: Any, saved: dict[str, Any], *path: Any) -> dict[str, Any]:
    """A deep copy with another value in the place of one entry."""
    edited = copy.deepcopy(saved)
    functools.reduce(lambda held, key: held[key], path[:-1], edited)[path[-1]] = value
    return edited


PARTS = [
    ("layout",),
    ("state",),
    ("steps_taken",),
    ("open_steps",),
    ("pending_grads",),
    ("buffers",),
    ("buffers", "accumulated_until"),
    ("buffers", "influences"),
    ("buffers", "history"),
]
WHOLE_NUMBERS = {
    "steps_taken": "'steps_taken' of the saved learner must be a count",
    "accumulated_until": "the parts of the saved learner do not fit together",
}
DAMAGED = "damaged: "
INSIDE = [
    ("layout", "batch_size"),
    ("layout", "parameters", "enter.weight"),
    ("open_steps", 0, "h"),
    ("open_steps", 0, "number"),
    ("buffers", "influences", "enter.weight"),
    ("buffers", "history", "capacity"),
]
SAVED = [
    pytest.param(lambda saved: {}, "this is not a saved learner; pass what state_dict", id="empty"),
    pytest.param(
        lambda saved: {**saved, "format": 1},
        r"saved by rtrl 0\.1\.0, in format 1; this version reads format 2 alone\. Finish the run with that version",
        id="older format",
    ),
    pytest.param(
        lambda saved: {**saved, "format": 3}, "format 3, which this version does not know", id="format of the future"
    ),
    pytest.param(lambda saved: {**saved, "format": "2"}, "this is not a saved learner", id="format in words"),
    pytest.param(
        lambda saved: BPTT(Plain(), B).state_dict(), "learner='BPTT', this one 'BlockRTRL'", id="another rule"
    ),
    pytest.param(
        lambda saved: {**saved, "open_steps": [*saved["open_steps"][:1] * 3, *saved["open_steps"]]},
        ".",
        id="too many steps",
    ),
    pytest.param(
        lambda saved: {**saved, "pending_grads": {"head.bias": torch.zeros(2, dtype=F64)}},
        "the saved gradients are not those of this learner's parameters",
        id="gradient of a frozen parameter",
    ),
    pytest.param(lambda saved: _saved_by(rtrl.BlockRTRL(Plain(), 3, block=3)), "batch_size=3, this one 2", id="batch"),
    pytest.param(lambda saved: _saved_by(plain(block=2)), "block=2, this one 3", id="block"),
    pytest.param(lambda saved: _saved_by(plain(window=5)), "window=5, this one 64", id="window"),
    pytest.param(lambda saved: _saved_by(plain(lazy=False)), "lazy=False, this one True", id="lazy"),
    pytest.param(
        lambda saved: _saved_by(_of(Plain(n=5))),
        r"state='\(2, 5\) torch.float64', this one '\(2, 4\) torch.float64'",
        id="state",
    ),
    pytest.param(
        lambda saved: _saved_by(_of(Renamed())),
        r"parameters=\{'extra': '\(1,\) torch.float64'\}, this one \{\}",
        id="parameters",
    ),
    pytest.param(
        lambda saved: _saved_by(_of(Plain(d_in=2))),
        r"'enter.weight': '\(4, 2\) .*, this one \{'enter.weight': '\(4, 3\) ",
        id="parameter shape",
    ),
    pytest.param(lambda saved: _saved_by(_of(Renamed()), 0), "extra", id="before a step"),
    pytest.param(lambda saved: {**saved, "state": saved["state"].float()}, "float32", id="dtype"),
    *[
        pytest.param(
            lambda saved, path=path: _without(saved, *path),
            f"{DAMAGED}KeyError: '{path[-1]}'",
            id=f"no {'.'.join(path)}",
        )
        for path in PARTS
    ],
    *[
        pytest.param(
            lambda saved, path=path: _with(object(), saved, *path),
            WHOLE_NUMBERS.get(path[-1], DAMAGED),
            id=f"garbage {'.'.join(path)}",
        )
        for path in PARTS
    ],
    *[
        pytest.param(lambda saved, path=path: _without(saved, *path), ".", id=f"no {'.'.join(map(str, path))}")
        for path in INSIDE
    ],
    pytest.param(
        lambda saved: _with(7, saved, "buffers", "history", "capacity"),
        "the saved history holds 7 blocks, not the window of 1",
        id="history of another window",
    ),
    pytest.param(lambda saved: None, "this is not a saved learner", id="none"),
]


@pytest.mark.parametrize(("edit", "match"), SAVED)
def test_what_another_learner_saved_is_refused(edit, match):
    attacked(plain, lambda learner, ys, losses: learner.load_state_dict(edit(learner.state_dict())), ConfigError, match)


TORN: dict[tuple[Any, ...], Callable[[Tensor], Tensor]] = {
    ("state",): lambda state: state * NAN,
    ("open_steps", 0, "h"): lambda h: h[:, :2],
    ("open_steps", 0, "x"): lambda x: x[:1],
    ("buffers", "influences", "enter.weight", "sample"): lambda sample: sample[:1],
    ("buffers", "influences", "enter.weight", "last_block"): lambda clock: clock + 50,
}


@pytest.mark.parametrize(("path", "tear"), TORN.items(), ids=[".".join(map(str, path)) for path in TORN])
def test_a_torn_tensor_of_a_saved_learner_is_refused(path, tear):
    def load(learner: rtrl.BlockRTRL, ys: list[Tensor], losses: list[Tensor]) -> None:
        saved = learner.state_dict()
        held = functools.reduce(lambda held, key: held[key], path[:-1], saved)
        held[path[-1]] = tear(held[path[-1]])
        learner.load_state_dict(saved)

    attacked(plain, load, ConfigError, ".")


def test_what_was_saved_of_a_transposed_parameter_is_refused():
    saved = _of(Factor(2, 4))
    saved.backward(saved.step(stream()[0]).sum())
    saved.step(stream()[1])
    learner = _of(Factor(4, 2))
    with refused(learner, ConfigError, "weight"):
        learner.load_state_dict(saved.state_dict())


def test_a_loss_of_a_y_from_before_a_load_is_refused():
    learner = plain()
    y = learner.step(stream()[0])
    learner.load_state_dict(learner.state_dict())
    with refused(learner, LossError, "does not depend on the y of step 0"):
        learner.backward(y.sum())
    with refused(learner, LossError, "step 0"):
        y.sum().backward()


# ---------------------------------------------------------------------- the way out of a block that cannot close


def _infinite_jacobian(learner: rtrl.BlockRTRL, x: Tensor) -> Tensor:
    learner.influence("enter.weight")  # the good steps' block closes, and nothing is delivered
    learner.cell.broken = True
    return learner.step(x)


def _changed(learner: rtrl.BlockRTRL, x: Tensor) -> Tensor:
    y = learner.step(x)
    with torch.no_grad():
        next(learner.cell.parameters()).mul_(1.5)
    return y


def _infinite_loss(learner: rtrl.BlockRTRL, x: Tensor) -> Tensor:
    y = learner.step(x)
    ((y * 0.0).sum().sqrt()).backward()
    return y


def _rooted(cell: Breakable, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return cell.head(h[:, :2].flatten(1)), torch.tanh(h + cell.zero.sqrt() * h)


STUCK = [
    pytest.param(lambda block: make(_rooted, block), _infinite_jacobian, NonFiniteError, id="infinite Jacobian"),
    pytest.param(lambda block: make(block=block), _changed, ParameterChangedError, id="parameter changed"),
    pytest.param(lambda block: mixture(block=block), _changed, ParameterChangedError, id="parameter of a mixture"),
    pytest.param(lambda block: make(block=block), _infinite_loss, NonFiniteError, id="infinite loss gradient"),
]


def _all_of(learner: rtrl.BlockRTRL) -> dict[str, Tensor | None]:
    parameters = {name: p for name, p in learner.cell.named_parameters() if p.requires_grad}
    influences = {f"influence of {name}": learner.influence(name) for name in parameters}
    return {"state": learner.state, **influences, **{name: p.grad for name, p in parameters.items()}}


@pytest.mark.parametrize(("block", "rows"), [(1, None), (3, torch.ones(B, dtype=torch.bool))], ids=["1", "3, all rows"])
@pytest.mark.parametrize(("build", "stick", "error"), STUCK)
def test_a_block_that_cannot_close_may_be_discarded(build, stick, error, block, rows):
    learner, xs = build(block), stream()
    for x in xs[:AT]:
        learner.backward(learner.step(x).square().sum())
    y = stick(learner, xs[AT])
    for close in (learner.sync, lambda: learner.influence(next(iter(dict(learner.cell.named_parameters()))))):
        with refused(learner, error, "."):
            close()
        if error is not ParameterChangedError:
            learner.reset(torch.tensor([True, False]))
    learner.reset(rows, discard=True)
    learner.cell.broken = False

    fresh = rtrl.BlockRTRL(copy.deepcopy(learner.cell), B, block=block, window=learner.window)
    assert torch.equal(learner.state, fresh.state)
    assert learner.steps_taken == AT + 1
    assert learner.retained_bytes()["block"] == 0
    with refused(learner, LossError, "step 4"):
        y.sum().backward()
    learner.sync()
    assert all(p.grad is None for p in learner.cell.parameters())
    for one in (learner, fresh):
        for x in xs[:AT]:
            one.backward(one.step(x).square().sum())
        one.sync()
    expected = _all_of(fresh)
    assert expected["state"].any()
    for name, value in _all_of(learner).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_discarding_a_block_discards_the_pending_gradients_of_dormant_slices():
    learner = make(block=1)
    for x in stream():
        learner.backward(learner.step(x).square().sum())
    learner.reset(discard=True)
    assert learner.retained_bytes()["gradient"] == 0
    learner.sync()
    assert all(p.grad is None or not p.grad.any() for p in learner.cell.parameters())


def test_a_block_is_discarded_for_all_samples_or_none():
    some = torch.tensor([True, False])
    attacked(
        plain, lambda learner, ys, losses: learner.reset(some, discard=True), ConfigError, "gradients of all samples"
    )


def test_a_refused_first_state_discards_nothing():
    wrong = torch.zeros(B, 5, dtype=F64)
    attacked(plain, lambda learner, ys, losses: learner.reset(state=wrong, discard=True), ShapeError, "must stay")
