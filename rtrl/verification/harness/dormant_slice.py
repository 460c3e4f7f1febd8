"""A slice's influence that was dormant over steps of a dense or sparse state, and three ways to bring it up to date."""

from dataclasses import dataclass

import torch
from torch import Tensor

import oracles
from rtrl._influence.catch_up import catch_up
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.verification.harness.measuring import count_macs


@dataclass(frozen=True, slots=True)
class Dormancy:
    """Steps over which an expert is dormant."""

    n: int  # the number of steps
    slots: int  # rows of the state
    width: int  # entries per row
    touched: int  # rows read and written per step; all of them for dense steps
    k: int = 32  # the expert has k·H parameters
    dtype: torch.dtype = torch.float32  # the dtype of everything

    @property
    def hidden(self) -> int:
        """H."""
        return self.slots * self.width

    def transition(self, step: int) -> Transition:
        """Return the transition of a step, drawn from its number."""
        draw = torch.Generator().manual_seed(step)
        side = self.touched * self.width
        jacobian = torch.randn(1, side, side, generator=draw, dtype=self.dtype) / side**0.5
        rows = None
        if self.touched < self.slots:
            rows = torch.randperm(self.slots, generator=draw)[None, : self.touched].sort().values
        return Transition(rows, rows, jacobian, torch.zeros(1, side, dtype=self.dtype), self.slots, self.width)

    def full_jacobian(self, step: int) -> Tensor:
        """Return the same step's Jacobian (H, H) in full."""
        sparse = self.transition(step)
        if sparse.rows is None:
            return sparse.jacobian[0]
        jacobian = torch.eye(self.hidden, dtype=self.dtype)
        places = (sparse.rows[0, :, None] * self.width + torch.arange(self.width)).flatten()
        jacobian[places] = 0.0
        jacobian[places[:, None], places] = sparse.jacobian[0]
        return jacobian

    def values(self) -> Tensor:
        """Return the influence (1, H, k·H) at the first step."""
        draw = torch.Generator().manual_seed(10**6)
        return torch.randn(1, self.hidden, self.k * self.hidden, generator=draw, dtype=self.dtype)


class DormantSlice:
    """An influence and the history of its dormancy; each method returns the influence after the last step."""

    def __init__(self, dormancy: Dormancy) -> None:
        self.dormancy, self._values = dormancy, dormancy.values()
        like = torch.zeros(1, dormancy.slots, dormancy.width, dtype=dormancy.dtype)
        self.history = History(dormancy.n, dormancy.touched, dormancy.touched, like)
        for step in range(dormancy.n):
            self.history.append(dormancy.transition(step))

    def planned(self) -> Tensor:
        """Catch up as the learner does, by the plan of a tree, which at first has composed nothing."""
        shape = torch.Size([1, self.dormancy.k * self.dormancy.hidden])
        influence = ParameterInfluence(shape, True, 1, self.dormancy.hidden, self._values)
        rows = influence.allocate(torch.tensor([0]), self.history.oldest)
        influence.values.copy_(self._values)
        catch_up(self.history, [(influence, rows)])
        return influence.values

    def one_by_one(self, steps: int) -> Tensor:
        """Apply the first steps one by one, in the rows that each step touches."""
        values = self._values.clone()
        for step in range(steps):
            self.history.tree.query(step, step + 1).apply_(values)
        return values

    def composed(self) -> Tensor:
        """Apply one product over all steps; composing it in the tree is part of the work."""
        return self.history.tree.query(0, self.dormancy.n).apply(self._values)


def worst_error(dormancy: Dormancy) -> float:
    """Return the largest relative error of all three ways against full Jacobians applied one by one by the oracle."""
    none = torch.zeros(dormancy.hidden, dtype=dormancy.dtype)
    phi, _ = oracles.ordered_product([(dormancy.full_jacobian(step), none) for step in range(dormancy.n)])
    reference = phi @ dormancy.values()
    dormant, scale = DormantSlice(dormancy), float(reference.abs().max())
    found = (dormant.planned(), dormant.one_by_one(dormancy.n), DormantSlice(dormancy).composed())
    return max(float((value - reference).abs().max()) / scale for value in found)


@dataclass(frozen=True, slots=True)
class Costs:
    """Multiply-adds to catch up."""

    full: int  # full Jacobians one by one, H²·p each
    one_by_one: int  # the steps' own Jacobians one by one
    composed: int  # one product, its composition included
    planned: int  # the learner's plan, compositions included


def costs(dormancy: Dormancy) -> Costs:
    """Count all ways; each starts from a tree that has composed nothing."""
    return Costs(
        dormancy.n * dormancy.hidden**2 * dormancy.k * dormancy.hidden,
        dormancy.n * count_macs(lambda: DormantSlice(dormancy).one_by_one(1)),
        count_macs(lambda: DormantSlice(dormancy).composed()),
        count_macs(lambda: DormantSlice(dormancy).planned()),
    )
