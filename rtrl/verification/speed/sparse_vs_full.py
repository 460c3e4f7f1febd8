"""How much faster sparse updates are than full ones: two claims, on two mixtures."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import oracles
from rtrl.cells.moe import RecurrentMoE
from rtrl.learners import BPTT, BlockRTRL
from rtrl.profiling.timing import alternate, median_ratio, medians
from rtrl.report.model import Cell, Table
from rtrl.tasks import AnBn, Haystack
from rtrl.tasks.protocol import Task, TaskStep
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness import problems
from rtrl.verification.harness.measuring import count_macs, percent, times
from rtrl.verification.harness.problems import DECLARE_NOTHING, ROUGH, HideSparsity, Mixture, check_gradients
from rtrl.verification.harness.training_runs import TrainingConfig, train

EXPLANATION = """
Sparse updates were said to be {claimed} × faster than full updates on a mixture with {sizes}.

**How it is measured.** The mixture is first trained for some updates by backpropagation through time on {task}, so that
its router has learned something. Then learners take the same steps of that task's stream, one sample, each episode
begun by a reset as the task has it, with all gradients delivered after every 16 steps:

- *sparse*: ``BlockRTRL(block=1)`` with what the cell declares: two slots and two experts per step;
- *lazy=False*: the same sparse Jacobians, but every expert is advanced at every step;
- *full*: the same learner with nothing declared, which is textbook RTRL: the whole influence through the whole
  Jacobian, H²·P multiply-adds per step, and that count is checked;
- *sparse, blocks of 16* and *full, blocks of 16*: the first and the third with 16 steps processed together.

Gradients of all sides are compared with BPTT with the same resets, exactly (float64, 1e-10) on a sibling with narrow
slots, and roughly in float32 at the size that is measured; one that differs voids the claim. Seconds are taken in turns
in one process on one thread, as the median of the ratios of neighbours; multiply-adds are counted as they are
dispatched. “Faster” is said of the clock: the verdict rests on seconds, first against *lazy=False*, then against
*full*, both step by step as the sparse side. A table tells what the router does.

**Why that is fair.** “Full updates” can mean two things, and both are reported. All sides are the same code, so that
nothing but sparsity differs. If experts are dormant and ``lazy=False`` costs no more, the check fails: then nothing
lazy was measured.

**What it leaves open.** A reset ends all dormancy, and these episodes are short; *dormancy* and *catch-up* have long
ones. The quick form of *anbn-speed* has slots half as wide, so that full RTRL takes seconds and not minutes.
"""

TASKS: dict[str, Task] = {
    "anbn": AnBn(),
    "haystack": Haystack(12),
    "small anbn": AnBn((2,), (3,), slack=1),
    "small haystack": Haystack(3, lengths=(6, 7)),
}
"""The tasks by name."""


@dataclass(frozen=True, slots=True)
class Config:
    """How much is run.

    Attributes:
        claimed: the ratio that was claimed.
        mixture: the configuration.
        task: the name, in ``TASKS``, of the task whose stream is taken.
        at_claimed_size: whether the mixture is the one of the claim.
        updates: how many updates of training.
        batch_size: B of training.
        steps: the steps of the stream, a multiple of ``deliver``.
        full_steps: how many of them the full side takes, block 1.
        full_blocks: whether the full side is run in blocks, too.
        window: of the learners.
        deliver: the steps between two deliveries, and the longer block.
        narrow: d_model of the sibling on which gradients are compared exactly.
        rounds: how many times each side is timed.
    """

    claimed: float
    mixture: Mixture
    task: str
    at_claimed_size: bool = True
    updates: int = 20
    batch_size: int = 8
    steps: int = 32
    full_steps: int = 32
    full_blocks: bool = True
    window: int = 32
    deliver: int = 16
    narrow: int = 4
    rounds: int = 2

    @property
    def sides(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """Side → (options of the learner, whether the cell declares anything)."""
        one, longer = {"block": 1, "window": self.window}, {"block": self.deliver, "window": self.window}
        sides: dict[str, tuple[dict[str, Any], bool]] = {
            "sparse": (one, True),
            "lazy=False": ({**one, "lazy": False}, True),
            "full": (one, False),
            f"sparse, blocks of {self.deliver}": (longer, True),
        }
        return {**sides, **({f"full, blocks of {self.deliver}": (longer, False)} if self.full_blocks else {})}


@dataclass(frozen=True, slots=True)
class Router:
    """What the router does on the measured stream.

    Attributes:
        score: the score in training over the last updates.
        used: how many experts are active at some step.
        share: the share of (expert, step) pairs that are active.
        dormant: the share of those that are dormant: not active, but active before in the same episode.
        longest: the longest dormancy that an activation ends.
    """

    score: float
    used: int
    share: float
    dormant: float
    longest: int


@dataclass(kw_only=True)
class Ratios(Measurements):
    """P, the router, the largest exact gradient error, and multiply-adds and seconds per step by side."""

    config: Config
    parameters: int
    router: Router
    error: float
    macs: dict[str, float]
    seconds: dict[str, list[float]]

    @property
    def counted(self) -> dict[str, float]:
        """Multiply-adds over those of the sparse side."""
        return {name: macs / self.macs["sparse"] for name, macs in self.macs.items()}

    @property
    def clock(self) -> dict[str, float]:
        """Seconds over those of the sparse side."""
        return {name: median_ratio(values, self.seconds["sparse"]) for name, values in self.seconds.items()}


def verdict(m: Ratios) -> Judgement:
    """Judge the ratios by the clock, against lazy=False first, and say the size if it is another one."""
    found = judge(m.clock, m.counted, m.config.claimed)
    if m.config.at_claimed_size:
        return found
    size = f"d_model {m.config.mixture.d_model}, H = {m.config.mixture.hidden}"
    more = f": {found.condition}" if found.condition else ""
    return Judgement.not_at_claimed_size(f"measured at {size}, where it {found.name}{more}")


def judge(clock: Mapping[str, float], counted: Mapping[str, float], claimed: float) -> Judgement:
    """Judge ratios of time, and of counts, over the sparse side."""

    def listed(name: str) -> str:
        return f"{times(clock[name])} by the clock ({times(counted[name])} by count)"

    if clock["lazy=False"] >= claimed:
        return Judgement.holds()
    alone = f"against lazy=False, which keeps the sparse Jacobians, it is {listed('lazy=False')}"
    if clock["full"] >= claimed:
        return Judgement.holds_when(f"“full updates” means full RTRL: {listed('full')}; {alone}")
    return Judgement.does_not_hold(f"even against full RTRL it is {listed('full')}; {alone}")


def show(m: Ratios) -> Shown:
    """Show times, counts, and what the router does."""
    clock, counted, seconds, config, router = m.clock, m.counted, medians(m.seconds), m.config, m.router
    mixture, task = config.mixture, TASKS[config.task]
    rows: list[list[Cell]] = [[n, seconds[n], clock[n], macs, counted[n]] for n, macs in m.macs.items()]
    size = f"{mixture.name}: d_model {mixture.d_model}, H = {mixture.hidden}, P = {m.parameters:,}"
    seen: list[list[Cell]] = [
        ["updates of training", config.updates],
        [f"{task.measure} in training at its end (chance {task.chance:.2g})", router.score],
        ["experts used, of " + str(mixture.n_experts), router.used],
        ["experts active per step, share", router.share],
        ["experts dormant per step, share", router.dormant],
        ["longest dormancy, steps", router.longest],
        ["largest gradient error, float64, narrow sibling", m.error],
    ]
    return Shown(
        f"sparse is {times(clock['lazy=False'])} faster than lazy=False, {times(clock['full'])} than full RTRL "
        f"(counts: {times(counted['lazy=False'])}, {times(counted['full'])} fewer multiply-adds)",
        [
            Table(
                f"Config {size}; {task.name}, {config.steps} steps, one sample, float32, one thread, one seed",
                ["side", "s per step", "time over sparse", "multiply-adds per step", "count over sparse"],
                rows,
            ),
            Table("The router on this stream", ["what", "value"], seen),
        ],
        model=f"RecurrentMoE, P = {m.parameters:,}, H = {mixture.hidden}, {task.name}, T = {config.steps}, one seed",
    )


@dataclass(frozen=True)
class TaskProblem:
    """A cell, and some steps of a task's stream for one sample; with each x also the choices of a recorded run."""

    cell: RecurrentMoE
    steps: list[TaskStep]
    recorded: list[Tensor]
    task: Task

    @property
    def resets(self) -> Tensor:
        """Which steps begin an episode, (T, 1)."""
        return torch.stack([step.is_first for step in self.steps])

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by the oracle's backpropagation through time."""
        xs = torch.stack([step.x for step in self.steps])
        return oracles.bptt(self.cell, xs, lambda t, y: self.task.loss(y, self.steps[t]), resets=self.resets)

    def first(self, steps: int) -> "TaskProblem":
        """Return the problem with only its first steps."""
        return TaskProblem(self.cell, self.steps[:steps], self.recorded[:steps], self.task)


def task_problem(cell: RecurrentMoE, task: Task, steps: int, seed: int) -> TaskProblem:
    """Return the first steps of the task's stream, and record what the cell chooses there."""
    like = next(cell.parameters())
    stream = list(islice(task.stream(1, seed=seed, dtype=like.dtype), steps))
    h, recorded = cell.init_state(1), []
    with torch.no_grad():
        for step in stream:
            if bool(step.is_first.any()):
                h = cell.init_state(1)
            _, h, used = cell(step.x, h)
            recorded.append(torch.cat([step.x, used.reads, used.writes, used.active["expert_up"]], dim=-1))
    return TaskProblem(cell, stream, recorded, task)


class TaskRun:
    """``BlockRTRL`` on such a problem, which begins again at its end."""

    def __init__(self, problem: TaskProblem, declares: bool, deliver: int, options: Mapping[str, Any]) -> None:
        self.problem, self._declares, self._deliver, self.t = problem, declares, deliver, 0
        self.cell = copy.deepcopy(problem.cell)
        self.cell.zero_grad()
        cell = self.cell if declares else HideSparsity(self.cell, **DECLARE_NOTHING, recorded=True)
        self.learner = BlockRTRL(cell, 1, audit="off", structure="off", **options)

    def advance(self, steps: int) -> int:
        """Take steps, and deliver the gradients after every few."""
        for _ in range(steps):
            place = self.t % len(self.problem.steps)
            step = self.problem.steps[place]
            if self.t and bool(step.is_first.any()):
                self.learner.reset(step.is_first)
            y = self.learner.step(step.x if self._declares else self.problem.recorded[place])
            loss = self.problem.task.loss(y, step)
            if loss is not None:
                self.learner.backward(loss)
            self.t += 1
            if self.t % self._deliver == 0:
                self.learner.sync()
        return steps

    def gradients(self) -> dict[str, Tensor | None]:
        """Deliver and return the gradients so far."""
        self.learner.sync()
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.cell.named_parameters()}


def watch(problem: TaskProblem, score: float) -> Router:
    """Return what the router does in a problem."""
    experts, used = problem.cell.n_experts, set()
    last: dict[int, int] = {}
    active = dormant = longest = 0
    for t, (step, row) in enumerate(zip(problem.steps, problem.recorded, strict=True)):
        if bool(step.is_first.any()):
            last = {}
        chosen = {int(expert) for expert in row[0, -2:]}
        longest = max([longest, *(t - last[expert] - 1 for expert in chosen if expert in last)])
        active, dormant = active + len(chosen), dormant + len(last.keys() - chosen)
        last |= dict.fromkeys(chosen, t)
        used |= chosen
    pairs = experts * len(problem.steps)
    return Router(score, len(used), active / pairs, dormant / pairs, longest)


def _measure(config: Config, settings: Settings) -> Ratios:
    settings.progress("gradients of all sides")
    failures: list[str] = []
    error, task = 0.0, TASKS[config.task]
    narrow = replace(config.mixture, d_model=config.narrow).cell(settings.seed, torch.float64)
    sibling = task_problem(narrow, task, 2 * config.deliver + 4, settings.seed)
    expected = sibling.gradients()
    for name, (options, declares) in config.sides.items():
        run = TaskRun(sibling, declares, config.deliver, options)
        run.advance(len(sibling.steps))
        compared, failed = check_gradients(run.gradients(), expected, f"{name}, float64")
        failures += failed
        error = max(error, compared.error)

    settings.progress("training the router")
    cell = config.mixture.cell(settings.seed)
    course = TrainingConfig(task, config.batch_size, 2e-3, config.updates, seed=settings.seed)
    history = train(cell, course, BPTT, lambda done: settings.progress(f"{done} updates"))
    stream = task_problem(cell, task, config.steps, settings.seed + 1)
    router = watch(stream, list(history.scores.values())[-1])

    macs: dict[str, float] = {}
    runs: dict[str, TaskRun] = {}
    parameters = sum(p.numel() for p in cell.parameters())
    least = config.mixture.hidden**2 * parameters
    rough = {steps: stream.first(steps).gradients() for steps in {config.steps, config.full_steps}}
    for name, (options, declares) in config.sides.items():
        settings.progress(f"counting, {name}")
        steps = config.full_steps if name == "full" else config.steps
        run = runs[name] = TaskRun(stream, declares, config.deliver, options)
        counts = [count_macs(partial(run.advance, n)) for n in ([1] * steps if name == "full" else [steps])]
        macs[name] = sum(counts) / steps
        if any(bool(step.has_target.any()) for step in stream.steps[:steps]):  # else there is no gradient yet
            failures += check_gradients(run.gradients(), rough[steps], f"{name}, float32", ROUGH)[1]
        if name == "full":  # at a delivery two steps are processed, so those are left out
            most = max(count for t, count in enumerate(counts) if (t + 1) % config.deliver)
            if not least <= most <= 1.6 * least:
                failures.append(f"a full update took {most:.3g} multiply-adds, H²·P is {least:.3g}")
    if router.dormant and macs["lazy=False"] <= macs["sparse"]:
        failures.append(f"{percent(router.dormant)} of the experts are dormant, and lazy=False costs no more")

    settings.progress("timing")
    lengths = {name: config.full_steps if name == "full" else config.steps for name in runs}
    sides = {name: partial(run.advance, lengths[name]) for name, run in runs.items()}
    seconds = alternate(sides, config.rounds, settings.device)
    return Ratios(
        config=config, parameters=parameters, router=router, error=error, macs=macs, seconds=seconds, failures=failures
    )


VOID = "the gradients or the counts are wrong, so the results are void"
BREAKS = ("eager", "ignore-experts", "off-by-one", "forget-dormant-losses")
SPEED = replace(problems.SPEED, d_in=2, d_out=2)
"""Config *speed* with the inputs and outputs of the task."""

anbn = claim(
    "anbn-speed",
    claimed="2.72 × faster than full updates (d_model 64, 8 slots, 16 experts, 50 steps)",
    threshold="≥ 2.72 × by the clock",
    quick=Config(
        2.72,
        replace(SPEED, name="speed, half as wide", d_model=32),
        "anbn",
        False,
        10,
        steps=20,
        full_steps=3,
        full_blocks=False,
    ),
    full=Config(2.72, SPEED, "anbn", updates=300, steps=64, full_steps=3, full_blocks=False, narrow=8, rounds=3),
    verdict=verdict,
    show=show,
    question="clock",
    void=VOID,
    explanation=EXPLANATION.format(claimed=2.72, sizes="d_model 64, 8 slots, 16 experts", task="aⁿbⁿ"),
    small=Config(2.72, Mixture("small", 2, 2, 8, 4, 6), "small anbn", False, 2, 2, 8, 8, True, 8, 4, 4, 1),
    noticed_breaks=BREAKS,
)(_measure)

haystack = claim(
    "haystack-speed",
    claimed="1.51 × faster than full updates (d_model 32, 4 slots, 8 experts)",
    threshold="≥ 1.51 × by the clock",
    quick=Config(1.51, problems.HAYSTACK, "haystack", updates=10, steps=16, full_steps=16, full_blocks=False),
    full=Config(1.51, problems.HAYSTACK, "haystack", updates=300, steps=128, full_steps=64, narrow=8, rounds=5),
    verdict=verdict,
    show=show,
    question="clock",
    void=VOID,
    explanation=EXPLANATION.format(claimed=1.51, sizes="d_model 32, 4 slots, 8 experts", task="the haystack"),
    small=Config(1.51, Mixture("small", 7, 3, 4, 4, 6), "small haystack", False, 2, 2, 8, 8, True, 8, 4, 4, 1),
    noticed_breaks=BREAKS,
)(_measure)
