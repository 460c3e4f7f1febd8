"""The mixture of experts against full RTRL over all its parameters, and a batch of samples against one."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from agreement import assert_roughly_equal, check_agreement
from bars import BATCH_COUNTED, SIZES, Mixture
from counting import macs, textbook_macs
from measuring import Measurement
from mixtures import forced, undeclared
from problems import Problem, mixture
from rivals import Ours, Product, Textbook, Unrolled

from rtrl.profiling.timing import alternate, median_ratio, medians

COLUMNS = 1 << 15
"""The number of columns of S that are moved where all of them do not fit."""


def test_full_rtrl_costs_what_the_formula_says() -> None:
    problem = mixture(8, 4, 4)
    side = Textbook(problem)
    side.advance(1)
    linearised, moved = textbook_macs(side)
    assert moved == problem.hidden**2 * problem.parameters
    assert linearised > problem.hidden * problem.parameters


def available_bytes() -> int:
    """What this machine can still give, 0 if it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def full_step_s(problem: Problem) -> tuple[float, str]:
    """Seconds of a step of full RTRL, and how they were come by.

    S and B take 2·H·P numbers, their making about as many again for a while. Where that does not fit, J @ S is timed on
    some columns and scaled to all; the Jacobians, which full RTRL needs too, are then left out in its favour.
    """
    numbers = problem.hidden * problem.parameters
    if 4 * numbers * 3.5 < available_bytes():
        textbook = Textbook(problem)
        return alternate({"full": lambda: textbook.advance(1)}, 1)["full"][0], "one step, after one that is not timed"
    columns = min(COLUMNS, problem.parameters)
    product = Product(problem.hidden, problem.hidden, columns)
    per_mac = medians(alternate({"product": lambda: product.advance(1)}, 5))["product"]
    return per_mac * problem.hidden * numbers, f"J @ S on {columns} columns, scaled to {problem.parameters}"


def without_declarations() -> float:
    """How many times fewer multiply-adds than full RTRL are left if nothing is declared: the control, at the small
    size, in float64."""
    problem = mixture(*SIZES["small"].mixture.cell, dtype=torch.float64)
    side = Ours(undeclared(problem), block=1)
    side.advance(2)
    return problem.hidden**2 * problem.parameters / macs(side, 1)


def test_a_mixture(measurement: Measurement, benchmark: Any) -> None:
    check_agreement("mixture")
    size = measurement.sizes.mixture
    problem = mixture(*size.cell, steps=(size.warm + 4) * size.block)
    # At full size there is not enough memory for both at once: what full RTRL held is gone before ours begins.
    full_s, how = full_step_s(problem) if measurement.clock else (0.0, "not timed")
    ours = Ours(problem, block=size.block, window=size.window)
    ours.advance(size.block)
    unrolled = Unrolled(problem, size.block)
    unrolled.advance(size.block)
    assert_roughly_equal(ours.gradients(), unrolled.gradients())
    del unrolled
    ours.advance((size.warm - 1) * size.block)

    counted = macs(ours, size.block)
    full_macs = problem.hidden**2 * problem.parameters
    measured = {"mixture.fewer": full_macs / counted, "mixture.control": without_declarations()}
    facts: dict[str, str | float] = {
        "multiply-adds per step": counted,
        "MB held": sum(ours.learner.retained_bytes().values()) / 1e6,
    }
    if measurement.clock:
        ours_s = medians(alternate({"ours": lambda: ours.advance(size.block)}, 2))["ours"]
        measured["mixture.faster"] = full_s / ours_s
        facts.update({"ms per step, ours": 1e3 * ours_s, "s per step, full RTRL": full_s, "full RTRL timed by": how})
    benchmark.pedantic(ours.advance, args=(size.block,), rounds=1)
    measurement.settle(
        measured,
        d_model=size.d_model,
        n_slots=size.n_slots,
        n_experts=size.n_experts,
        H=problem.hidden,
        P=problem.parameters,
        block=size.block,
        window=size.window,
        **facts,
    )


class Batch:
    """Some streams in one learner, and each of them in a separate learner, after their warm-up; the choices are
    prescribed, so that all sides make the same."""

    def __init__(self, samples: int, size: Mixture) -> None:
        self.samples, self.size, self.steps = samples, size, size.warm * size.block
        self.problem = mixture(*size.cell, batch=self.samples, steps=2 * self.steps)
        chosen = forced(self.problem)
        self.together = self.run(chosen)
        self.apart = [self.run(chosen.sample(b)) for b in range(self.samples)]

    def run(self, problem: Problem) -> Ours:
        side = Ours(problem, block=self.size.block, window=self.size.window)
        side.advance(self.steps)
        return side

    def advance_together(self) -> int:
        return self.samples * self.together.advance(self.size.block)

    def advance_apart(self) -> int:
        return sum(side.advance(self.size.block) for side in self.apart)

    @cached_property
    def alone(self) -> float:
        """Multiply-adds a step of a learner of its own, over as many steps as its warm-up had."""
        return sum(macs(other, self.steps) for other in self.apart) / self.samples

    def macs(self, side: Ours) -> float:
        """A sample's multiply-adds over the same steps, in units of those of a learner of its own."""
        return macs(side, self.steps) / self.samples / self.alone

    def check(self, *sides: Ours) -> None:
        summed = {
            name: torch.stack([other.gradients()[name] for other in self.apart]).sum(dim=0)
            for name in self.together.gradients()
        }
        for side in sides:
            assert_roughly_equal(side.gradients(), summed)


def test_a_batch_of_mixtures(measurement: Measurement, benchmark: Any) -> None:
    check_agreement("mixture")
    batch, blocks = Batch(3, BATCH_COUNTED), Batch(3, replace(BATCH_COUNTED, block=4, warm=3))
    union = batch.run(forced(batch.problem, union=True))
    measured = {
        "batch.macs": batch.macs(batch.together),
        "batch.control": batch.macs(union),
        "batch.blocks": blocks.macs(blocks.together),
    }
    batch.check(batch.together, union)
    blocks.check(blocks.together)
    if measurement.clock:
        timed = Batch(8, measurement.sizes.batch)
        times = alternate({"eight": timed.advance_together, "one": timed.advance_apart}, measurement.sizes.rounds)
        timed.check(timed.together)
        measured["batch.time"] = median_ratio(times["eight"], times["one"])
    benchmark.pedantic(batch.advance_together, rounds=3)
    size = measurement.sizes.batch
    measurement.settle(
        measured,
        d_model=size.d_model,
        n_slots=size.n_slots,
        n_experts=size.n_experts,
        block=size.block,
        counted=f"at d_model {BATCH_COUNTED.d_model}, {BATCH_COUNTED.n_slots} slots, {BATCH_COUNTED.n_experts} experts",
    )
