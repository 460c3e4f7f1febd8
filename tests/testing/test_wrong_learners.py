"""Learners that are wrong in one small way each, and the check that refuses them; all were tried by somebody who wanted
to get past the checks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from third_party import Textbook
from torch import Tensor

from rtrl.learners import TBPTT, DenseRTRL
from rtrl.testing import ExactWithin, LearnerSpec, check_learner


class Whole(Textbook):
    """Textbook RTRL with all that a learner may have besides: resets, influences, saving. Right."""

    def __init__(self, cell: Any, batch_size: int) -> None:
        super().__init__(cell, batch_size)
        self.synced = 0

    def reset(self, rows: Tensor) -> None:
        fresh = self.cell.init_state(self.batch_size).detach()
        self.h = torch.where(rows.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, self.h)
        self.influence = [torch.zeros_like(s) if bool(rows[b]) else s for b, s in enumerate(self.influence)]

    def state_dict(self) -> dict[str, Any]:
        return {"h": self.h.clone(), "S": [s.clone() for s in self.influence], "gradient": self.gradient.clone()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.h, self.gradient = saved["h"].clone(), saved["gradient"].clone()
        self.influence = [s.clone() for s in saved["S"]]

    def sync(self) -> None:
        super().sync()
        self.synced += 1


class FirstRowOnly(Whole):
    def reset(self, rows: Tensor) -> None:
        super().reset(torch.arange(len(rows)) == int(rows.int().argmax()) if bool(rows.any()) else rows)


class AllRowsKeepInfluence(Whole):
    def reset(self, rows: Tensor) -> None:
        kept = self.influence
        super().reset(rows)
        if bool(rows.all()):
            self.influence = kept


class EmptyResetIsAnError(Whole):
    def reset(self, rows: Tensor) -> None:
        if not bool(rows.any()):
            raise ValueError("nobody")
        super().reset(rows)


class LostAfterASync(Whole):
    """A reset right after a sync is lost."""

    just = False

    def step(self, x: Any) -> Any:
        self.just = False
        return super().step(x)

    def sync(self) -> None:
        super().sync()
        self.just = True

    def reset(self, rows: Tensor) -> None:
        if not self.just:
            super().reset(rows)


class SavingHarms(Whole):
    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        self.gradient = torch.zeros_like(self.gradient)
        return saved


class SavedAliases(Whole):
    def state_dict(self) -> dict[str, Any]:
        return {"h": self.h, "S": self.influence, "gradient": self.gradient}

    def step(self, x: Any) -> Any:
        held = self.influence
        y = super().step(x)
        self.met = [s.clone() for s in held]
        for old, new in zip(held, self.influence, strict=True):
            old.copy_(new)  # in place, and so in what was saved
        self.influence = held
        return y


class LoadAdds(Whole):
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        kept = self.gradient
        super().load_state_dict(saved)
        self.gradient = self.gradient + kept


class Unpicklable(Whole):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "why": lambda: None}


class TrainsTheFrozen(Whole):
    def sync(self) -> None:
        super().sync()
        for p in self.cell.parameters():
            if not p.requires_grad:
                p.grad = torch.ones_like(p)


class Clips(Whole):
    def pulled(self, value: Tensor) -> tuple[Tensor, Tensor]:
        by_state, by_theta = super().pulled(value)
        return by_state.clamp(-1000, 1000), by_theta.clamp(-1000, 1000)


class SmallIsNothing(Whole):
    def pulled(self, value: Tensor) -> tuple[Tensor, Tensor]:
        by_state, by_theta = super().pulled(value)
        return torch.nn.functional.hardshrink(by_state, 1e-7), by_theta


class OneForAll(Whole):
    """A loss of the first sample alone reaches all."""

    def backward(self, loss: Tensor) -> None:
        adjoint, direct = self.pulled(loss)
        self.gradient = self.gradient + direct
        for b, influence in enumerate(self.met):
            reached = adjoint[0] if bool((adjoint[1:] == 0).all()) else adjoint[b]
            self.gradient = self.gradient + reached @ influence


class NoDirectForScalars(Whole):
    def backward(self, loss: Tensor) -> None:
        before = self.gradient
        super().backward(loss)
        parts, olds = (v.split([p.numel() for p in self.theta]) for v in (self.gradient, before))
        pairs = zip(self.theta, parts, olds, strict=True)
        self.gradient = torch.cat([old if p.ndim == 0 else part for p, part, old in pairs])


class ForgetsLate(Whole):
    """Syncs after the twentieth step cut the past off."""

    def sync(self) -> None:
        super().sync()
        if self.taken > 20:
            self.influence = [torch.zeros_like(s) for s in self.influence]


class ForgetsLongDormancy(Whole):
    """A slice that has been dormant for more than sixty-four steps has lost its past."""

    def step(self, x: Any) -> Any:
        self.last: Any = getattr(self, "last", [torch.zeros_like(s[0]) for s in self.influence])
        y = super().step(x)
        for b, used in enumerate(self.used):
            dormant = self.taken - self.last[b] > 64
            self.influence[b] = torch.where(dormant, 0.0, self.influence[b])
            self.last[b] = torch.where(torch.as_tensor(used).expand_as(self.last[b]) > 0, self.taken, self.last[b])
        return y


class CutAfter128(Whole):
    def step(self, x: Any) -> Any:
        if self.taken == 128:
            self.influence = [torch.zeros_like(s) for s in self.influence]
        return super().step(x)


class HoldsArrays(Whole):
    def step(self, x: Any) -> Any:
        self.__dict__.setdefault("kept", []).append(np.zeros(64))
        return super().step(x)


class HoldsNumbers(Whole):
    def step(self, x: Any) -> Any:
        self.__dict__.setdefault("kept", []).append(float(x.sum()))
        return super().step(x)


class HoldsTensors(Whole):
    def step(self, x: Any) -> Any:
        self.__dict__.setdefault("kept", []).append(x)
        return super().step(x)


class LeavesHooks(Whole):
    def step(self, x: Any) -> Any:
        self.theta[0].register_hook(lambda grad: None)
        return super().step(x)


class SetsTheDtype(Whole):
    def step(self, x: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().step(x)


class Draws(Whole):
    def step(self, x: Any) -> Any:
        torch.rand(1)
        return super().step(x)


class NeedsAStep(Whole):
    def sync(self) -> None:
        if self.taken == 0:
            raise RuntimeError("nothing to deliver")
        super().sync()


class InputIsKept(Whole):
    """Looks at x again when the next step comes."""

    def step(self, x: Any) -> Any:
        if self.taken and bool(self.x.isnan().any()):
            self.gradient = self.gradient * torch.nan
        self.x = x
        return super().step(x)


class NeedsContiguous(Whole):
    def step(self, x: Any) -> Any:
        return super().step(x.view(-1).view(x.shape))


class StaleInfluence(DenseRTRL):
    """The newest step is missing."""

    def influence(self, name: str) -> Tensor:
        return self._by_name(self._dense())[name].clone()


class InfluenceHarms(DenseRTRL):
    def influence(self, name: str) -> Tensor:
        found = super().influence(name)
        self._carried = tuple(torch.zeros_like(value) for value in self._carried)
        return found


class InfluenceAfterReset(DenseRTRL):
    """Wrong once a sample has been reset."""

    wrong = False

    def reset(self, rows: Tensor | None = None, *, state: Tensor | None = None) -> None:
        self.wrong = True
        super().reset(rows, state=state)

    def influence(self, name: str) -> Tensor:
        return super().influence(name) * (2 if self.wrong else 1)


class InfluenceFromTheStart(DenseRTRL):
    def influence(self, name: str) -> Tensor:
        return super().influence(name) + (self.steps_taken == 0)


Case = tuple[type[Whole] | type[DenseRTRL], str]
WRONG: list[Case] = [
    (FirstRowOnly, "resets of several samples"),
    (AllRowsKeepInfluence, "resets of several samples"),
    (EmptyResetIsAnError, "resets"),
    (LostAfterASync, "resets of several samples"),
    (SavingHarms, "save and load"),
    (SavedAliases, "save and load"),
    (LoadAdds, "save and load"),
    (Unpicklable, "save and load"),
    (TrainsTheFrozen, "partly trained"),
    (Clips, "losses of all scales"),
    (SmallIsNothing, "losses of all scales"),
    (OneForAll, "losses of single samples"),
    (NoDirectForScalars, "partly trained"),
    (ForgetsLate, "long stream"),
    (ForgetsLongDormancy, "long dormancy"),
    (CutAfter128, "long stream"),
    (HoldsArrays, "constant memory"),
    (HoldsNumbers, "constant memory"),
    (HoldsTensors, "constant memory"),
    (LeavesHooks, "cell unchanged"),
    (SetsTheDtype, "cell unchanged"),
    (Draws, "cell unchanged"),
    (NeedsAStep, "interface"),
    (StaleInfluence, "influence"),
    (InfluenceHarms, "influence"),
    (InfluenceAfterReset, "influence"),
    (InfluenceFromTheStart, "influence"),
    (InputIsKept, "views as inputs"),
    (NeedsContiguous, "views as inputs"),
]


def promising(make: type[Whole] | type[DenseRTRL], check: str) -> LearnerSpec:
    """A spec that promises all. Sparse cells, which take longer, are used only where the check needs them."""
    sparse = check == "long dormancy"
    return LearnerSpec(make, sparse=sparse, constant_memory=True, copies_inputs=True)


SLOW = {
    ForgetsLongDormancy,
    ForgetsLate,
    HoldsArrays,
    HoldsTensors,
}  # others of these, and the catalogue of bugs, have a fault for the same check


@pytest.mark.parametrize(
    ("make", "check"),
    [
        pytest.param(make, check, id=make.__name__, marks=[pytest.mark.nightly] if make in SLOW else [])
        for make, check in WRONG
    ],
)
def test_a_wrong_learner_is_refused(make: type[Whole] | type[DenseRTRL], check: str) -> None:
    report = check_learner(promising(make, check), checks=[check], on_fail="return")
    assert check in {failure.check for failure in report.failures}


def test_a_learner_may_keep_its_inputs_unless_it_promises_not_to() -> None:
    assert check_learner(LearnerSpec(InputIsKept, sparse=False), checks=["views as inputs"]).passed


def test_what_a_learner_sets_is_set_back() -> None:
    check_learner(SetsTheDtype, checks=["dense cell"])
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("check", sorted({check for make, check in WRONG if issubclass(make, Whole)}))
def test_the_right_one_passes(check: str) -> None:
    assert check_learner(promising(Whole, check), checks=[check]).checks == [check]


@pytest.mark.parametrize(("horizon", "claimed"), [(40, 50), pytest.param(120, 150, marks=pytest.mark.nightly)])
def test_a_long_horizon_is_tried_at_its_length(horizon: int, claimed: int) -> None:
    def make(cell: Any, batch_size: int) -> TBPTT:
        return TBPTT(cell, batch_size, horizon)

    spec = LearnerSpec(make, law=ExactWithin(claimed))
    assert not check_learner(spec, checks=["long stream"], on_fail="return").passed


RAISING: list[tuple[str, Callable[..., Any]]] = [
    ("no learner", lambda cell, batch_size: None),
    ("its maker raises", lambda cell, batch_size: 1 / 0),
    ("the class itself", lambda cell, batch_size: Textbook),
    ("no step", lambda cell, batch_size: object()),
]


@pytest.mark.parametrize(("what", "make"), RAISING, ids=[what for what, _ in RAISING])
def test_whatever_a_learner_raises_all_checks_are_reported(what: str, make: Callable[..., Any]) -> None:
    report = check_learner(LearnerSpec(make, sparse=False), on_fail="return")
    assert not report.passed
    assert report.failures[0].check == "interface"
    assert len({failure.check for failure in report.failures}) > 10


@pytest.mark.parametrize(
    "found",
    [None, {}, {1: 2}, {None: torch.ones(1)}, {"inward.weight": torch.ones(7)}, {"inward.weight": "text"}, 3],
)
def test_whatever_a_function_returns_is_a_failure(found: Any) -> None:
    spec = LearnerSpec(gradients=lambda cell, xs, loss: found)
    assert not check_learner(spec, checks=["interface", "dense cell", "cell unchanged"], on_fail="return").passed


class TwoItemsOnly(Textbook):
    def step(self, x: Any) -> Any:
        y, _ = self.cell(x, self.h)
        return super().step(x) if y is not None else y


def test_a_learner_of_dense_cells_hears_how_to_say_so() -> None:
    (failure,) = check_learner(TwoItemsOnly, checks=["dormant slices"], on_fail="return").failures
    assert "sparse=False" in failure.message
    dense = check_learner(LearnerSpec(TwoItemsOnly, sparse=False), checks=["dense cell", "dormant slices"])
    assert dense.checks == ["dense cell"]
    assert "sparse=False" in dense.skipped["dormant slices"]
