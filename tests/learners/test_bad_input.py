"""Bad input: a clear error of the package's own family, before anything has changed."""

from typing import Any

import pytest
import torch
from helpers.adversarial_inputs import (
    D_IN,
    F64,
    INF,
    NAN,
    NOT_INTEGERS,
    B,
    Plain,
    assert_same,
    attacked,
    finish,
    mixture,
    plain,
    refused,
    stream,
)
from torch import Tensor, nn

import rtrl
from rtrl.errors import ConfigError, LossError, NonFiniteError, ShapeError, SparsityError, WindowError


def with_value(value: float) -> Tensor:
    x = torch.zeros(B, D_IN, dtype=F64)
    x[1, 2] = value
    return x


# ---------------------------------------------------------------------- x

XS = [
    pytest.param(
        torch.zeros(3, D_IN, dtype=F64),
        ShapeError,
        r"x must have the batch of 2 as dimension 0, got shape \(3, 3\)",
        id="batch",
    ),
    pytest.param(torch.zeros((), dtype=F64), ShapeError, r"batch of 2 as dimension 0, got shape \(\)", id="scalar"),
    pytest.param(torch.zeros(B, D_IN), ShapeError, r"x is torch.float32, the state torch.float64", id="float32"),
    pytest.param(
        torch.zeros(B, D_IN, dtype=F64, device="meta"), ShapeError, "x is on meta, the state on cpu", id="device"
    ),
    pytest.param(None, ShapeError, "x holds no tensor", id="none"),
    pytest.param("text", ShapeError, "x holds no tensor", id="text"),
    pytest.param({}, ShapeError, "x holds no tensor", id="empty tree"),
    pytest.param(
        [torch.zeros(B, D_IN, dtype=F64), torch.zeros(1, dtype=F64)],
        ShapeError,
        r"got shape \(1,\)",
        id="one leaf of a tree",
    ),
    pytest.param(with_value(NAN), NonFiniteError, r"x at step 5, first at index \(1, 2\)", id="nan"),
    pytest.param(with_value(-INF), NonFiniteError, r"x at step 5, first at index \(1, 2\)", id="infinity"),
]
OWN_XS = [
    pytest.param(torch.zeros(B, 5, dtype=F64), r"x must have shape \(B, 3\)", id="width"),
    pytest.param(torch.zeros(B, D_IN, dtype=torch.int64), "x is torch.int64", id="integer"),
    pytest.param(torch.zeros(B, D_IN, dtype=torch.complex128), "x is torch.complex128", id="complex"),
]


@pytest.mark.parametrize("make", [plain, mixture])
@pytest.mark.parametrize(("x", "error", "match"), XS)
def test_a_wrong_x_is_refused(make, x, error, match):
    attacked(make, lambda learner, ys, losses: learner.step(x), error, match)


@pytest.mark.parametrize(("x", "match"), OWN_XS)
def test_the_mixture_refuses_an_x_that_it_cannot_take(x, match):
    attacked(mixture, lambda learner, ys, losses: learner.step(x), ShapeError, match)


@pytest.mark.parametrize("x", [pytest.param(case.values[0], id=case.id) for case in OWN_XS])
def test_an_x_that_a_cell_cannot_take_is_an_error_of_the_package(x):
    match = rf"step 5: the cell does not take this x \(\(2, \d\) {x.dtype}\) with a state \(2, 4\) torch.float64: mat1"
    attacked(plain, lambda learner, ys, losses: learner.step(x), ShapeError, match)


# ---------------------------------------------------------------------- losses


def _infinite_gradient(y: Tensor) -> Tensor:
    return (y * 0.0).sum().sqrt()


LOSSES = [
    ("constant", lambda ys, added: torch.tensor(1.0, dtype=F64), LossError, "does not depend on the y of step 4"),
    ("number", lambda ys, added: 1.0, LossError, "must be a tensor, got float"),
    ("nothing", lambda ys, added: None, LossError, "must be a tensor, got NoneType"),
    ("per sample", lambda ys, added: ys[-1].sum(dim=1), LossError, r"must be a scalar, got shape \(2,\)"),
    ("empty", lambda ys, added: ys[-1][:0].sum(dim=1), LossError, r"must be a scalar, got shape \(0,\)"),
    ("detached", lambda ys, added: ys[-1].sum().detach(), LossError, "does not depend on the y of step 4"),
    ("of an integer", lambda ys, added: ys[-1].argmax(), LossError, "does not depend on the y of step 4"),
    ("of an earlier open step", lambda ys, added: ys[3].sum(), LossError, "does not depend on the y of step 4"),
    ("of a closed step", lambda ys, added: ys[0].sum(), LossError, "does not depend on the y of step 4"),
    (
        "of this and a closed step",
        lambda ys, added: ys[-1].sum() + ys[0].sum(),
        LossError,
        "reaches the y of step 0, whose block has closed",
    ),
    ("added before", lambda ys, added: added[-1], LossError, "already added at step 4"),
    ("graph used up", lambda ys, added: added[-1] * 1.0, LossError, "loss of step 4 could not be pulled back"),
    ("device", lambda ys, added: ys[-1].sum().to("meta"), LossError, "the loss is on meta, y on cpu"),
    ("complex", lambda ys, added: ys[-1].sum() * 1j, LossError, "loss of step 4 could not be pulled back: .*complex"),
    ("nan", lambda ys, added: ys[-1].sum() * NAN, NonFiniteError, "the loss at step 4"),
    ("infinity", lambda ys, added: ys[-1].sum() / 0.0, NonFiniteError, "the loss at step 4"),
    (
        "infinite gradient",
        lambda ys, added: _infinite_gradient(ys[-1]),
        NonFiniteError,
        "gradient of the loss at y at step 4",
    ),
]


@pytest.mark.parametrize("make", [plain, mixture])
@pytest.mark.parametrize(("loss", "error", "match"), [pytest.param(*case, id=id) for id, *case in LOSSES])
def test_a_wrong_loss_is_refused(make, loss, error, match):
    attacked(make, lambda learner, ys, losses: learner.backward(loss(ys, losses)), error, match)


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        pytest.param(
            lambda ys: _infinite_gradient(ys[-1]), NonFiniteError, "gradient of the loss at y", id="infinite gradient"
        ),
        pytest.param(lambda ys: ys[-1].sum() + ys[0].sum(), LossError, "whose block has closed", id="closed block"),
    ],
)
def test_a_refused_loss_leaves_no_gradient_at_parameters_that_it_reaches_by_itself(loss, error, match):
    def attack(learner: rtrl.BlockRTRL, ys: list[Tensor], losses: list[Tensor]) -> None:
        learner.backward(loss(ys) + learner.cell.enter.weight.square().sum())

    attacked(plain, attack, error, match)


@pytest.mark.parametrize("make", [plain, mixture])
def test_a_plain_backward_into_a_closed_block_is_refused(make):
    attacked(make, lambda learner, ys, losses: ys[0].sum().backward(), LossError, "y of step 0, whose block has closed")


@pytest.mark.parametrize("close", [rtrl.BlockRTRL.sync, lambda learner: learner.influence("enter.weight")])
def test_a_loss_after_its_block_was_closed_by_hand_is_refused(close):
    learner = plain()
    y = learner.step(stream()[0])
    close(learner)
    with refused(learner, LossError, r"call step\(\) first, and add its losses before sync\(\)"):
        learner.backward(y.sum())
    with refused(learner, LossError, "y of step 0, whose block has closed"):
        y.sum().backward()


def test_a_loss_before_the_first_step_and_one_of_another_learner_are_refused():
    learner, other = plain(), plain()
    y = other.step(stream()[0])
    with refused(learner, LossError, "no step that can take a loss"):
        learner.backward(y.sum())
    learner.step(stream()[0])
    with refused(learner, LossError, "does not depend on the y of step 0"):
        learner.backward(y.sum())


def test_a_plain_loss_with_an_infinite_gradient_is_found_when_the_block_closes():
    learner = plain()
    y = learner.step(stream()[0])
    _infinite_gradient(y).backward()
    for close in (learner.sync, lambda: learner.influence("enter.weight")):
        with refused(learner, NonFiniteError, "gradient of the loss at y at step 0"):
            close()
    y.grad = None
    assert_same(finish(learner, stream()[1:]), finish_twin())


def finish_twin() -> list[Any]:
    twin = plain()
    twin.step(stream()[0])
    return finish(twin, stream()[1:])


# ---------------------------------------------------------------------- states, rows, names, sizes

STATES = [
    ("list", [0.0], ShapeError, r"floating-point tensor \(2, n, ...\), got list"),
    ("vector", torch.zeros(B, dtype=F64), ShapeError, r"got torch.float64 \(2,\)"),
    ("batch", torch.zeros(3, 4, dtype=F64), ShapeError, r"got torch.float64 \(3, 4\)"),
    ("integer", torch.zeros(B, 4, dtype=torch.int64), ShapeError, r"got torch.int64 \(2, 4\)"),
    ("nan", torch.full((B, 4), NAN, dtype=F64), NonFiniteError, "the first state"),
    ("infinity", torch.full((B, 4), INF, dtype=F64), NonFiniteError, "the first state"),
]
LIKE = [
    ("rows", torch.zeros(B, 5, dtype=F64), ShapeError, r"must stay \(2, 4\) .*, got \(2, 5\)"),
    ("float32", torch.zeros(B, 4), ShapeError, "must stay .*float64 cpu, got .*float32 cpu"),
    ("device", torch.zeros(B, 4, dtype=F64, device="meta"), ShapeError, "must stay .* cpu, got .* meta"),
]
NO_ROWS = ("no rows", torch.zeros(B, 0, dtype=F64), ShapeError, r"must stay \(2, 4\) .*, got \(2, 0\)")
ROWS = [
    ("list", [True, False], "got list"),
    ("one Boolean", True, "got bool"),
    ("integer", torch.tensor([0, 1]), r"got torch.int64 \(2,\)"),
    ("length", torch.ones(3, dtype=torch.bool), r"got torch.bool \(3,\)"),
    ("matrix", torch.ones(B, 1, dtype=torch.bool), r"got torch.bool \(2, 1\)"),
    ("device", torch.ones(B, dtype=torch.bool, device="meta"), "samples is on meta, the state on cpu"),
]


@pytest.mark.parametrize(("state", "error", "match"), [pytest.param(*case, id=id) for id, *case in STATES])
def test_a_wrong_first_state_is_refused(state, error, match):
    with pytest.raises(error, match=match):
        plain(state=state)


@pytest.mark.parametrize(("state", "error", "match"), [pytest.param(*case, id=id) for id, *case in [*LIKE, NO_ROWS]])
def test_a_first_state_that_does_not_fit_the_cell_is_refused(state, error, match):
    with pytest.raises(error, match=match) as caught:
        plain(state=state)
    assert type(caught.value) is error


@pytest.mark.parametrize(("state", "error", "match"), [pytest.param(*case, id=id) for id, *case in STATES + LIKE])
def test_a_reset_to_a_wrong_state_is_refused(state, error, match):
    attacked(plain, lambda learner, ys, losses: learner.reset(state=state), error, match)


@pytest.mark.parametrize("make", [plain, mixture])
@pytest.mark.parametrize(("rows", "match"), [pytest.param(*case, id=id) for id, *case in ROWS])
def test_wrong_reset_samples_are_refused(make, rows, match):
    attacked(make, lambda learner, ys, losses: learner.reset(rows), ShapeError, match)


@pytest.mark.parametrize("first", [torch.zeros(B, 1, dtype=F64), torch.zeros(B, 4)], ids=["broadcast", "float32"])
def test_a_reset_to_a_first_state_of_another_form_is_refused(first):
    learner = plain(state=torch.zeros(B, 4, dtype=F64))
    learner.step(stream()[0])
    learner.cell.init_state = lambda batch_size: first
    with refused(learner, ShapeError, r"must stay \(2, 4\)"):
        learner.reset(torch.tensor([True, False]))


@pytest.mark.parametrize("name", ["nothing", "head.bias", "", "scale"])
def test_the_influence_of_an_unknown_parameter_is_refused(name):
    attacked(
        plain,
        lambda learner, ys, losses: learner.influence(name),
        ConfigError,
        f"called '{name}'; there are enter.weight",
    )


@pytest.mark.parametrize("size", NOT_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", ["batch_size", "block", "window"])
def test_a_learner_refuses_impossible_sizes(name, size):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {size!r}"):
        rtrl.BlockRTRL(Plain(), **{"batch_size": B, name: size})


def test_a_learner_refuses_what_is_not_a_cell():
    frozen = Plain().requires_grad_(False)
    for cell, match in (
        (torch.tanh, "must be a torch.nn.Module"),
        (frozen, "no parameter that requires a gradient"),
        (nn.Linear(1, 1), "init_state"),
    ):
        with pytest.raises(ConfigError, match=match):
            rtrl.BlockRTRL(cell, B)


# ---------------------------------------------------------------------- replay


@pytest.mark.parametrize(
    ("make", "replay", "error", "match"),
    [
        pytest.param(
            plain, rtrl.Sparsity(), ConfigError, "the cell's forward takes no replay argument", id="not taken"
        ),
        pytest.param(
            mixture, torch.zeros(B, 1), SparsityError, "replay must be rtrl.Sparsity, got Tensor", id="no Sparsity"
        ),
        pytest.param(
            mixture, rtrl.Sparsity([0]), SparsityError, "Sparsity.reads must be a LongTensor.*got list", id="no tensor"
        ),
    ],
)
def test_a_replay_that_cannot_be_is_refused(make, replay, error, match):
    attacked(make, lambda learner, ys, losses: learner.step(stream()[0], replay=replay), error, match)


def test_replayed_indices_may_be_reused_by_the_caller():
    def run(reuse: bool) -> list[Any]:
        learner, rows = mixture(block=4), torch.tensor([[0, 1], [1, 2]])
        for x in stream()[:4]:
            indices = rows if reuse else rows.clone()
            learner.backward(learner.step(x, replay=learner.cell.choices(indices, indices, indices[:, :1])).sum())
            rows.copy_((rows + 1) % 4)
        return finish(learner, stream()[4:])

    assert_same(run(False), run(True))


# ---------------------------------------------------------------------- the segment tree


def tree(**arguments: Any) -> rtrl.CircularSegmentTree[str]:
    full = rtrl.CircularSegmentTree(3, lambda a, b: a + b, "", **arguments)
    for letter in "abcde":
        full.append(letter)
    return full


@pytest.mark.parametrize(
    ("start", "stop", "match"),
    [
        (1, 3, "steps 1 … 2 were requested, but 2 … 4 are held"),
        (-1, 2, "steps -1 … 1 were requested"),
        (4, 6, "steps 4 … 5 were requested"),
        (5, 9, "steps 5 … 8 were requested"),
        (5, 3, "the range 5 … 3 is reversed"),
        (9, -9, "the range 9 … -9 is reversed"),
        pytest.param(2.5, 4, "integer", id="fraction"),
        pytest.param("2", "4", "integer", id="text"),
        pytest.param(None, 4, "integer", id="none"),
    ],
)
@pytest.mark.parametrize("ask", ["query", "nodes"])
def test_a_tree_refuses_ranges_that_it_does_not_hold(ask, start, stop, match):
    held = tree()
    with pytest.raises(WindowError, match=match):
        getattr(held, ask)(start, stop)
    assert (held.query(2, 5), held.oldest, held.stop, len(held)) == ("cde", 2, 5, 3)
    held.append("f")
    assert held.query(3, 6) == "def"


@pytest.mark.parametrize("size", NOT_INTEGERS, ids=repr)
def test_a_tree_refuses_impossible_capacities(size):
    with pytest.raises(ConfigError, match=f"capacity must be a positive integer, got {size!r}"):
        rtrl.CircularSegmentTree(size, lambda a, b: a + b, "")


@pytest.mark.parametrize("start", [True, 2.0, None, "2"], ids=repr)
def test_a_tree_refuses_impossible_starts(start):
    with pytest.raises(ConfigError, match="start"):
        tree(start=start)
