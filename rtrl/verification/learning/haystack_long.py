"""Claim: `BlockRTRL` learns to carry a symbol over a gap at which truncated BPTT of the same bytes stays at chance.

**How it is measured.** The task is the haystack: BOS, noise, KEY, k, SEP, noise, Q, one symbol per step, and k is asked
at Q. The noise is made of the same symbols as k, so nothing but the key says which of them counts, and between SEP and
Q stand at least `gap` of them. A small GRU, float32, is trained from the same weights, on the same episodes, with the
same Adam and clipping: by `BlockRTRL`, and by sliding truncated BPTT with several horizons, one of them the longest
whose bytes held between steps do not exceed those of `BlockRTRL`. Each learner is tried *without a curriculum*, on the
last gap from the beginning, and *with one*: gaps that double from 8 on, the next one when the last is solved. "Solved"
is judged on held-out episodes of the last gap, from another stream. *Control:* in float64 the first updates of
`BlockRTRL` must be those of full BPTT, and those of truncated BPTT of the same bytes must not, or the check fails.

**Why that is fair.** Truncation alone differs. The parameters change at the ends of episodes alone, so that every
gradient belongs to one set of parameters. The update gate begins biased towards keeping the state, for all. Bytes are
read off `retained_bytes()` in the run, the influence included; truncated BPTT also needs the graph of its whole horizon
while it goes backward, and `BlockRTRL` that of one block: neither is counted, which favours truncated BPTT. It may take
as many episodes as `BlockRTRL` took.

**What it leaves open.** With a curriculum truncated BPTT learns to keep k over a short gap, and then keeps it for
longer than it can see: on this task exact gradients are needed only where no shorter gaps are to be had. The advantage
is also that of a small state: the influence of a GRU takes about 3 H² times the bytes of one step, so with H = 64 the
same bytes would be a horizon of more than 10 000 steps. One cell and one optimizer are tried; a run that learns nothing
ends at a cap of episodes.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

import rtrl
from rtrl.learners import BPTT, TBPTT
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import Plot, Series, Table, VerticalLine
from rtrl.tasks.haystack import Haystack
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.measuring import percent
from rtrl.verification.harness.training_runs import (
    History,
    MakeLearner,
    TrainingConfig,
    evaluate_held_out,
    train,
    train_in_lockstep,
)

CLAIMED_GAP = 256
TOLERANCE = 1e-6
EXACT = "BlockRTRL"


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    gap: int = 30  # the last gap
    values: int = 2  # k is one of this number of symbols
    hidden: int = 2  # H of the GRU
    block: int = 8  # of ``BlockRTRL``
    keep: float = 3.0  # the bias of the update gate at the start
    batch_size: int = 64  # B
    rate: float = 0.03  # the learning rate of Adam
    episodes: int = 400  # the most episodes of a stage, by ``BlockRTRL``
    seeds: int = 1  # counted from the settings' seed
    others: tuple[int, ...] = ()  # horizons tried besides that of the same bytes
    exact_curriculum: bool = False  # whether ``BlockRTRL`` is tried with a curriculum too
    trained: bool = True  # False takes the control's updates alone
    evaluation_steps: int = 600  # steps of the evaluation

    @property
    def curriculum(self) -> list[int]:
        """The gaps, doubled from 8 on, up to the last one."""
        gaps = [8]
        while 2 * gaps[-1] < self.gap:
            gaps.append(2 * gaps[-1])
        return [*gaps, self.gap]

    def training(self, gap: int, episodes: int, seed: int) -> TrainingConfig:
        """Return how the cell is trained at one gap."""
        task = Haystack(self.values, gap=gap)
        return TrainingConfig(task, self.batch_size, self.rate, episodes, seed=seed, until=0.995)


@dataclass(frozen=True)
class Run:
    """One training: held-out accuracy at the last gap, the most bytes held, and episodes and steps taken."""

    learner: str  # "BlockRTRL" or "TBPTT"
    horizon: int | None  # None for ``BlockRTRL``
    curriculum: bool  # whether the gap grew
    seed: int
    accuracy: float
    held: int
    episodes: int
    steps: int


@dataclass(kw_only=True)
class Runs(Measurements):
    """The horizon of the same bytes, the control's distances after each update, and all trainings."""

    config: Config
    equal: int  # the longest horizon within the bytes of ``BlockRTRL``
    apart: list[float] = field(default_factory=list)  # the distances of BlockRTRL from full BPTT
    cut_apart: float = 0.0  # that of truncated BPTT of the same bytes after its first update
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.apart or not max(self.apart) <= TOLERANCE:
            self.failures.append(
                f"the weights of BlockRTRL and of BPTT are apart by {max(self.apart, default=float('nan')):.1e}"
            )
        if not self.cut_apart > TOLERANCE:
            self.failures.append(
                f"truncated BPTT with a horizon of {self.equal} takes the updates of full BPTT over a gap of "
                f"{self.config.gap}"
            )

    def of(self, learner: str, curriculum: bool, horizon: int | None = None) -> list[Run]:
        """Return the runs of a learner, one for each seed."""
        return [
            run for run in self.runs if (run.learner, run.curriculum, run.horizon) == (learner, curriculum, horizon)
        ]


def make_cell(config: Config, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a GRU that begins by keeping its state."""
    torch.manual_seed(seed)
    gru, head = nn.GRUCell(config.values + 4, config.hidden), nn.Linear(config.hidden, config.values)
    with torch.no_grad():
        gru.bias_ih[config.hidden : 2 * config.hidden] = config.keep
        gru.bias_hh[config.hidden : 2 * config.hidden] = 0.0
    return rtrl.cells.from_torch(gru, head).to(dtype)


def held_by(make: MakeLearner, config: Config, steps: int) -> int:
    """Return the most bytes that a learner holds between steps."""
    learner, most = make(make_cell(config, 0), config.batch_size), 0
    for _ in range(steps):
        learner.step(torch.zeros(config.batch_size, config.values + 4))
        most = max(most, sum(learner.retained_bytes().values()))
    return most


def horizon_within(budget: int, config: Config) -> int:
    """Return the longest horizon with which truncated BPTT holds at most ``budget`` bytes between steps."""

    def held(horizon: int) -> int:
        return held_by(lambda cell, b: TBPTT(cell, b, horizon), config, horizon + 3)

    per_step = held(3) - held(2)
    horizon = max(1, (budget - held(2)) // per_step + 2)
    while horizon > 1 and held(horizon) > budget:
        horizon -= 1
    return int(horizon)


def near_chance(task: Haystack) -> float:
    """Return the largest accuracy that counts as having learned nothing."""
    return task.chance + 0.1 * (1 - task.chance)


def verdict(m: Runs) -> Judgement:
    """Judge what was learned without a curriculum, and say what a curriculum changes."""
    config, task = m.config, Haystack(m.config.values, gap=m.config.gap)
    exact, equal = m.of(EXACT, False), m.of("TBPTT", False, m.equal)
    helped = m.of("TBPTT", True, m.equal)
    solved = [run.accuracy >= task.solved for run in exact]
    good = [a and b.accuracy <= near_chance(task) for a, b in zip(solved, equal, strict=True)]
    said = f"with a gap of {config.gap} and the bytes of a horizon of {m.equal} steps"
    if m.equal >= config.gap:
        return Judgement("not measured", f"the horizon of {m.equal} steps reaches over the gap of {config.gap}")
    if exact:
        said += f", BlockRTRL solves it on {sum(solved)} of {len(solved)} seeds"
    if helped:
        straight, reached = (sum(run.accuracy >= task.solved for run in runs) for runs in (equal, helped))
        said += (
            f"; truncated BPTT of the same bytes on {straight} of {len(equal)} without a curriculum, and on {reached} "
            f"of {len(helped)} where the gaps may grow from 8 on"
        )
    if config.gap < CLAIMED_GAP:
        return Judgement.not_at_claimed_size(said)
    if not any(solved):
        return Judgement.does_not_hold(f"BlockRTRL does not solve this gap either; {said}")
    if not any(good):
        return Judgement.does_not_hold(f"truncated BPTT learns something in spite of its short horizon; {said}")
    if all(good) and not any(run.accuracy > near_chance(task) for run in helped):
        return Judgement.holds()
    return Judgement.holds_when(f"there is no curriculum, and the state is small: {said}")


def show(m: Runs) -> Shown:
    """Show accuracy over memory, with and without a curriculum."""
    config = m.config
    columns = ["learner", "horizon", "curriculum", "seed", "held-out accuracy", "bytes held", "episodes", "steps"]
    rows = [list(asdict(run).values()) for run in m.runs]
    control = [[len(m.apart), max(m.apart, default=None), m.equal, m.cut_apart]]
    beside = ["updates", "BlockRTRL apart from BPTT", "horizon of the same bytes", "TBPTT apart from BPTT"]
    tables = [Table(f"The first updates at a gap of {config.gap}, float64", beside, control)]
    plots = []
    if rows:
        tables.insert(0, Table(f"Held-out accuracy at a gap of {config.gap}", columns, rows))
        plots.append(_over_memory(m))
    steps = f"T = {config.gap + 6}–{config.gap + 8}"
    model = f"GRU, H = {config.hidden}, {steps}, {config.seeds} seeds, B = {config.batch_size}"
    said = "; ".join(
        f"{name} {_range(runs)}"
        for name, runs in (
            ("BlockRTRL", m.of(EXACT, False)),
            (f"TBPTT of the same bytes (horizon {m.equal})", m.of("TBPTT", False, m.equal)),
            ("the same with a curriculum", m.of("TBPTT", True, m.equal)),
        )
        if runs
    )
    headline = f"At a gap of {config.gap}: {said}." if said else ""
    return Shown(f"gap {config.gap}: {said or 'only the first updates were taken'}", tables, plots, headline, model)


def _over_memory(m: Runs) -> Plot:
    """Draw accuracy over the bytes held: the median of the seeds, with its spread."""
    lines = []
    for learner, curriculum in dict.fromkeys((run.learner, run.curriculum) for run in m.runs):
        chosen = [run for run in m.runs if (run.learner, run.curriculum) == (learner, curriculum)]
        points = [[run for run in chosen if run.horizon == h] for h in sorted({run.horizon or 0 for run in chosen})]
        points = points if learner != EXACT else [chosen]
        accuracies = [[run.accuracy for run in runs] for runs in points]
        name = f"{learner}, {'with' if curriculum else 'without'} a curriculum"
        held = [float(runs[0].held) for runs in points]
        lines.append(Series.of_runs(name, held, [list(column) for column in zip(*accuracies, strict=True)]))
    exact = next(run.held for run in m.runs if run.learner == EXACT)
    drawn = Plot("Accuracy over memory", "bytes held between steps", "held-out accuracy", lines, log_x=True)
    drawn.vertical_lines.append(VerticalLine(exact, "the bytes of BlockRTRL"))
    return drawn


def _range(runs: Sequence[Run]) -> str:
    low, high = min(run.accuracy for run in runs), max(run.accuracy for run in runs)
    return percent(low) if low == high else f"{percent(low)} … {percent(high)}"


_TASK = Haystack(Config().values, gap=CLAIMED_GAP)


@claim(
    "haystack-long",
    claimed="BlockRTRL solves a haystack whose gap truncated BPTT of equal memory cannot see over",
    threshold=(
        f"gap ≥ {CLAIMED_GAP}: BlockRTRL ≥ {percent(_TASK.solved)}, TBPTT ≤ {percent(near_chance(_TASK))} (chance "
        f"{percent(_TASK.chance)})"
    ),
    quick=Config(),
    full=Config(
        gap=CLAIMED_GAP, hidden=4, episodes=500, seeds=3, others=(8, CLAIMED_GAP + 8), exact_curriculum=True,
        evaluation_steps=4000,
    ),
    small=Config(gap=48, batch_size=4, trained=False),
    verdict=verdict,
    show=show,
    question="learns",
    noticed_breaks=("truncate", "off-by-one", "long-tbptt"),
)  # fmt: skip
def measure(config: Config, settings: Settings) -> Runs:
    """Take the control's updates, and train every run."""

    def exact(cell: nn.Module, batch_size: int) -> BlockRTRL:
        return BlockRTRL(cell, batch_size, block=config.block)

    def unaudited(cell: nn.Module, batch_size: int) -> BlockRTRL:  # the distance alone judges the control
        return BlockRTRL(cell, batch_size, block=config.block, audit="off")

    held = held_by(exact, config, 3 * config.block)
    equal = horizon_within(held, config)
    settings.progress("the first updates beside BPTT")
    double, few = make_cell(config, settings.seed, torch.float64), config.training(config.gap, 2, settings.seed)
    apart = train_in_lockstep(double, few, BPTT, unaudited, lambda _: None)
    cut_apart = train_in_lockstep(
        double, replace(few, episodes=1), BPTT, lambda cell, b: TBPTT(cell, b, equal), lambda _: None
    )[0]
    m = Runs(config=config, equal=equal, apart=apart, cut_apart=cut_apart)
    for seed in range(settings.seed, settings.seed + config.seeds) if config.trained else ():
        m.runs += _of_seed(config, seed, exact, equal, settings)
    m.failures += [
        f"seed {run.seed}: truncated BPTT with a horizon of {equal} held {run.held} bytes, BlockRTRL {held}"
        for run in m.runs
        if run.horizon == equal and run.held > held
    ]
    return m


def _of_seed(config: Config, seed: int, exact: MakeLearner, equal: int, settings: Settings) -> Iterator[Run]:
    """Train every learner from the weights of a seed."""
    start = make_cell(config, seed)

    def run(name: str, horizon: int | None, curriculum: bool, make: MakeLearner, limits: Sequence[int]) -> Run:
        cell, gaps = copy.deepcopy(start), config.curriculum if curriculum else [config.gap]
        label = f"seed {seed}, {name} {horizon or ''}{', growing gaps' if curriculum else ''}"
        stages: list[History] = []
        for gap, limit in zip(gaps, limits, strict=True):
            how = config.training(gap, limit, seed)

            def progress(n: int, gap: int = gap) -> None:
                settings.progress(f"{label}, gap {gap}, episode {n}")

            stages.append(train(cell, how, make, progress))
        task = Haystack(config.values, gap=config.gap)
        accuracy = evaluate_held_out(cell, task, steps=config.evaluation_steps)
        held, episodes = max(stage.most_bytes for stage in stages), sum(stage.episodes for stage in stages)
        return Run(name, horizon, curriculum, seed, accuracy, held, episodes, sum(stage.steps for stage in stages))

    best = run(EXACT, None, False, exact, [config.episodes])
    yield best
    growing = [max(config.episodes // 2, 1)] * len(config.curriculum)
    if config.exact_curriculum:
        yield run(EXACT, None, True, exact, growing)
    for horizon in sorted({equal, *config.others}):

        def make(cell: nn.Module, b: int, horizon: int = horizon) -> TBPTT:
            return TBPTT(cell, b, horizon)

        yield run("TBPTT", horizon, False, make, [best.episodes])
        yield run("TBPTT", horizon, True, make, growing)
