"""An update after every step where rows are independent: one sample's single steps are processed in a way of their own,
with the same result."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.strategies import normal
from helpers.structured_cases import LAYERS, OPENING, D
from helpers.structured_cells import MinGRU
from helpers.toy_cells import seeded
from helpers.unlasting_cells import Opening
from torch import Tensor, nn

import rtrl
from rtrl._engine.row_step import RowStep
from rtrl.errors import NonFiniteError, PerformanceWarning


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step that was processed in the way of its own."""
    taken: list[int] = []
    process = RowStep.process

    def counting(self: RowStep, step: Any, *others: Any) -> Any:
        found = process(self, step, *others)
        if found is not None:
            taken.append(step.number)
        return found

    monkeypatch.setattr(RowStep, "process", counting)
    return taken


class Spread(nn.Module):
    """A product of every row's own weight and state, a gain that reaches two of the rows' entries, and a y of its own
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.own = nn.Linear(D, 6), nn.Parameter(torch.empty(2, 3))
        self.angle, self.out = nn.Parameter(torch.empty(3)), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.empty(()))

    def init_state(self, batch_size: int) -> Tensor:
        return self.angle.new_zeros(batch_size, 3, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        drive = self.enter(x).view(-1, 2, 3) + self.own * h.mT
        a, b = torch.tanh(drive).unbind(1)
        h = torch.stack([torch.cos(self.angle) * a - b, a + torch.sin(self.angle) * b], dim=2)
        return {"y": self.out(h.flatten(1)), "scaled": self.scale * h}, h


CELLS: dict[str, Callable[[], nn.Module]] = {"spread": Spread, **{k: lambda k=k: LAYERS[k](D, 3) for k in LAYERS}}


def run(cell: nn.Module, xs: Tensor, **options: Any) -> list[Tensor]:
    """A stream with everything that may happen between steps; all that comes of it."""
    learner = rtrl.BlockRTRL(seeded(cell, 1), 1, **options)
    names = dict(learner.cell.named_parameters())
    optimizer = torch.optim.SGD(names.values(), lr=0.05)
    found = []
    for t, x in enumerate(xs):
        y = learner.step(x)
        if t % 4 != 2:
            learner.backward(sum((leaf.square() + leaf).sum() for leaf in torch.utils._pytree.tree_leaves(y)))
        if t in (5, 8):
            learner.reset()
        if t == 9:
            learner.sync()
            next(iter(names.values())).requires_grad_(False)
        if t % 5 != 1:
            learner.sync()
            optimizer.step()
            found += [torch.zeros_like(p) if p.grad is None else p.grad for p in names.values()]
            optimizer.zero_grad()
        if t == 6:
            learner = copy.deepcopy(learner)
            names = dict(learner.cell.named_parameters())
            optimizer = torch.optim.SGD(names.values(), lr=0.05)
    learner.sync()
    trained = [name for name, p in names.items() if p.requires_grad]
    return [*found, *(p.detach() for p in names.values()), *map(learner.influence, trained), learner.state]


def both_ways(make: Callable[[], nn.Module], xs: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        here = run(make(), xs, **options)
        monkeypatch.setattr(RowStep, "takes", lambda self, *args: False)
        monkeypatch.setattr(RowStep, "try_out", lambda self, *args: None)
        general = run(make(), xs, **options)
    for found, right in zip(here, general, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CELLS)
def test_gradients_and_influences_are_those_of_the_general_way(
    name: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    both_ways(CELLS[name], normal(3, 13, 1, D), monkeypatch, audit=4)
    several_rows = name in ("normed", "two widths", "placed")  # a parameter reaches more than one
    assert counted == ([] if several_rows else [12] if name == "rolled start" else [1, 4, 5, 8, 9, 12])


@pytest.mark.parametrize("what", [what for what in OPENING if what != "zero"])  # which has none from step 1 on
def test_a_structure_that_breaks_is_noticed_at_its_step(
    what: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = normal(5, 9, 1, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[4, 0, 0] *= -1
    both_ways(lambda: Opening(D, 3, what), xs, monkeypatch, audit="off")
    assert 3 in counted and 4 not in counted


def trained(steps: int, cell: nn.Module | None = None) -> rtrl.BlockRTRL:
    learner = rtrl.BlockRTRL(seeded(MinGRU(D, 3) if cell is None else cell, 1), 1)
    for x in normal(2, steps, 1, D):
        learner.backward(learner.step(x).square().sum())
        learner.sync()
    return learner


def test_a_result_that_is_not_that_of_the_general_way_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = trained(5).influence("both.weight")
    add = RowStep._add
    monkeypatch.setattr(RowStep, "_add", lambda self, i, place, values, run: add(self, i, place, 1.001 * values, run))
    with pytest.warns(PerformanceWarning, match="quicker way"):
        learner = trained(5)
    torch.testing.assert_close(learner.influence("both.weight"), right, rtol=1e-12, atol=1e-14)


class Rooted(nn.Module):
    """Its derivatives are not finite at x = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.own = nn.Linear(D, 3, bias=False), nn.Parameter(torch.empty(3))

    def init_state(self, batch_size: int) -> Tensor:
        return self.own.new_zeros(batch_size, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.own * h + self.enter(x).abs().sqrt())
        return h, h


def test_what_is_not_finite_is_refused_and_nothing_changes(counted: list[int]) -> None:
    learner = trained(3, Rooted())
    before = learner._carried.dense()
    learner.backward(learner.step(torch.zeros(1, D, dtype=torch.float64)).sum())
    with pytest.raises(NonFiniteError, match="step 3"):
        learner.sync()
    assert counted == [1, 2] and all(map(torch.equal, before.values(), learner._carried.dense().values()))


def test_what_is_loaded_continues_bit_for_bit_whatever_is_audited(counted: list[int]) -> None:
    def states(saved_at: int, audit: int) -> list[Tensor]:
        cell = seeded(MinGRU(D, 3), 1)
        learner = rtrl.BlockRTRL(cell, 1, audit=audit)
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        for t, x in enumerate(normal(3, 9, 1, D)):
            if t == saved_at:
                saved, learner = learner.state_dict(), rtrl.BlockRTRL(cell, 1, audit=audit)
                learner.load_state_dict(saved)
            learner.backward(learner.step(x).square().sum())
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()
        return [*(p.detach() for p in cell.parameters()), *map(learner.influence, dict(cell.named_parameters()))]

    whole = states(99, 1000)
    assert counted == [1, 2, 3, 4, 5, 6, 7, 8]
    for other in (states(4, 1000), states(99, 3)):
        assert all(map(torch.equal, whole, other))
