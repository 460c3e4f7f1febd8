"""An expert's influence that has slept through steps of a dense or a sparse state, and the ways to catch it up."""

from dataclasses import dataclass

import torch
from torch import Tensor

import oracles
from rtrl._influence.catch_up import catch_up
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.verification.harness.problems import count


@dataclass(frozen=True, slots=True)
class Sleep:
    """n steps of a state of ``slots`` rows of ``width``, ``touched`` of them read and written a step (all: dense), and
    an expert of k·H parameters asleep over them."""

    n: int
    slots: int
    width: int
    touched: int
    k: int = 32
    dtype: torch.dtype = torch.float32

    @property
    def hidden(self) -> int:
        """H."""
        return self.slots * self.width

    def leaf(self, step: int) -> Transition:
        """The transition of a step, drawn from its number."""
        draw = torch.Generator().manual_seed(step)
        side = self.touched * self.width
        jacobian = torch.randn(1, side, side, generator=draw, dtype=self.dtype) / side**0.5
        rows = None
        if self.touched < self.slots:
            rows = torch.randperm(self.slots, generator=draw)[None, : self.touched].sort().values
        return Transition(rows, rows, jacobian, torch.zeros(1, side, dtype=self.dtype), self.slots, self.width)

    def values(self) -> Tensor:
        """The influence (1, H, k·H) when it fell asleep."""
        draw = torch.Generator().manual_seed(10**6)
        return torch.randn(1, self.hidden, self.k * self.hidden, generator=draw, dtype=self.dtype)


class Sleeper:
    """The history of the sleep, and the influence caught up in three ways; each gives it led to the end."""

    def __init__(self, sleep: Sleep) -> None:
        self.sleep, self._values = sleep, sleep.values()
        like = torch.zeros(1, sleep.slots, sleep.width, dtype=sleep.dtype)
        self.history = History(sleep.n, sleep.touched, sleep.touched, like)
        for step in range(sleep.n):
            self.history.append(sleep.leaf(step))

    def _asleep(self) -> tuple[ParameterInfluence, Tensor]:
        shape = torch.Size([1, self.sleep.k * self.sleep.hidden])
        influence = ParameterInfluence(shape, True, 1, self.sleep.hidden, self._values)
        rows = influence.allocate(torch.tensor([0]), self.history.oldest)
        influence.values.copy_(self._values)
        return influence, rows

    def planned(self) -> Tensor:
        """By the plan of a tree that has composed nothing yet, or what it has composed before."""
        late = self._asleep()
        catch_up(self.history, [late])
        return late[0].values

    def one_by_one(self, steps: int) -> Tensor:
        """The first so many steps, one product each, in the rows that the step touches."""
        values = self._values.clone()
        for step in range(steps):
            self.history.tree.query(step, step + 1).apply_(values)
        return values

    def composed(self) -> Tensor:
        """By one product over the whole sleep, composed in the tree, whatever it costs."""
        return self.history.tree.query(0, self.sleep.n).apply(self._values)


def expected(sleep: Sleep) -> Tensor:
    """The influence led on by full Jacobians, one after the other, by the oracle."""
    full = []
    for step in range(sleep.n):
        leaf = sleep.leaf(step)
        jacobian = torch.eye(sleep.hidden, dtype=sleep.dtype)
        if leaf.rows is None:
            jacobian = leaf.jacobian[0]
        else:
            places = (leaf.rows[0, :, None] * sleep.width + torch.arange(sleep.width)).flatten()
            jacobian[places] = 0.0
            jacobian[places[:, None], places] = leaf.jacobian[0]
        full.append((jacobian, torch.zeros(sleep.hidden, dtype=sleep.dtype)))
    phi, _ = oracles.ordered_product(full)
    return phi @ sleep.values()


def worst_error(sleep: Sleep) -> float:
    """The largest relative error of all three ways against full Jacobians one by one."""
    reference = expected(sleep)
    sleeper = Sleeper(sleep)
    scale = float(reference.abs().max())
    found = (sleeper.planned(), sleeper.one_by_one(sleep.n), Sleeper(sleep).composed())
    return max(float((value - reference).abs().max()) / scale for value in found)


@dataclass(frozen=True, slots=True)
class Counted:
    """Multiply-adds to catch up: full Jacobians one by one (H²·p each), sparse ones one by one, one composed product
    (its making included), and the plan (likewise)."""

    full: int
    one_by_one: int
    composed: int
    planned: int


def counted(sleep: Sleep) -> Counted:
    """Count all ways; each starts from a tree that has composed nothing."""
    full = sleep.n * sleep.hidden**2 * sleep.k * sleep.hidden
    return Counted(
        full,
        sleep.n * count(lambda: Sleeper(sleep).one_by_one(1)),
        count(lambda: Sleeper(sleep).composed()),
        count(lambda: Sleeper(sleep).planned()),
    )
