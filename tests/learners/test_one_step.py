"""An update after every step: single dense steps are processed in a way of their own, with the same result."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.analytic_cells import TwoMaps
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl._engine.one_step import OneStep
from rtrl._influence.joint import JointInfluence
from rtrl.errors import NonFiniteError, ParameterChangedError, PerformanceWarning

STEPS = 7


def of(kind: Any, readout: bool) -> nn.Module:
    return seeded(rtrl.cells.from_torch(kind(2, 3), nn.Linear(3, 2) if readout else None), 1)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: of(nn.RNNCell, False),
    "relu": lambda: of(functools.partial(nn.RNNCell, nonlinearity="relu", bias=False), True),
    "gru": lambda: of(nn.GRUCell, False),
    "gru with a readout": lambda: of(nn.GRUCell, True),
    "lstm": lambda: of(nn.LSTMCell, False),
    "y of both states": lambda: seeded(TwoMaps(), 1),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each step that was processed in the way of its own."""
    taken: list[int] = []
    process = OneStep.process

    def counting(self: OneStep, step: Any, *others: Any) -> Any:
        found = process(self, step, *others)
        if found is not None:
            taken.append(step.number)
        return found

    monkeypatch.setattr(OneStep, "process", counting)
    return taken


def loss(t: int, y: Any) -> Tensor | None:
    if t % 4 == 2:
        return None
    leaves = torch.utils._pytree.tree_leaves(y)
    return torch.stack([(leaf.square() + leaf).sum() for leaf in leaves]).sum() + leaves[0].mean(dim=0).prod()


def xs_for(cell: nn.Module, batch: int, steps: int = STEPS) -> Tensor:
    return normal(3, steps, batch, 3 if isinstance(cell, TwoMaps) else 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_with_an_update_after_every_step_gradients_and_influences_are_exact(
    name: str, batch: int, counted: list[int]
) -> None:
    cell = CELLS[name]()
    xs, first = xs_for(cell, batch), {n: p.detach().clone() for n, p in cell.named_parameters()}
    learner = rtrl.BlockRTRL(cell, batch)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.05)
    moves, delivered = list[dict[str, Tensor]](), list[dict[str, Tensor]]()
    for t, x in enumerate(xs):
        moves.append({n: p.detach() - first[n] for n, p in cell.named_parameters()})
        y = learner.step(x)
        if (of_step := loss(t, y)) is not None:
            learner.backward(of_step)
        learner.sync()
        delivered.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in cell.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    assert counted == [3, 4, 5, 6]
    found = {n: learner.influence(n) for n in first}
    with torch.no_grad():
        for n, p in cell.named_parameters():
            p.copy_(first[n])
    upto = [
        oracles.dense_rtrl(cell, xs[:t], loss, offsets=moves[:t], return_influence=True) for t in range(1, STEPS + 1)
    ]
    for t in range(1, STEPS):
        expected = {n: upto[t][0][n] - upto[t - 1][0][n] for n in first}
        assert_gradients_equal(delivered[t], expected, may_be_zero=True)
    assert_influences_equal(found, upto[-1][1][-1], may_be_zero=True)


def run(cell: nn.Module, batch: int, **options: Any) -> list[Tensor]:
    """A stream with everything that may happen between steps; all that comes of it."""
    learner = rtrl.BlockRTRL(cell, batch, **options)
    names = dict(cell.named_parameters())
    optimizer = torch.optim.Adam(cell.parameters(), lr=0.01)
    found = []
    for t, x in enumerate(xs_for(cell, batch, 16)):
        y = learner.step(x)
        if (of_step := loss(t, y)) is not None:
            learner.backward(of_step)
        if t in (5, 11):
            learner.reset(torch.arange(batch) % 2 == 0)
        if t == 8:
            learner.sync()
            next(iter(names.values())).requires_grad_(False)
        if t == 12:
            learner.sync()
            next(iter(names.values())).requires_grad_(True)
        if t % 3 != 1:
            learner.sync()
            optimizer.step()
            found += [torch.zeros_like(p) if p.grad is None else p.grad for p in names.values()]
            optimizer.zero_grad()
        if t == 9:
            learner = copy.deepcopy(learner)
            found += [p.detach().clone() for p in names.values()]
            names = dict(learner.cell.named_parameters())
            optimizer = torch.optim.Adam(learner.cell.parameters(), lr=0.01)
        found.append(learner.last_updates(list(names)[-1]))
    return [*found, *(learner.influence(name) for name in names), learner.state]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CELLS)
def test_resets_freezing_copies_and_audits_give_what_the_general_way_gives(
    name: str, batch: int, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run(CELLS[name](), batch, audit=5)
    assert len(counted) >= 4
    monkeypatch.setattr(OneStep, "takes", lambda self, step: False)
    monkeypatch.setattr(OneStep, "try_out", lambda self, *args: None)
    general = run(CELLS[name](), batch, audit=5)
    for found, right in zip(here, general, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


def test_what_is_loaded_continues_bit_for_bit_whatever_is_audited(counted: list[int]) -> None:
    def states(saved_at: int) -> list[Tensor]:
        cell = CELLS["gru with a readout"]()
        learner = rtrl.BlockRTRL(cell, 3, audit=1000)
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        for t, x in enumerate(xs_for(cell, 3, 12)):
            if t == saved_at:
                saved, learner = learner.state_dict(), rtrl.BlockRTRL(cell, 3, audit=1000)
                learner.load_state_dict(saved)
            learner.backward(learner.step(x).square().sum())
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()
        return [*(p.detach() for p in cell.parameters()), *map(learner.influence, dict(cell.named_parameters()))]

    whole, taken = states(99), len(counted)
    cut = states(6)
    assert taken > 8 and len(counted) > taken + 4
    assert all(map(torch.equal, whole, cut))


def trained(steps: int, cell: nn.Module | None = None, **options: Any) -> rtrl.BlockRTRL:
    """A learner that has taken some steps, each with its loss and delivery."""
    learner = rtrl.BlockRTRL(CELLS["gru"]() if cell is None else cell, 1, **options)
    for x in normal(2, steps, 1, 2):
        learner.backward(learner.step(x).square().sum())
        learner.sync()
    return learner


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_changes(counted: list[int]) -> None:
    learner = trained(4)
    before = {name: p.grad.clone() for name, p in learner.cell.named_parameters() if p.grad is not None}
    influence = copy.deepcopy(learner).influence("cell.weight_hh")
    y = learner.step(torch.ones(1, 2, dtype=torch.float64))
    (y.sum() * torch.tensor(1e308, dtype=torch.float64)).backward()
    y.grad.mul_(1e308)  # type: ignore[union-attr]
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="gradient of the loss at y"):
            learner.sync()
    assert all(torch.equal(p.grad, before[name]) for name, p in learner.cell.named_parameters() if p.grad is not None)
    y.grad = None
    assert counted == [2, 3]
    learner.sync()
    assert not torch.equal(learner.influence("cell.weight_hh"), influence)


def test_a_parameter_that_changed_behind_autograd_is_noticed_at_the_next_delivery(counted: list[int]) -> None:
    learner = trained(4)
    learner.step(torch.ones(1, 2, dtype=torch.float64))
    learner.cell.get_parameter("cell.weight_hh").data.mul_(1.5)
    with pytest.raises(rtrl.errors.CellError, match="changed behind autograd's back"):
        learner.sync()
    assert counted == [2, 3]


def test_a_parameter_that_changed_after_the_step_is_refused(counted: list[int]) -> None:
    learner = trained(4)
    learner.step(torch.ones(1, 2, dtype=torch.float64))
    with torch.no_grad():
        learner.cell.get_parameter("cell.weight_hh").mul_(1.5)
    with pytest.raises(ParameterChangedError, match="weight_hh"):
        learner.sync()


def test_a_loss_that_comes_after_its_step_has_closed_is_refused(counted: list[int]) -> None:
    learner = trained(4)
    y = learner.step(torch.ones(1, 2, dtype=torch.float64))
    learner.sync()
    with pytest.raises(rtrl.errors.LossError, match="step 4"):
        y.sum().backward()


def wrong_product(propagate: Any) -> Any:
    def wrong(self: JointInfluence, jacobian: Tensor) -> Tensor:
        result: Tensor = propagate(self, jacobian.mT)
        return result

    return wrong


@pytest.mark.parametrize("audit", ["off", 1000])
def test_a_step_that_gives_something_else_than_the_general_way_is_not_taken(
    audit: Any, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [p.grad for p in trained(6, audit="off").cell.parameters()]
    assert counted == [2, 3, 4, 5]
    monkeypatch.setattr(JointInfluence, "propagate", wrong_product(JointInfluence.propagate))
    with pytest.warns(PerformanceWarning, match="slower way"):
        learner = trained(6, audit=audit)
    assert counted == [2, 3, 4, 5]
    for found, p in zip(learner.cell.parameters(), right, strict=True):
        torch.testing.assert_close(found.grad, p, rtol=1e-12, atol=1e-14)


def test_an_audit_meets_what_the_way_of_its_own_computes(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    learner = trained(4, audit=6)
    monkeypatch.setattr(JointInfluence, "propagate", wrong_product(JointInfluence.propagate))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for x in normal(2, 4, 1, 2):
            learner.backward(learner.step(x).square().sum())
            learner.sync()
    assert any("slower way" in str(warning.message) for warning in heard)
    assert counted == [2, 3, 4]


def test_steps_of_a_cell_with_hooks_go_the_general_way(counted: list[int]) -> None:
    cell = CELLS["gru"]()
    cell.get_submodule("cell").register_forward_hook(lambda module, inputs, output: output)
    trained(5, cell)
    assert not counted


def test_what_is_held_counts_the_memory_for_the_next_influences() -> None:
    cell = CELLS["gru"]()
    numbers = 3 * sum(p.numel() for p in cell.parameters())
    learner = trained(5, cell)
    held = learner.retained_bytes()
    assert held["influence"] >= 8 * numbers and held["scratch"] == 8 * numbers
