"""Learners that are right but for one order of calls, one size or one value, and the check that refuses them; each got
past an earlier version of the checks."""

from itertools import product
from typing import Any

import pytest
import torch
from test_wrong_learners import Whole, promising
from torch import Tensor

from rtrl._utils import pytrees
from rtrl.learners import DenseRTRL
from rtrl.testing import check_learner


class _ResetLostAtBorders(Whole):
    """A reset at a border between blocks does not clear the influence."""

    block = 8

    def reset(self, rows: Tensor) -> None:
        held = self.influence
        super().reset(rows)
        if self.taken and self.taken % self.block == 0 and not bool(rows.all()):
            self.influence = held


class ResetLostAtBordersOf8(_ResetLostAtBorders):
    block = 8


class ResetLostAtBordersOf16(_ResetLostAtBorders):
    block = 16


class ResetLostAtBordersOf64(_ResetLostAtBorders):
    block = 64


class NamesOfOutputsLost(Whole):
    """A named tuple comes back as a plain one."""

    def step(self, x: Any) -> Any:
        y = super().step(x)
        return tuple(y) if isinstance(y, tuple) else y


class LoadedStateIsUsedUp(Whole):
    """Takes the tensors of a saved state as its own, and works on them in place: it can be loaded once."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.h, self.gradient, self.influence = saved["h"].clone(), saved["gradient"].clone(), saved["S"]
        self.loaded = True

    def step(self, x: Any) -> Any:
        held = self.influence
        y = super().step(x)
        if getattr(self, "loaded", False):
            self.met = [s.clone() for s in held]
            for old, new in zip(held, self.influence, strict=True):
                old.copy_(new)
            self.influence = held
        return y


class _AfterALoad(Whole):
    loads = 0
    syncs = 0

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.loads, self.syncs = self.loads + 1, 0


class ResetAfterALoadIsLost(_AfterALoad):
    def reset(self, rows: Tensor) -> None:
        if not self.loads:
            super().reset(rows)


class SecondSyncAfterALoadForgets(_AfterALoad):
    def sync(self) -> None:
        super().sync()
        self.syncs += 1
        if self.loads and self.syncs == 2:
            self.influence = [torch.zeros_like(s) for s in self.influence]


class _Watches(Whole):
    """Counts the changes of parameters."""

    changes = 0
    changed_now = False

    def noticed(self) -> None:
        values = [p.detach().clone() for p in self.theta]
        before = getattr(self, "values", values)
        if not all(torch.equal(a, b) for a, b in zip(values, before, strict=True)):
            self.changes += 1
            self.changed_now = True
        self.values = values

    def step(self, x: Any) -> Any:
        self.noticed()
        self.changed_now = False
        return super().step(x)


class ThirdChangeForgets(_Watches):
    def noticed(self) -> None:
        before = self.changes
        super().noticed()
        if before == 2 and self.changes == 3:
            self.influence = [torch.zeros_like(s) for s in self.influence]


class ResetAfterAChangeIsLost(_Watches):
    def reset(self, rows: Tensor) -> None:
        self.noticed()
        if not self.changed_now:
            super().reset(rows)


class FourthSampleIsLost(Whole):
    def counted(self, b: int) -> Any:
        return float(b < 3)


class LoneSampleForgets(Whole):
    def step(self, x: Any) -> Any:
        if self.batch_size == 1:
            self.influence = [torch.zeros_like(s) for s in self.influence]
        return super().step(x)


class SecondResetReplacesTheFirst(Whole):
    """Of two resets before one step, the last one counts."""

    def step(self, x: Any) -> Any:
        self.held: Any = None
        return super().step(x)

    def reset(self, rows: Tensor) -> None:
        if getattr(self, "held", None) is None:
            self.held = self.h, self.influence
        self.h, self.influence = self.held
        super().reset(rows)


class NothingIsNoInput(Whole):
    """The influence is not advanced where x is zero."""

    def step(self, x: Any) -> Any:
        held = self.influence
        y = super().step(x)
        if not bool(x.any()):
            self.influence = held
        return y


class ZeroIsNoLoss(Whole):
    def backward(self, loss: Tensor) -> None:
        if loss:
            super().backward(loss)


class PenaltyIsLost(Whole):
    """What a loss says of the parameters themselves is dropped."""

    def backward(self, loss: Tensor) -> None:
        leaves = [leaf for leaf in pytrees.tensors(self.y) if leaf.requires_grad]
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        super().backward(torch.stack([(leaf * g).sum() for leaf, g in zip(leaves, grads, strict=True)]).sum())


class StateIsShared(Whole):
    """The influence belongs to the class."""

    @property
    def influence(self) -> Any:
        return type(self).shared

    @influence.setter
    def influence(self, value: Any) -> None:
        type(self).shared = value


class LossAfterASyncIsLost(Whole):
    synced_now = False

    def step(self, x: Any) -> Any:
        self.synced_now = False
        return super().step(x)

    def sync(self) -> None:
        super().sync()
        self.synced_now = True

    def backward(self, loss: Tensor) -> None:
        if not self.synced_now:
            super().backward(loss)


class EarlierStepsAreForgotten(Whole):
    """Of a loss over two steps, the newest y counts."""

    def refuse_more_losses(self) -> None:
        return


class OutputIsUsedAgain(Whole):
    """Returns the same memory at each step."""

    def step(self, x: Any) -> Any:
        y = super().step(x)
        if not isinstance(y, Tensor):
            return y
        self.memory: Any = getattr(self, "memory", torch.empty_like(y, requires_grad=False))
        self.memory.copy_(y.detach())
        return _InMemory.apply(y, self.memory)


class _InMemory(torch.autograd.Function):
    """Its first argument, in the memory of the second one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, memory: Tensor) -> Tensor:
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class MaskIsKept(Whole):
    """Resets at the next step, by the mask that it was given."""

    mask: Any = None

    def reset(self, rows: Tensor) -> None:
        if self.mask is not None:
            super().reset(self.mask)
        self.mask = rows

    def step(self, x: Any) -> Any:
        if self.mask is not None:
            super().reset(self.mask)
        self.mask = None
        return super().step(x)


class InfluenceOfTheFirstParameters(DenseRTRL):
    """The influence is cleared by a change of parameters, where it is shown."""

    def influence(self, name: str) -> Tensor:
        values = torch.cat([p.detach().flatten() for p in self.cell.parameters()])
        first = self.__dict__.setdefault("first", values)
        return super().influence(name) * float(torch.equal(first, values))


class InfluenceIsNotSaved(DenseRTRL):
    """After a load, the influence is shown without what came before it."""

    loaded = False

    def load_state_dict(self, saved: Any) -> None:
        super().load_state_dict(saved)
        self.loaded = True

    def influence(self, name: str) -> Tensor:
        return super().influence(name) * float(not self.loaded)


CASES: list[tuple[type[Whole] | type[DenseRTRL], str]] = [
    (ResetLostAtBordersOf8, "resets at block borders"),
    (ResetLostAtBordersOf16, "resets at block borders"),
    (ResetLostAtBordersOf64, "resets at block borders"),
    (NamesOfOutputsLost, "unusual parameters"),
    (LoadedStateIsUsedUp, "save and load"),
    (ResetAfterALoadIsLost, "save and load"),
    (SecondSyncAfterALoadForgets, "save and load"),
    (ThirdChangeForgets, "changed parameters"),
    (ResetAfterAChangeIsLost, "changed parameters"),
    (FourthSampleIsLost, "dense cell"),
    (LoneSampleForgets, "dense cell"),
    (SecondResetReplacesTheFirst, "resets of several samples"),
    (NothingIsNoInput, "dense cell"),
    (ZeroIsNoLoss, "losses of all scales"),
    (PenaltyIsLost, "losses with a penalty"),
    (StateIsShared, "two learners at once"),
    (LossAfterASyncIsLost, "syncs before the loss"),
    (EarlierStepsAreForgotten, "losses over two steps"),
    (OutputIsUsedAgain, "interface"),
    (MaskIsKept, "views as inputs"),
    (InfluenceOfTheFirstParameters, "influence"),
    (InfluenceIsNotSaved, "influence"),
]


SLOW = {ResetLostAtBordersOf8, ResetLostAtBordersOf64}


@pytest.mark.parametrize(
    ("make", "check"),
    [
        pytest.param(make, check, id=make.__name__, marks=[pytest.mark.nightly] if make in SLOW else [])
        for make, check in CASES
    ],
)
def test_it_is_refused(make: type[Whole] | type[DenseRTRL], check: str) -> None:
    report = check_learner(promising(make, check), checks=[check], on_fail="return")
    assert {failure.check for failure in report.failures} == {check}


class _WrongAfter(Whole):
    """Forgets the influence of the first sample when these events come one after the other."""

    order: tuple[str, ...] = ()

    def __init__(self, cell: Any, batch_size: int) -> None:
        super().__init__(cell, batch_size)
        self.events: list[str] = []

    def met_event(self, event: str) -> None:
        self.events.append(event)
        if tuple(self.events[-len(self.order) :]) == self.order:
            self.influence[0] = torch.zeros_like(self.influence[0])

    def step(self, x: Any) -> Any:
        self.met_event("step")
        return super().step(x)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self.met_event("loss")

    def reset(self, rows: Tensor) -> None:
        super().reset(rows)
        self.met_event("reset")

    def sync(self) -> None:
        super().sync()
        self.met_event("sync")

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.events = list(saved["events"])
        self.met_event("load")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "events": list(self.events)}


QUICK = [("sync", "sync", "reset"), ("load", "load")]
ORDERS = [*product(("reset", "sync", "load"), repeat=3), ("loss", "loss", "load")]
UNSEEN = {("reset", "reset", "reset"), ("reset", "reset", "sync"), ("load", "reset", "reset")}
"""The first sample is itself reset wherever these occur with the first seed."""


@pytest.mark.parametrize(
    "order",
    [*QUICK, *(pytest.param(order, marks=pytest.mark.nightly) for order in ORDERS if order not in {*QUICK, *UNSEEN})],
    ids=" ".join,
)
def test_a_learner_that_is_wrong_after_some_events_fails_on_a_short_schedule(order: tuple[str, ...]) -> None:
    class Wrong(_WrongAfter):
        pass

    Wrong.order = order
    report = check_learner(promising(Wrong, "drawn mixtures"), checks=["drawn mixtures"], on_fail="return")
    (failure,) = report.failures
    assert "the shortest one found is: step(" in failure.message
    assert failure.message.count(";") <= 6, failure.message
