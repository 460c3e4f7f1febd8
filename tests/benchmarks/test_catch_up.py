"""What it costs to catch up an expert that has slept through n dense steps: by the tree's plan, tree upkeep included,
and by applying the n transitions one by one.

With p = k·H columns, one by one takes ``n·k·H³`` multiply-adds. Any composed product takes ``n − 1`` products of H³ and
one application of ``k·H³``, so that no plan saves more than a factor ``n·k / (n − 1 + k)``, about n·k / (n + k): twenty
at n = 1000 needs k > 20.4. Here k = 32. Counts are gated; times are reported beside them. Nothing is measured before
the influences of both sides agree in float64.
"""

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bars import BARS
from measuring import Measurement
from torch import Tensor

import oracles
from rtrl._influence.catch_up import catch_up
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.profiling.macs import MacCounter
from rtrl.profiling.timing import median_ratio, medians


@dataclass(frozen=True)
class Setup:
    """One expert of k·H parameters, asleep for n steps of a dense state of H entries; ``later`` steps before it fell
    asleep, so that the ring has wrapped around."""

    n: int
    size: int
    k: int = 32
    later: int = 0
    dtype: torch.dtype = torch.float32

    def leaf(self, step: int) -> Transition:
        draw = torch.Generator().manual_seed(step)
        jacobian = torch.randn(1, self.size, self.size, generator=draw, dtype=self.dtype) / self.size**0.5
        return Transition(None, None, jacobian, torch.zeros(1, self.size, dtype=self.dtype), self.size, 1)

    def values(self) -> Tensor:
        draw = torch.Generator().manual_seed(10**6)
        return torch.randn(1, self.size, self.k * self.size, generator=draw, dtype=self.dtype)


class Sleeper:
    """An expert's influence, and the history of its sleep."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.values = setup, setup.values()
        self.history = History(setup.n, setup.size, setup.size, torch.zeros(1, setup.size, dtype=setup.dtype))
        for step in range(setup.later + setup.n):
            self.history.append(setup.leaf(step))

    def asleep(self) -> tuple[ParameterInfluence, Tensor]:
        shape = torch.Size([1, self.setup.k * self.setup.size])
        influence = ParameterInfluence(shape, True, 1, self.setup.size, self.values)
        rows = influence.allocate(torch.tensor([0]), self.history.oldest)
        influence.values.copy_(self.values)
        return influence, rows

    def plan_and_lead(self) -> Tensor:
        """By the plan of a tree that has composed nothing yet."""
        late = self.asleep()
        catch_up(self.history, [late])
        return late[0].values

    def one_by_one(self, steps: int) -> Tensor:
        values, first = self.values.clone(), self.history.oldest
        for step in range(first, first + steps):
            self.history.tree.query(step, step + 1).apply_(values)
        return values


def agree(setup: Setup) -> None:
    """Both against the product of the steps, one after the other, in float64 at a size where that takes no time."""
    small = Setup(setup.n, 8, 4, setup.later, torch.float64)
    full = [small.leaf(step) for step in range(small.later, small.later + small.n)]
    phi, _ = oracles.ordered_product([(item.jacobian, item.adjoint) for item in full])
    expected = phi @ small.values()
    sleeper = Sleeper(small)
    for found in (sleeper.plan_and_lead(), sleeper.one_by_one(small.n)):
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def limit(setup: Setup) -> float:
    """What no plan can save more than."""
    return setup.n * setup.k / (setup.n - 1 + setup.k)


def counted(setup: Setup) -> float:
    """Multiply-adds of one by one over those of the plan, compositions included."""
    sleeper = Sleeper(setup)
    with MacCounter() as mine:
        sleeper.plan_and_lead()
    with MacCounter() as theirs:
        sleeper.one_by_one(setup.n)
    assert theirs.macs == setup.n * setup.k * setup.size**3
    return theirs.macs / mine.macs


@pytest.mark.parametrize("n", [100, 1000])
def test_catching_up_after_dense_steps(n: int, measurement: Measurement, benchmark: Any) -> None:
    """The ratio of the counts does not depend on H."""
    small = Setup(n, 8)
    agree(small)
    measured = {f"catchup.fewer.{n}": counted(small)}
    assert measured[f"catchup.fewer.{n}"] <= limit(small)  # more cannot be, and would be a miscount
    setup = Setup(n, measurement.sizes.catch_up if measurement.clock else small.size)
    facts: dict[str, str | float] = {f"at most, n = {n}": limit(setup)}
    if measurement.clock:
        few = 5  # one by one, each step takes the same time
        times: dict[str, list[float]] = {"planned": [], "one by one": []}
        for _ in range(3):
            sleeper = Sleeper(setup)
            start = time.perf_counter()
            sleeper.plan_and_lead()
            middle = time.perf_counter()
            sleeper.one_by_one(few)
            times["planned"].append(middle - start)
            times["one by one"].append((time.perf_counter() - middle) * n / few)
            del sleeper  # gigabytes at full size: not two at once
        measured[f"catchup.faster.{n}"] = median_ratio(times["one by one"], times["planned"])
        facts.update({f"s, n = {n}, {name}": value for name, value in medians(times).items()})
    benchmark.pedantic(Sleeper(Setup(n, small.size)).one_by_one, args=(1,), rounds=1)
    measurement.settle(measured, H=setup.size, k=setup.k, **facts)


def test_a_ring_that_has_wrapped_around_costs_hardly_more() -> None:
    setup = Setup(100, 8, later=37)
    agree(setup)
    assert BARS["catchup.fewer.100"].reached(counted(setup), "full")


def test_with_few_parameters_the_bar_cannot_be_reached(measurement: Measurement, benchmark: Any) -> None:
    """The control: k = 1, where a composed product costs as much as the columns it saves."""
    benchmark.pedantic(counted, args=(Setup(20, 8, k=1),), rounds=1)
    measurement.settle({"catchup.control": counted(Setup(100, 8, k=1))})
