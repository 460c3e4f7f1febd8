"""Learners that use a cell's structure: copied, saved, moved, frozen in part, reset, asked for losses apart, in little
memory."""

import copy
from typing import Any

import pytest
import torch
from helpers import structured_cells as cells
from helpers.running import run, trainable
from helpers.strategies import Case
from helpers.structured_cases import LAYERS, D, both_ways, drawn, routes, stack
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from helpers.unlasting_cells import Opening
from torch import Tensor

import oracles
import rtrl


def advance(learner: Any, case: Case, steps: range) -> None:
    for t in steps:
        y = learner.step(case.xs[t])
        loss = case.loss(t, y)
        if loss is not None:
            learner.backward(loss)


def delivered(learner: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    learner.sync()
    named = trainable(learner.cell)
    return {n: p.grad.clone() for n, p in named.items()}, {n: learner.influence(n) for n in named}


@pytest.mark.parametrize("opens", [False, True])
def test_a_copy_in_mid_stream_goes_on_alike_and_apart(opens: bool) -> None:
    case = drawn(Opening(D, 3) if opens else stack(["minGRU", "peephole"], 2), steps=9)
    case.xs[:5, :, 0] = -case.xs[:5, :, 0].abs()
    expected, influences = oracles.dense_rtrl(case.cell, case.xs, case.loss, return_influence=True)
    for options in both_ways(case.options):
        case.cell.zero_grad()
        learner = rtrl.BlockRTRL(case.cell, 2, **options)
        advance(learner, case, range(4))
        twin = copy.deepcopy(learner)
        for one in (learner, twin):
            advance(one, case, range(4, 9))
            gradients, found_influences = delivered(one)
            assert_gradients_equal(gradients, expected)
            assert_influences_equal(found_influences, influences[-1])


@pytest.mark.parametrize("order", [(True, False, True), (False, True, True)])
def test_parameters_frozen_and_trained_again_in_mid_stream(order: tuple[bool, ...]) -> None:
    """What a frozen parameter would have learned meanwhile is not learned: its influence is what it was, moved on."""
    case = drawn(stack(["minGRU", "two widths"], 2), steps=9)
    name, results = "layers.0.both.weight", []
    for options in both_ways(case.options):
        case.cell.zero_grad()
        learner = rtrl.BlockRTRL(case.cell, 2, **options)
        for trained, steps in zip(order, (range(3), range(3, 6), range(6, 9)), strict=True):
            learner.sync()
            case.cell.get_parameter(name).requires_grad_(trained)
            advance(learner, case, steps)
        results.append(delivered(learner))
    for gradients, influences in results[1:]:
        assert_gradients_equal(gradients, results[0][0])
        assert_influences_equal(influences, results[0][1])


@pytest.mark.parametrize("kinds", [["columns"], ["minGRU", "complex planes"]], ids=["columns", "layers"])
def test_an_audit_of_every_block_agrees(kinds: list[str]) -> None:
    case = drawn(stack(kinds, 2, readout=True))
    expected = oracles.bptt(case.cell, case.xs, case.loss)
    for options in both_ways(case.options):
        assert_gradients_equal(run(case.cell, case.xs, case.loss, audit=1, **options).gradients, expected)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize(("first", "second"), [("find", "off"), ("off", "find"), ("find", "find")])
def test_saved_with_one_setting_and_loaded_into_another_it_is_exact(first: str, second: str, opens: bool) -> None:
    """Into blocks of another length; and where the structure has broken before the save."""
    saved_at = 6 if opens else 3
    case = drawn(Opening(D, 3) if opens else stack(["minGRU", "peephole"], 2), steps=10)
    case.xs[:5, :, 0] = -case.xs[:5, :, 0].abs()
    expected, influences = oracles.dense_rtrl(case.cell, case.xs, case.loss, return_influence=True)
    case.cell.zero_grad()
    learner = rtrl.BlockRTRL(case.cell, 2, block=3, structure=first)
    advance(learner, case, range(saved_at))
    other = rtrl.BlockRTRL(case.cell, 2, block=2, structure=second)
    learner.sync()
    other.load_state_dict(learner.state_dict())
    advance(other, case, range(saved_at, 10))
    gradients, found_influences = delivered(other)
    assert_gradients_equal(gradients, expected)
    assert_influences_equal(found_influences, influences[-1])


def test_a_state_saved_of_one_structure_is_refused_by_a_cell_of_another_or_exact() -> None:
    """Two cells with the same parameters and states; in the second one rows see one another."""
    case = drawn(Opening(D, 3), steps=10)
    case.xs[..., 0] = -case.xs[..., 0].abs()
    learner = rtrl.BlockRTRL(case.cell, 2, block=2)
    advance(learner, case, range(6))
    learner.sync()
    case.cell.what = "zero"
    other = rtrl.BlockRTRL(case.cell, 2, block=2)
    other.load_state_dict(learner.state_dict())
    before = {name: learner.influence(name) for name in trainable(case.cell)}
    advance(other, case, range(6, 10))
    other.sync()
    h, expected = learner.state.requires_grad_(), dict(before)
    for x in case.xs[6:]:
        h_next = case.cell(x, h)[1]
        for name, p in trainable(case.cell).items():
            rows = [
                torch.autograd.grad(h_next[b, i], [h, p], retain_graph=True, materialize_grads=True)
                for b in range(2)
                for i in range(3)
            ]
            dynamics = torch.stack([row[0][b] for row, b in zip(rows, (0, 0, 0, 1, 1, 1), strict=True)]).view(2, 3, 3)
            immediate = torch.stack([row[1].flatten() for row in rows]).view(2, 3, -1)
            expected[name] = dynamics @ expected[name] + immediate
        h = h_next.detach().requires_grad_()
    assert_influences_equal({name: other.influence(name) for name in expected}, expected)


@pytest.mark.parametrize("kind", ["eLSTM", "complex pairs", "two layers"])
def test_losses_apart_and_by_sample(kind: str) -> None:
    cell = stack(["minGRU", "bmm"], 2, readout=True) if kind == "two layers" else LAYERS[kind](D, 3)
    case = drawn(cell, steps=7)
    heads = {"all": lambda y: y.square().sum(), "one": lambda y: y[:, 0].sum()}
    for options in both_ways(case.options):
        learner = rtrl.BlockRTRL(case.cell, 2, **options)
        for x in case.xs:
            y = learner.step(x)
        apart = learner.gradients({name: head(y) for name, head in heads.items()})
        by_sample = learner.gradients({"all": y.square().sum()}, per_sample=True)["all"]
        for name, head in heads.items():
            last = oracles.bptt(case.cell, case.xs, lambda t, y, head=head: head(y) if t == 6 else None)
            assert_gradients_equal(apart[name], last)
        for b in range(2):
            last = oracles.bptt(case.cell, case.xs[:, b : b + 1], lambda t, y: y.square().sum() if t == 6 else None)
            assert_gradients_equal({name: value[b] for name, value in by_sample.items()}, last)


@pytest.mark.parametrize("kinds", [["eLSTM"], ["minGRU", "peephole"]], ids=["rows", "layers"])
def test_sequences_at_hand_with_a_reset_between_them(kinds: list[str]) -> None:
    case = drawn(stack(kinds, 2), steps=8)
    flags = torch.zeros(8, 2, dtype=torch.bool)
    flags[6, 1] = True
    expected, influences = oracles.dense_rtrl(case.cell, case.xs, case.loss, resets=flags, return_influence=True)
    case.cell.zero_grad()
    learner = rtrl.BlockRTRL(case.cell, 2, block=4)
    for start, stop in ((0, 4), (4, 6), (6, 8)):
        if bool(flags[start].any()):
            learner.reset(flags[start])
        losses = [case.loss(t, y) for t, y in zip(range(start, stop), learner.unroll(case.xs[start:stop]), strict=True)]
        learner.backward(sum(loss for loss in losses if loss is not None))
    gradients, found = delivered(learner)
    assert_gradients_equal(gradients, expected)
    assert_influences_equal(found, influences[-1])


def test_the_gradient_at_x_inside_a_block() -> None:
    case = drawn(stack(["minGRU", "peephole"], 2), steps=3)
    found = []
    for options in both_ways({}):
        x = case.xs.clone().requires_grad_()
        learner = rtrl.BlockRTRL(case.cell, 2, block=3, input_grad="block", **options)
        for t in range(3):
            learner.backward(learner.step(x[t]).square().sum())
        learner.sync()
        found.append(x.grad)
    x, total, h = case.xs.clone().requires_grad_(), 0, case.cell.init_state(2)
    for t in range(3):
        y, h = case.cell(x[t], h)
        total = total + y.square().sum()
    total.backward()
    for grad in found:
        assert_gradients_equal({"x": grad}, {"x": x.grad})


def test_it_is_moved_to_single_precision_and_back() -> None:
    case = drawn(stack(["minGRU", "two widths"], 2), steps=9)
    expected, influences = oracles.dense_rtrl(case.cell, case.xs, case.loss, return_influence=True)
    case.cell.zero_grad()
    learner = rtrl.BlockRTRL(case.cell, 2, block=3)
    advance(learner, case, range(6))
    learner.sync()
    learner.to(torch.float32).to(torch.float64)
    advance(learner, case, range(6, 9))
    gradients, found = delivered(learner)
    assert_gradients_equal(gradients, expected, relative=1e-4)
    assert_influences_equal(found, influences[-1], relative=1e-4)


def test_an_error_in_mid_block_changes_nothing_and_discarding_goes_on() -> None:
    case = drawn(stack(["minGRU", "peephole"], 2), steps=9)
    learner = rtrl.BlockRTRL(case.cell, 2, block=3)
    advance(learner, case, range(4))
    with torch.no_grad():
        case.cell.layers[0].both.weight.add_(1.0)
    with pytest.raises(rtrl.errors.ParameterChangedError):
        learner.sync()
    with torch.no_grad():
        case.cell.layers[0].both.weight.sub_(1.0)
    learner.reset(discard=True)
    case.cell.zero_grad()
    advance(learner, case, range(4, 9))
    expected, influences = oracles.dense_rtrl(
        case.cell, case.xs[4:], lambda t, y: case.loss(t + 4, y), return_influence=True
    )
    gradients, found = delivered(learner)
    assert_gradients_equal(gradients, expected)
    assert_influences_equal(found, influences[-1])


# ---------------------------------------------------------------------- that it is used

WITHOUT = {"normed", "placed"}
"""All their parameters reach all rows: there is nothing to gain."""


def used(cell: Any, structure: str, *, steps: int = 6, dtype: torch.dtype = torch.float64) -> rtrl.BlockRTRL:
    case = drawn(cell, steps=steps)
    learner = rtrl.BlockRTRL(case.cell.to(dtype), 2, block=2, structure=structure)
    for x in case.xs.to(dtype):
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    return learner


def kept(learner: rtrl.BlockRTRL) -> float:
    """Numbers of all influences for each parameter element and sample."""
    elements = 2 * sum(p.numel() for p in learner.cell.parameters())
    return learner.retained_bytes()["influence"] / learner.state.element_size() / elements


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in WITHOUT])
def test_structure_is_found_and_used(kind: str) -> None:
    """At most three numbers for each parameter element and entry of its row. The control: not looked for, it is not
    found, and H numbers are kept."""
    layer = LAYERS[kind](D, 12)
    learner, off = used(layer, "find"), used(layer, "off")
    assert learner.structure is not None and off.structure is None
    width = 6 if kind == "rolled start" else 3 * layer.width
    assert kept(learner) <= width + 0.5
    assert kind == "eLSTM" or kept(off) > width + 0.5  # half of its parameters reach y alone


def test_layers_keep_what_crosses_between_them_and_no_more() -> None:
    """The lower layer's influence on the upper one is dense, all others are one number an element; and as much again is
    staged while a block closes."""
    n = 12
    learner = used(stack(["minGRU", "minGRU"], n), "find")
    low, high = (sum(p.numel() for p in layer.parameters()) for layer in learner.cell.layers)
    numbers = learner.retained_bytes()["influence"] / 8 / 2
    assert n * low + low + high <= numbers <= 2 * (n * low + low + high)


def test_without_structure_there_is_none() -> None:
    assert used(cells.Dense(D, 4), "find").structure is None
    assert used(stack(["minGRU"], 4), "find").structure is not None


@pytest.mark.parametrize("kind", ["minGRU", "trace unit", "columns"])
def test_rounding_is_not_taken_for_a_coupling(kind: str) -> None:
    learner = used(LAYERS[kind](D, 8), "find", steps=40, dtype=torch.float32)
    assert learner.structure is not None and kept(learner) <= 6.5


@pytest.mark.parametrize("what", ["state", "drive", "moved"])
def test_where_it_breaks_it_is_given_up(what: str) -> None:
    """From then on the influence is kept on more rows."""
    case = drawn(Opening(D, 6, what), steps=8)
    case.xs[:4, :, 0] = -case.xs[:4, :, 0].abs()
    case.xs[4:, :, 0] = case.xs[4:, :, 0].abs()
    learner = rtrl.BlockRTRL(case.cell, 2, block=2)
    advance(learner, case, range(4))
    learner.sync()
    before = kept(learner)
    advance(learner, case, range(4, 8))
    learner.sync()
    assert before <= 2.5 < 4 < kept(learner)


class Undeclared(cells.Routed):
    """The same rows, and no word of its experts."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, new, _ = super().forward(x, h)
        return y, new


def test_structure_is_not_used_beside_declared_sparsity() -> None:
    for declares in (True, False):
        cell = cells.Routed(writes=False) if declares else Undeclared(writes=False)
        learner = rtrl.BlockRTRL(drawn(cell).cell, 2, block=2)
        for x in routes(4):
            learner.step(x)
        learner.sync()
        assert (learner.structure is None) == declares


def test_without_an_open_step_nothing_is_found() -> None:
    learner = rtrl.BlockRTRL(seeded(LAYERS["minGRU"](D, 3), 1), 2, block=2)
    assert learner.find_structure() is None
    learner.step(torch.ones(2, D, dtype=torch.float64))
    assert learner.find_structure() is not None and learner.structure is None


def test_the_rows_of_a_stack_are_found_where_a_layer_declares_nothing() -> None:
    for declares in (True, False):
        layers = [rtrl.cells.MinGRU(D, 4), rtrl.cells.MinGRU(4, 4)]
        for layer in layers if not declares else []:
            layer.row_groups = None  # type: ignore[assignment]
        learner = rtrl.BlockRTRL(rtrl.Stack(layers), 2)
        learner.step(torch.ones(2, D))
        found = learner.find_structure()
        assert found is not None and [len(group) for group in found.groups] == [4, 4]


def test_a_structure_of_another_cell_is_refused_before_the_first_step() -> None:
    def found(n: int, kind: str = "minGRU") -> Any:
        learner = rtrl.BlockRTRL(seeded(LAYERS[kind](D, n), 1), 2)
        learner.step(torch.ones(2, D, dtype=torch.float64))
        return learner.find_structure()

    cell = seeded(LAYERS["minGRU"](D, 3), 1)
    for structure in (found(4), found(3, "eLSTM")):
        with pytest.raises(rtrl.errors.ConfigError, match="structure is that of another cell"):
            rtrl.BlockRTRL(cell, 2, structure=structure)
    learner = rtrl.BlockRTRL(cell, 2, structure=found(3))
    learner.step(torch.ones(2, D, dtype=torch.float64))
    learner.sync()
    assert learner.structure is not None


class _LearnedStart(rtrl.cells.MinGRU):
    def __init__(self) -> None:
        super().__init__(D, 3)
        self.start = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 3))

    def init_state(self, batch_size: int) -> Tensor:
        return self.start.expand(batch_size, 3)


def test_a_first_state_that_is_learned_later_is_exact() -> None:
    cell = _LearnedStart().double()
    cell.start.requires_grad_(False)
    learner = rtrl.BlockRTRL(cell, 2, block=2)
    x = torch.ones(2, D, dtype=torch.float64)
    for _ in range(3):
        learner.step(x)
    learner.sync()
    assert learner.structure is not None
    cell.start.requires_grad_()
    learner.reset()
    h = cell.start.expand(2, 3)
    for _ in range(5):
        y = learner.step(x)
        h = cell(x, h)[1]
    learner.backward(y.sum())
    learner.sync()
    (expected,) = torch.autograd.grad(h.sum(), [cell.start])
    assert cell.start.grad is not None
    torch.testing.assert_close(cell.start.grad, expected, rtol=1e-10, atol=0)
