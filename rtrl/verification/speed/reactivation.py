"""An expert that is dormant in a learner's stream for a long time, and then reactivated: gradient and cost."""

import statistics
from dataclasses import dataclass

import torch

import oracles
from rtrl.verification.harness.measuring import count_macs
from rtrl.verification.harness.problems import HideSparsity, LearnerRun, Mixture, Problem, check_gradients, problem

BESIDE = 8
"""The number of steps before and after the reactivation whose costs are shown."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the first expert of a mixture is active.

    Attributes:
        mixture: the mixture.
        until: the first steps, in which it is active; 0 for never before.
        resumes: the step at which it is active again, and at every step from then on.
        steps: the length of the stream; there is a loss at every step.
        window: of the learner, which takes the steps one at a time.
    """

    mixture: Mixture
    until: int = 4
    resumes: int = 200
    steps: int = 224
    window: int = 256

    def problem(self, seed: int) -> Problem:
        """Return a stream in whose x the choices are recorded: slots and the other experts are drawn."""
        stream = problem(self.mixture, self.steps, seed, torch.float64)
        draw = torch.Generator().manual_seed(seed + 2)
        rows = []
        for t, x in enumerate(stream.xs):
            slots = torch.randperm(self.mixture.n_slots, generator=draw)[:2]
            others = 1 + torch.randperm(self.mixture.n_experts - 1, generator=draw)[:2]
            experts = torch.tensor([0, int(others[0])]) if t < self.until or t >= self.resumes else others
            rows.append(torch.cat([x, torch.cat([slots, slots, experts])[None].to(x)], dim=-1))
        return Problem(stream.cell, torch.stack(rows), stream.targets)


@dataclass(frozen=True, slots=True)
class Reactivation:
    """What it came to: the schedule, the gradient's error and what differs, multiply-adds by processed step around the
    reactivation, and what it would take to apply the dormant steps one by one to the expert's influence."""

    schedule: Schedule
    error: float
    differs: list[str]
    macs: dict[int, int]
    one_by_one: int

    @property
    def catch_up(self) -> float:
        """The multiply-adds at the reactivation above the median of the steps before."""
        resumes = self.schedule.resumes
        return self.macs[resumes] - statistics.median(macs for t, macs in self.macs.items() if t < resumes)


def reactivate(schedule: Schedule, seed: int) -> Reactivation:
    """Run the learner over the stream, and compare its gradients with the oracle's backpropagation through time."""
    stream = schedule.problem(seed)
    run = LearnerRun(stream, {"recorded": True}, block=1, window=schedule.window)
    run.advance(schedule.resumes - BESIDE + 1)
    macs = {}
    for t in range(schedule.resumes - BESIDE, min(schedule.resumes + BESIDE, schedule.steps - 1)):
        macs[t] = count_macs(lambda: run.advance(1))  # step t is processed when the next one is taken
    run.advance(schedule.steps - run.t)
    run.sync()
    cell = HideSparsity(stream.cell, recorded=True)
    expected = {name.removeprefix("cell."): g for name, g in oracles.bptt(cell, stream.xs, stream.loss).items()}
    what = f"reactivated at step {schedule.resumes}, window {schedule.window}"
    compared, differs = check_gradients(run.gradients(), expected, what)
    expert = sum(p[0].numel() for name, p in stream.cell.named_parameters() if name.startswith("expert_"))
    touched = 2 * schedule.mixture.d_model
    dormant = schedule.resumes - schedule.until if schedule.until else 0
    return Reactivation(schedule, compared.error, differs, macs, dormant * touched**2 * expert)
