"""The cost of bringing an expert up to date that was dormant for n dense steps: by the tree's plan, upkeep of the tree
included, and by applying the n transitions one by one.

With p = k·H columns, one by one takes ``n·k·H³`` multiply-adds. Any composed product takes ``n − 1`` products of H³ and
one application of ``k·H³``, so that no plan saves more than a factor ``n·k / (n − 1 + k)``, about n·k / (n + k): twenty
at n = 1000 needs k > 20.4. Here k = 32. Counts are gated; times are reported beside them. Nothing is measured before
the influences of both sides agree in float64.
"""

import time
from typing import Any

import pytest
import torch
from bars import BARS
from measuring import Measurement

import oracles
from rtrl.profiling import median_ratio, medians
from rtrl.verification.harness.dormant_slice import Dormancy, DormantSlice, worst_error
from rtrl.verification.harness.measuring import count_macs


def dense(n: int, size: int, k: int = 32, dtype: torch.dtype = torch.float32) -> Dormancy:
    """An expert of k·H parameters, dormant for n steps of a dense state of H entries."""
    return Dormancy(n, 1, size, 1, k, dtype)


def limit(dormancy: Dormancy) -> float:
    """What no plan can save more than."""
    return dormancy.n * dormancy.k / (dormancy.n - 1 + dormancy.k)


def counted(dormancy: Dormancy) -> float:
    """Multiply-adds of one by one over those of the plan, compositions included."""
    dormant = DormantSlice(dormancy)
    planned, one_by_one = count_macs(dormant.planned), count_macs(lambda: dormant.one_by_one(dormancy.n))
    assert one_by_one == dormancy.n * dormancy.k * dormancy.hidden**3
    return one_by_one / planned


@pytest.mark.parametrize("n", [100, 1000])
def test_catching_up_after_dense_steps(n: int, measurement: Measurement, benchmark: Any) -> None:
    """The ratio of the counts does not depend on H."""
    small = dense(n, 8)
    assert worst_error(dense(n, 8, 4, torch.float64)) <= 1e-12
    measured = {f"catchup.fewer.{n}": counted(small)}
    assert measured[f"catchup.fewer.{n}"] <= limit(small)  # more cannot be, and would be a miscount
    dormancy = dense(n, measurement.sizes.catch_up) if measurement.clock else small
    facts: dict[str, str | float] = {f"at most, n = {n}": limit(dormancy)}
    if measurement.clock:
        few = 5  # one by one, each step takes the same time
        times: dict[str, list[float]] = {"planned": [], "one by one": []}
        for _ in range(3):
            dormant = DormantSlice(dormancy)
            start = time.perf_counter()
            dormant.planned()
            middle = time.perf_counter()
            dormant.one_by_one(few)
            times["planned"].append(middle - start)
            times["one by one"].append((time.perf_counter() - middle) * n / few)
            del dormant  # gigabytes at full size: not two at once
        measured[f"catchup.faster.{n}"] = median_ratio(times["one by one"], times["planned"])
        facts.update({f"s, n = {n}, {name}": value for name, value in medians(times).items()})
    benchmark.pedantic(DormantSlice(small).one_by_one, args=(1,), rounds=1)
    measurement.settle(measured, H=dormancy.hidden, k=dormancy.k, **facts)


def test_a_ring_that_has_wrapped_around_costs_hardly_more() -> None:
    n, later = 100, 37

    def wrapped(dormancy: Dormancy) -> DormantSlice:
        dormant = DormantSlice(dormancy)
        for step in range(n, n + later):
            dormant.history.append(dormancy.transition(step))
        return dormant

    exact = dense(n, 8, 4, torch.float64)
    none = torch.zeros(exact.hidden, dtype=exact.dtype)
    product, _ = oracles.ordered_product([(exact.full_jacobian(step), none) for step in range(later, n + later)])
    expected = product @ exact.values()
    assert float((wrapped(exact).planned() - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    dormancy = dense(n, 8)
    fewer = n * dormancy.k * dormancy.hidden**3 / count_macs(wrapped(dormancy).planned)
    assert BARS["catchup.fewer.100"].reached(fewer, "full")


def test_with_few_parameters_the_bar_cannot_be_reached(measurement: Measurement, benchmark: Any) -> None:
    """The control: k = 1, where a composed product costs as much as the columns it saves."""
    benchmark.pedantic(counted, args=(dense(20, 8, k=1),), rounds=1)
    measurement.settle({"catchup.control": counted(dense(100, 8, k=1))})
