"""Slots that keep to themselves: exact with an influence of d rows in place of H, and refused where they do not."""

from typing import Any

import pytest
import torch
from helpers.running import run
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl._engine.slot_block import close_slots
from rtrl.cells.row_groups import rows_of
from rtrl.errors import CellError, ConfigError, PerformanceWarning, SparsityError
from rtrl.learners.carried_slots import CarriedSlots
from rtrl.testing import check_cell

STEPS = 9


def mixture(**options: Any) -> nn.Module:
    sizes = {"d_model": 2, "n_slots": 3, "n_experts": 6, "topk": 1, "read_slots": 2, "write_slots": 1}
    return seeded(rtrl.RecurrentMoE(2, 2, **(sizes | options), expert_hidden=2, independent_slots=True), 0)


class Slots(nn.Module):
    """Slots that three parameters write: one of all slots, one with a slice for each, one with a slice for each kind of
    x. ``flaw`` breaks a promise.

    The slots that are written stand in x.
    """

    def __init__(self, flaw: str = "") -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(4, 2), nn.Parameter(torch.empty(3, 2))
        self.first, self.scale = nn.Parameter(torch.empty(3, 2)), nn.Parameter(torch.empty(2))
        self.kinds, self.flaw = nn.Parameter(torch.empty(2, 2, 2)), flaw

    def init_state(self, batch_size: int) -> Tensor:
        return self.first.tanh().expand(batch_size, -1, -1)

    def row_groups(self) -> list[Tensor]:
        return rows_of(3, 2)

    def forward(self, x: Tensor, h: Tensor, replay: Any = None) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        writes = torch.stack([x[:, 2].long(), (x[:, 2].long() + 1) % 3], dim=1)
        index = writes.unsqueeze(2).expand(-1, -1, 2)
        old = h.gather(1, index)
        source = old.flip(1) if self.flaw == "coupled" else old
        wide = torch.cat([x[:, None, :2].expand(-1, 2, -1), source], dim=2)
        kind = (x[:, :1] > 0).long()
        by_kind = rtrl.cells.grouped_linear(source.unsqueeze(1), self.kinds, None, kind).squeeze(1)
        new = torch.tanh(self.shared(wide) + nn.functional.embedding(writes, self.own) + by_kind)
        if self.flaw == "unrecorded":
            new = new * self.scale
        declared = writes[:, :1] if self.flaw == "undeclared" else writes
        y = h.flatten(1).sin().cumsum(1) + self.scale.sum() + new.sum((1, 2))[:, None]
        return y, h.scatter(1, index, new), rtrl.Sparsity(None, writes, {"own": declared, "kinds": kind})


def stream(cell: nn.Module) -> Tensor:
    xs = 2 * normal(1, STEPS, 3, 2)
    if isinstance(cell, Slots):
        xs = torch.cat([xs, (torch.arange(STEPS * 3).view(STEPS, 3, 1) ** 2 % 7 % 3).double()], dim=2)
    return xs


def loss(t: int, y: Any) -> Tensor | None:
    if t % 4 == 1:
        return None
    balance = rtrl.cells.load_balancing_loss(y.router_logits, y.experts) if hasattr(y, "experts") else 0.0
    return (y.output if hasattr(y, "output") else y).square().sum() + balance


CELLS = {
    "one expert of one slot": mixture,
    "two experts of two slots": lambda: mixture(topk=2, write_slots=2, read_slots=3),
    "balanced": lambda: mixture(topk=2, router_output=True),
    "parameters of all slots": lambda: seeded(Slots(), 0),
}


RUNS = [(name, {"block": 2}) for name in CELLS]
RUNS += [("one expert of one slot", {"block": 1}), ("parameters of all slots", {"block": 4, "lazy": False})]


@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_gradients_and_influences_are_exact(name: str, options: dict[str, Any]) -> None:
    cell = CELLS[name]()
    found = run(cell, stream(cell), loss, window=2, syncs={4: True, 6: False}, **options)
    gradients, influences = oracles.dense_rtrl(cell, stream(cell), loss, return_influence=True)
    assert_gradients_equal(found.gradients, gradients, may_be_zero=True)
    assert_influences_equal(found.influences, influences[-1], may_be_zero=True)


@pytest.mark.parametrize("name", ["one expert of one slot", "parameters of all slots"])
def test_resets_saves_and_changed_parameters(name: str) -> None:
    cell = CELLS[name]()
    resets = torch.zeros(STEPS, 3, dtype=torch.bool)
    resets[4, 1] = resets[6, [0, 2]] = resets[7] = True
    found = run(cell, stream(cell), loss, block=3, window=2, resets=resets, saves=(2, 5), influences=False)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, stream(cell), loss, resets=resets), may_be_zero=True)


def test_each_sample_by_itself() -> None:
    cell = mixture()
    learner = rtrl.BlockRTRL(cell, 3, block=3, window=2)
    for x in stream(cell):
        y = learner.step(x)
    found = learner.gradients({"": y.square().sum()}, per_sample=True)[""]
    for b in range(3):
        alone = lambda t, y, b=b: y[b].square().sum() if t == STEPS - 1 else None
        expected = oracles.bptt(cell, stream(cell), alone)
        assert_gradients_equal({name: value[b] for name, value in found.items()}, expected, may_be_zero=True)


def test_an_influence_has_d_rows_and_a_dormant_slice_is_left_alone() -> None:
    cell = mixture(n_experts=12)
    by_slot, whole = (rtrl.BlockRTRL(cell, 1, block=2, window=4, structure=each) for each in ("find", "off"))
    for x in stream(cell)[:, :1]:
        by_slot.step(x)
        whole.step(x)
    by_slot.sync()
    whole.sync()
    for name, parameter in cell.slots.named_parameters():
        updates = by_slot.last_updates(f"slots.{name}")
        used = updates >= 0
        assert torch.equal(used, whole.last_updates(f"slots.{name}") >= 0)
        values = by_slot._carried.influences[f"slots.{name}"].values
        assert values.numel() == int(used.sum()) * 2 * parameter[0].numel()
    assert 2 < int(used.sum()) < 12
    assert len(updates[used].unique()) > 2  # of an expert's parameter, the last one


def test_slots_that_are_not_independent_are_refused_before_anything_changes() -> None:
    cell = seeded(Slots("coupled"), 0)
    learner = rtrl.BlockRTRL(cell, 3, block=2)
    for x in stream(cell)[:2]:
        learner.backward(loss(0, learner.step(x)))
    with pytest.raises(CellError, match="a slot of the state depends on another slot"):
        learner.sync()
    assert all(p.grad is None for p in cell.parameters())


def test_an_undeclared_slice_is_refused() -> None:
    cell = seeded(Slots("undeclared"), 0)
    learner = rtrl.BlockRTRL(cell, 3, block=2)
    learner.step(stream(cell)[0])
    with pytest.raises(SparsityError, match=r"'own' was used that Sparsity.active does not declare"):
        learner.sync()


def test_other_uses_of_a_parameter_are_exact_on_the_whole_state() -> None:
    cell = seeded(Slots("unrecorded"), 0)
    with pytest.warns(PerformanceWarning, match="the slots are independent, but parameter 'scale' is used"):
        found = run(cell, stream(cell), loss, block=3, window=2, influences=False)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, stream(cell), loss))


def test_the_cell_keeps_its_promises() -> None:
    check_cell(mixture(), list(stream(mixture())[:2]))


def test_what_goes_by_slot_goes_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    for name in CELLS:
        learner = rtrl.BlockRTRL(CELLS[name](), 3, block=2)
        assert isinstance(learner._carried, CarriedSlots)
    monkeypatch.setattr("rtrl._engine.linearizer.close_slots", lambda *a: closed.append(1) or close_slots(*a))
    run(mixture(), stream(mixture()), loss, block=2, influences=False)
    assert len(closed) >= STEPS // 2


@pytest.mark.parametrize("wrong", [{"n_experts": 7}, {"topk": 3}], ids=str)
def test_experts_must_be_divisible_among_slots(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="independent slots have their own experts"):
        mixture(**wrong)


def test_a_replay_with_experts_of_other_slots_is_refused() -> None:
    cell, one = mixture(), torch.tensor([[1]])
    with pytest.raises(SparsityError, match="expert e belongs to slot e // 2"):
        cell(torch.ones(1, 2).double(), cell.init_state(1), replay=cell.choices(torch.tensor([[0, 1]]), one, one))
