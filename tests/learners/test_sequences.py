"""``unroll`` takes the steps that ``step`` takes, bit for bit, with one leaf for each tensor of y."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.exact_learners import EXACT, Make
from helpers.running import gradients
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import oracles
import rtrl
from rtrl.errors import CellError, ConfigError, LossError, NonFiniteError, RTRLError, ShapeError

F64 = torch.float64
FIRST = torch.tensor([True, False])
PARTS = (2, 3, 1, 4, 1, 3, 2)  # two of them after a full block of 5, one of them single steps


def loss(t: int, y: Any) -> Tensor | None:
    y = y if isinstance(y, Tensor) else y["y"] + y["more"][0]
    return None if t % 4 == 1 else (y - 0.1 * t).square().sum()


class Trees(nn.Module):
    """A dict and an index as x, a dict with a list and a name as y."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = PlainRNN(2, 3)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 3), 0.1, dtype=F64)

    def forward(self, x: dict[str, Any], h: Tensor) -> tuple[Any, Tensor]:
        y, h_next = self.cell(x["a"] + x["i"][:, None], h)
        return {"y": y, "more": [h[:, :1].sin(), x["i"]], "name": "a"}, h_next


def trees(xs: Tensor) -> dict[str, Tensor]:
    return {"a": xs, "i": (xs[..., 0] > 0).long()}


def mixture() -> nn.Module:
    return rtrl.RecurrentMoE(2, 1, d_model=2, n_slots=4, n_experts=4, topk=1, read_slots=2, write_slots=1)


def torch_cell(kind: type[nn.Module], readout: nn.Module | None = None) -> nn.Module:
    return rtrl.from_torch(kind(2, 3), readout)  # type: ignore[call-overload, no-any-return]


BITWISE = {
    "dense": lambda: PlainRNN(2, 3),
    "mixture": mixture,
    "lstm": lambda: torch_cell(nn.LSTMCell),
    "trees": Trees,
    "rows": lambda: rtrl.cells.MinGRU(2, 3),
}
FUSED = {
    "rnn": lambda: torch_cell(nn.RNNCell),
    "relu": lambda: rtrl.from_torch(nn.RNNCell(2, 3, nonlinearity="relu", bias=False), nn.Linear(3, 1)),
    "gru": lambda: torch_cell(nn.GRUCell, nn.Linear(3, 2)),
}


def inputs(kind: str) -> Any:
    xs = normal(2, sum(PARTS), 2, 2)
    return trees(xs) if kind == "trees" else xs


def at(tree: Any, index: int | slice) -> Any:
    return pytree.tree_map(lambda value: value[index] if isinstance(value, Tensor) else value, tree)


def run(learner: Any, xs: Any, unrolled: bool, plain: bool = False) -> dict[str, Any]:
    """Everything that can be seen of a learner along parts of a stream, with resets and a sync between them."""
    learner.cell.zero_grad()
    start, ys, opened = 0, [], []
    for i, part in enumerate(PARTS):
        if i in (1, 3):
            learner.reset(FIRST)
        if i == 5:
            learner.sync()
        taken = range(start, start + part)
        y = learner.unroll(at(xs, slice(start, start + part))) if unrolled else None
        of_steps = [at(y, k) if unrolled else learner.step(at(xs, t)) for k, t in enumerate(taken)]
        values = [value for t, of_step in zip(taken, of_steps, strict=True) if (value := loss(t, of_step)) is not None]
        if values and plain:
            torch.stack(values).sum().backward()
        elif values and unrolled:
            learner.backward(torch.stack(values).sum())
        elif values:
            torch.stack(values).sum().backward()
        ys += of_steps
        opened += [learner.state_dict()["open_steps"]]
        start += part
    learner.sync()
    found = {"y": ys, "state": learner.state, "gradients": gradients(learner.cell), "open": opened}
    return {**found, "influences": [learner.influence(name) for name in found["gradients"]]}


def differences(one: Any, two: Any) -> float:
    """The largest difference of two trees; whether a gradient is missing or zero says nothing."""
    flat, others = (pytree.tree_leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in (one, two))
    largest = 0.0
    for a, b in zip(flat, others, strict=True):
        if isinstance(a, str):
            assert a == b
        elif not isinstance(a, Tensor) or a.numel():
            a, b = (torch.as_tensor(0.0 if value is None else value).detach().double() for value in (a, b))
            largest = max(largest, float((a - b).abs().max()))
    return largest


@pytest.mark.parametrize("kind", BITWISE)
def test_bit_for_bit_what_single_steps_give(kind: str) -> None:
    cell, xs = seeded(BITWISE[kind](), 1), inputs(kind)
    make = partial(rtrl.BlockRTRL, cell, 2, block=5, window=2)
    expected = run(make(), xs, unrolled=False)
    for plain in (False, True):
        assert differences(run(make(), xs, unrolled=True, plain=plain), expected) == 0.0
    total = sum(float(gradient.abs().sum()) for gradient in expected["gradients"].values())
    assert total > 0


@pytest.mark.parametrize("kind", FUSED)
def test_up_to_rounding_with_functions_for_sequences(kind: str) -> None:
    cell, xs = seeded(FUSED[kind](), 1), inputs(kind)
    make = partial(rtrl.BlockRTRL, cell, 2, block=5, window=2)
    assert differences(run(make(), xs, unrolled=True), run(make(), xs, unrolled=False)) < 1e-12


@pytest.mark.parametrize("kind", ["dense", "mixture", "gru"])
def test_gradients_are_those_of_an_unrolled_stream(kind: str) -> None:
    cell, xs = seeded({**BITWISE, **FUSED}[kind](), 1), normal(2, 11, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=4, window=2, audit=1)
    for start in range(0, 11, 4):
        ys = learner.unroll(xs[start : start + 4])
        learner.backward((ys - 0.1).square().sum())
        if start == 4:
            ys[1].sum().backward()
    learner.sync()
    exact = oracles.bptt(cell, xs, lambda t, y: (y - 0.1).square().sum() + (y.sum() if t == 5 else 0.0))
    assert_gradients_equal(gradients(cell), exact)


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_every_learner_unrolls_what_its_block_takes(make: Make) -> None:
    cell, xs = seeded(PlainRNN(2, 3), 1), normal(2, 6, 2, 2)
    learner = make(cell, 2)
    for t in range(0, 6, learner.block):
        learner.backward(learner.unroll(xs[t : t + learner.block]).square().sum())
    with pytest.raises(ConfigError, match=f"takes {learner.block} more of block={learner.block}"):
        learner.unroll(normal(3, learner.block + 1, 2, 2))
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, lambda t, y: y.square().sum()))


class Strange(PlainRNN):
    """Does something wrong where x says so."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        y, h_next = super().forward(x, h)
        what = int(x[0, 0])
        if what == 1:
            y = y / 0.0
        if what == 2:
            h_next = h_next / 0.0
        if what == 3:
            y = (y, y)
        if what == 4:
            h += 1.0
        if what == 5:
            h_next = h_next[:, :2]
        if what == 6:
            y = y[:1]
        if what == 7:
            raise ValueError("not this x")
        return y, h_next


WRONG = {
    1: (NonFiniteError, "in y at step 4, first at index"),
    2: (NonFiniteError, "in the next state at step 4"),
    3: (CellError, "step 4: y has another structure"),
    4: (CellError, "step 4: the cell changes the state h in place"),
    5: (CellError, "step 4: the cell turned a state"),
    6: (CellError, "step 4: each tensor of y must have the batch"),
    7: (ShapeError, "step 4: the cell does not take this x"),
}


def refused(learner: Any, xs: Any, error: type[RTRLError], match: str) -> None:
    before = str(learner.state_dict())
    with pytest.raises(error, match=match):
        learner.unroll(xs)
    assert str(learner.state_dict()) == before


@pytest.mark.parametrize("what", WRONG)
def test_a_bad_step_changes_nothing(what: int) -> None:
    learner, xs = rtrl.BlockRTRL(seeded(Strange(2, 3), 1), 2, block=8), normal(2, 6, 2, 2)
    xs[..., 0] = 0.1
    learner.backward(learner.unroll(xs[:2]).sum())
    xs[4, :, 0] = what + 0.5
    refused(learner, xs[2:], *WRONG[what])


def test_bad_inputs_change_nothing() -> None:
    learner, xs = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=4), normal(2, 5, 2, 2)
    learner.unroll(xs[:2])
    bad = xs[:2].clone()
    bad[1, 1, 0] = torch.nan
    refused(learner, bad, NonFiniteError, r"in x at step 3, first at index \(1, 0\)")
    refused(learner, xs[:3], ConfigError, "given 3 steps, but the open block takes 2 more of block=4")
    refused(learner, xs[:0], ShapeError, "with one m, at least 1, got")
    refused(learner, "text", ShapeError, "with one m, at least 1, got no tensor")
    refused(learner, {"a": xs[:1], "b": xs[:2]}, ShapeError, "with one m")
    refused(learner, xs[:2, :1], ShapeError, "x must have the batch of 2 as dimension 0")
    refused(learner, xs[:2].float(), ShapeError, "x is torch.float32")
    refused(learner, xs[:2].clone().requires_grad_(), ConfigError, "x requires grad")


class Quick(PlainRNN):
    """Has an ``unroll`` of its own that may be wrong."""

    def __init__(self, wrong: str) -> None:
        super().__init__(2, 3)
        self.wrong = wrong

    def unroll(self, xs: Tensor, h: Tensor) -> Any:
        ys, states = [], []
        for x in xs:
            y, h = self(x, h)
            ys.append(y)
            states.append(h)
        y, h = torch.stack(ys), torch.stack(states)
        wrong = {
            "none": None, "y": (y * 1.1, h), "state": (y, h * 1.1), "shapes": (y, h[:, :, :2]), "steps": (y[1:], h),
            "alone": h, "infinite": (y, h / 0.0),
        }  # fmt: skip
        return wrong.get(self.wrong, (y, h))


QUICK = {
    "shapes": (CellError, r"Quick.unroll must return states \(2, 2, 3\)"),
    "steps": (CellError, r"Quick.unroll must return y of shape \(2, 2, ...\), got \(1, 2, "),
    "alone": (CellError, r"Quick.unroll must return None or \(ys, states\), got Tensor"),
    "infinite": (NonFiniteError, "the next state at step 2"),
}


@pytest.mark.parametrize("wrong", ["nothing", "none", "y", "state", *QUICK])
def test_an_unroll_of_a_cell_is_held_to_its_steps(wrong: str) -> None:
    cell, xs = seeded(Quick("nothing"), 1), normal(2, 4, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=4)
    learner.backward(learner.unroll(xs[:2]).sum())
    cell.wrong = wrong
    if wrong in QUICK:
        refused(learner, xs[2:], *QUICK[wrong])
        return
    learner.backward(learner.unroll(xs[2:]).sum())
    if wrong in ("y", "state"):
        with pytest.raises(CellError, match="re-running these steps as one batch gave a different"):
            learner.sync()
    else:
        learner.sync()
        assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, lambda t, y: y.sum()))


def test_a_loss_after_the_block_has_closed_is_refused() -> None:
    learner, xs = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=2), normal(2, 5, 2, 2)
    first = learner.unroll(xs[:2])
    second = learner.unroll(xs[2:4])
    with pytest.raises(LossError, match="y of step 1, whose block has closed"):
        first.sum().backward()
    with pytest.raises(LossError, match="does not depend on the y of step 3"):
        learner.backward(first.sum())
    value = second.sum()
    learner.backward(value)
    with pytest.raises(LossError, match="already added at step 3"):
        learner.backward(value)


def test_inputs_that_require_grad_get_theirs() -> None:
    cell, found = seeded(PlainRNN(2, 3), 1), []
    for unrolled in (True, False):
        learner, xs = rtrl.BlockRTRL(cell, 2, block=3, input_grad="block"), normal(2, 6, 2, 2).requires_grad_()
        for start in (0, 3):
            part = (2 * xs)[start : start + 3]
            ys = learner.unroll(part) if unrolled else torch.stack([learner.step(x) for x in part])
            ys.square().sum().backward()
        learner.sync()
        assert xs.grad is not None
        found.append(xs.grad)
    assert torch.equal(*found)


def test_saved_and_copied_inside_a_sequence() -> None:
    cell, xs, found = seeded(PlainRNN(2, 3), 1), normal(2, 8, 2, 2), []
    for way in ("straight", "saved", "copied"):
        mine = copy.deepcopy(cell)
        learner = rtrl.BlockRTRL(mine, 2, block=6)
        learner.backward(learner.unroll(xs[:3]).square().sum())
        if way == "saved":
            saved, learner = learner.state_dict(), rtrl.BlockRTRL(mine, 2, block=6)
            learner.load_state_dict(saved)
        elif way == "copied":
            learner = copy.deepcopy(learner)
        for part in (xs[3:5], xs[5:6], xs[6:]):
            learner.backward(learner.unroll(part).square().sum())
        learner.sync()
        found.append(gradients(learner.cell))
    assert differences(found[0], found[1]) == differences(found[0], found[2]) == 0.0


def test_the_gradients_of_losses_apart_are_of_the_last_step() -> None:
    cell, xs = seeded(PlainRNN(2, 3), 1), normal(2, 4, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=4)
    ys = learner.unroll(xs)
    found = learner.gradients({"a": ys[-1].square().sum()})
    assert_gradients_equal(found["a"], oracles.bptt(cell, xs, lambda t, y: y.square().sum() if t == 3 else None))
    with pytest.raises(LossError, match="'a' depends on the y of an earlier step, too"):
        learner.gradients({"a": ys.sum()})


def test_in_inference_mode_and_before_any_step() -> None:
    cell, xs = seeded(PlainRNN(2, 3), 1), normal(2, 4, 2, 2)
    with torch.inference_mode():
        ys = rtrl.BlockRTRL(cell, 2, block=4).unroll(xs)
    assert ys.requires_grad and ys.is_leaf

    class Draws(PlainRNN):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
            y, h_next = super().forward(x, h)
            return y + torch.rand(()), h_next

    with pytest.raises(CellError, match="draws random numbers"):
        rtrl.BlockRTRL(seeded(Draws(2, 3), 1), 2, block=4).unroll(xs)


def test_there_is_room_for_what_is_left_of_the_block_or_for_the_next_one() -> None:
    learner, xs = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=4), normal(2, 9, 2, 2)
    assert learner.room == 4
    for x in xs[:3]:
        learner.step(x)
    assert learner.room == 1
    with pytest.raises(ConfigError, match="the open block takes 1 more"):
        learner.unroll(xs[3:5])
    learner.unroll(xs[3:4])
    assert learner.at_block_end and learner.room == 4
    learner.unroll(xs[4:8])
    learner.sync()
    assert learner.room == 4
