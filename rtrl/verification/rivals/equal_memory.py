"""Claim: with independent rows, exact RTRL learns over delays that truncated BPTT of the same bytes cannot see.

**How it is measured.** Cells whose rows are independent, so that the exact influence takes about as many numbers as
there are parameters (RTU, LRU, element-wise LSTM, minGRU; one of them in two layers), with a linear readout, learn to
remember over a sweep of delays: the sign of a T-maze, symbols to copy, marked numbers to add, the needle of a haystack.
Every episode ends with one update by Adam. The learners are `BlockRTRL`, BPTT through the whole episode, truncated BPTT
with the longest sliding window that holds no more bytes between steps than `BlockRTRL` (both read off
`retained_bytes()`, open block and influence included), SnAp-1, RTRL within each layer, RFLO and UORO. Each of them has
its rate chosen from the same grid by the same number of updates at the shortest delay, on a seed that is not used
again; `BlockRTRL` takes that of BPTT, whose gradient it has. A run has solved the task when its mean training score
over 8 updates of fresh episodes reaches the task's level. The rivals may take twice as many updates as the slowest run
of `BlockRTRL`, within the pair's limit. Seconds are updates times the median of one update's, timed for all learners in
turns on one thread, as processor time, which other work on the machine changes less. A rule whose gradient is the exact
one on a cell is not trained there: the table says so.

**Why that is fair.** All begin with the same weights, see the same episodes, and differ in the gradient alone. The
cells begin with a long memory (|λ| of 0.9 … 0.999, a gate's bias of 3), without which none of the learners learns long
delays; RFLO has the leak 0.05 that fits it. Truncated BPTT also needs a graph of its window while it goes backward,
which is not counted, in its favour. Rules other than BlockRTRL run in a form that linearises whole episodes at once,
faster than the learners of `rtrl.learners`; tests hold their gradients together.

**What it leaves open.** Not every cell is paired with every task: minGRU's gates do not see its state, so that one
layer cannot tell a needle from noise; linear units cannot multiply a number by its mark; for the T-maze all would do.
Sizes are small, because many runs are made; the bytes of the influence grow with the parameters and so does the window
that they buy. Updates come at the ends of episodes alone, so that an advantage of learning within an episode does not
show. Seconds are those of small cells on a CPU, where launches count more than arithmetic.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import rtrl
from rtrl._utils.formatting import number
from rtrl.cells import LRU, RTU, ElementwiseLSTM, MinGRU, Stack
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import Cell, Plot, Series, Table
from rtrl.tasks import Adding, Copy, Haystack, TMaze
from rtrl.tasks.protocol import Task
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.rivals.copies import Copies
from rtrl.verification.rivals.equal_bytes import bytes_of_horizon, horizon_within
from rtrl.verification.rivals.rules import LeakingRule, MaskedRule, RankOneRule, Rule, TruncatedRule, of_layers
from rtrl.verification.rivals.training import (
    MEAN_OF,
    Episodes,
    Run,
    learn_episode,
    loss_of,
    train_copies,
    train_exactly,
)

EXACT, WHOLE, TRUNCATED = "BlockRTRL", "BPTT", "TBPTT, same bytes"
RIVALS = (WHOLE, TRUNCATED, "SnAp-1", "within layers", "RFLO", "UORO")
LEAK = 0.05
ALL_STEPS = 10**9
SAME = 1e-9
"""Gradients in float64 whose distance is at most this part of their length are the same."""
TUNED = 1000
"""Added to the seed with which rates are chosen."""

_TASKS: dict[str, Callable[[int], Task]] = {
    "T-maze": TMaze,
    "copy": lambda delay: Copy(values=2, length=2, delay=delay),
    "adding": lambda delay: Adding(length=delay + 2),
    "haystack": lambda delay: Haystack(values=2, gap=delay, lengths=(delay + 6, delay + 6)),
}


@dataclass(frozen=True)
class Pair:
    """A cell on a task.

    Attributes:
        cell: "RTU", "LRU", "ElementwiseLSTM" or "MinGRU".
        task: "T-maze", "copy", "adding" or "haystack".
        delays: of the sweep.
        layers: of the cell.
        hidden: units of a layer.
        updates: the most updates of a run.
        tuning: the updates by which each rule's rate is chosen, enough for the best rate to learn something.
    """

    cell: str
    task: str
    delays: tuple[int, ...]
    layers: int = 1
    hidden: int = 6
    updates: int = 120
    tuning: int = 24

    @property
    def label(self) -> str:
        """The pair in words."""
        return f"{self.task}, {self.cell}{f' in {self.layers} layers' if self.layers > 1 else ''}"

    def make_task(self, delay: int) -> Task:
        """Return the task with a delay."""
        return _TASKS[self.task](delay)

    def make_cell(self, seed: int) -> nn.Module:
        """Return the cell of a seed, which begins with a long memory."""
        task = self.make_task(self.delays[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            width = task.d_in
            for _ in range(self.layers):
                layers.append(_layer(self.cell, width, self.hidden))
                width = 2 * self.hidden if self.cell == "RTU" else self.hidden
            return Stack([*layers, nn.Linear(width, task.d_out)])


def _layer(name: str, d_in: int, hidden: int) -> nn.Module:
    if name == "RTU":
        return RTU(d_in, hidden, r_min=0.9, r_max=0.999, max_phase=0.3)
    if name == "LRU":
        return LRU(d_in, hidden, hidden, r_min=0.9, r_max=0.999, max_phase=0.3)
    layer = MinGRU(d_in, hidden) if name == "MinGRU" else ElementwiseLSTM(d_in, hidden)
    with torch.no_grad():  # the gate of minGRU lets new values in, that of the LSTM keeps old ones
        layer.gates.bias[:hidden].add_(-3.0 if name == "MinGRU" else 3.0)
    return layer


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    pairs: tuple[Pair, ...] = (Pair("RTU", "T-maze", (4, 24), hidden=4, updates=60),)
    rules: tuple[str, ...] = RIVALS  # those beside `BlockRTRL`
    rates: tuple[float, ...] = (0.03, 0.1)  # of Adam, to choose from
    seeds: int = 3  # counted from the settings' seed
    batch_size: int = 16  # B
    block: int = 4  # of `BlockRTRL`
    rounds: int = 2  # how often each learner is timed


@dataclass(frozen=True)
class Outcome:
    """What one learner came to at one delay: its runs, by seed, and the median seconds of one update."""

    learner: str
    rate: float
    runs: list[Run]
    seconds: float

    @property
    def solved(self) -> int:
        """The number of runs that solved the task."""
        return sum(run.solved is not None for run in self.runs)

    @property
    def updates(self) -> float | None:
        """The median of the updates to solve; None unless most runs solved the task."""
        found = sorted(run.solved or ALL_STEPS for run in self.runs)
        middle = statistics.median(found)
        return None if middle >= ALL_STEPS / 2 else middle


@dataclass(frozen=True)
class Case:
    """A pair at one delay. Learners whose gradient is the exact one are named and not trained."""

    pair: Pair
    delay: int
    steps: int  # of an episode
    horizon: int
    bytes_held: int
    horizon_bytes: int
    outcomes: list[Outcome]
    same: list[str]

    @property
    def exact(self) -> Outcome:
        """The outcome of `BlockRTRL`."""
        return self.outcomes[0]

    @property
    def beyond(self) -> bool:
        """Whether the delay is longer than the window of truncated BPTT."""
        return self.delay > self.horizon

    def of(self, learner: str) -> Outcome | None:
        """Return the outcome of a learner, if it was trained."""
        return next((outcome for outcome in self.outcomes if outcome.learner == learner), None)


@dataclass(kw_only=True)
class Cases(Measurements):
    """All cases."""

    config: Config
    cases: list[Case]


def make_rule(name: str, copies: Copies, horizon: int, seed: int) -> Rule:
    """Return a rule by its name."""
    if name == WHOLE:
        return TruncatedRule(copies, ALL_STEPS)
    if name == TRUNCATED:
        return TruncatedRule(copies, horizon)
    if name == "SnAp-1":
        return MaskedRule(copies)
    if name == "within layers":
        return MaskedRule(copies, of_layers(copies))
    if name == "RFLO":
        return LeakingRule(copies, LEAK)
    return RankOneRule(copies, [torch.Generator().manual_seed(seed + k) for k in range(len(copies))])


def gradient_of(name: str, pair: Pair, task: Task, horizon: int) -> torch.Tensor:
    """Return the gradient of a learner at the first weights, in float64, for one episode."""
    cell = pair.make_cell(0).double()
    episodes = Episodes.draw(task, 2, [0], 0)  # type: ignore[arg-type]
    episodes = replace(episodes, xs=episodes.xs.double())
    if episodes.targets.is_floating_point():
        episodes = replace(episodes, targets=episodes.targets.double())
    if name == EXACT:
        learn_episode(BlockRTRL(cell, 2, block=4), task, episodes)
        return torch.cat([p.grad.flatten() for p in cell.parameters() if p.grad is not None])
    copies = Copies([cell])
    recorded = copies.record(episodes.xs, copies.first_state(2))
    ys = recorded.ys.requires_grad_()
    (dys,) = torch.autograd.grad(loss_of(task, ys, episodes.targets, episodes.has_target), ys)
    gradient = make_rule(name, copies, horizon, 0).gradient(recorded, dys)
    return torch.cat([part.detach().flatten() for part in gradient.values()])


def measure_pair(pair: Pair, config: Config, settings: Settings) -> tuple[list[Case], list[str]]:
    """Measure a pair at all delays; return its cases, and ways in which gradients are not what they should be."""
    short = pair.make_task(pair.delays[0])
    budget = _bytes_of_exact(pair, short, config)
    cell, x = pair.make_cell(0), torch.zeros(config.batch_size, short.d_in)
    horizon = horizon_within(budget, cell, x)
    whole = gradient_of(WHOLE, pair, short, horizon)

    def is_exact(name: str) -> bool:
        return float((gradient_of(name, pair, short, horizon) - whole).norm() / whole.norm()) <= SAME

    failures = [] if is_exact(EXACT) else [f"{pair.label}: the gradient of BlockRTRL is not that of BPTT"]
    same = [name for name in config.rules if name not in (WHOLE, TRUNCATED) and is_exact(name)]
    trained = [name for name in config.rules if name not in same]
    rates = {}
    for name in dict.fromkeys((WHOLE, *trained)):
        settings.progress(f"{pair.label}, {name}, rate")
        rates[name] = _choose_rate(name, pair, short, horizon, config, settings.seed + TUNED)
    held = bytes_of_horizon(cell, x, horizon)
    cases = []
    for delay in pair.delays:
        task, label = pair.make_task(delay), f"{pair.label}, delay {delay}"
        found = {EXACT: _train_exact(pair, task, rates[WHOLE], label, config, settings)}
        slowest = max(run.solved or pair.updates for run in found[EXACT])
        limit = min(2 * slowest, pair.updates)
        for name in trained:
            found[name] = _train_rival(name, pair, task, horizon, rates[name], limit, label, config, settings)
        settings.progress(f"{label}, seconds")
        seconds = _seconds(pair, task, horizon, trained, config)
        outcomes = [Outcome(name, rates.get(name, rates[WHOLE]), runs, seconds[name]) for name, runs in found.items()]
        steps = len(Episodes.draw(task, 1, [0], 0).xs)  # type: ignore[arg-type]
        cases.append(Case(pair, delay, steps, horizon, budget, held, outcomes, same))
    return cases, failures


def _train_exact(pair: Pair, task: Task, rate: float, label: str, config: Config, settings: Settings) -> list[Run]:
    runs = []
    for seed in range(settings.seed, settings.seed + config.seeds):
        progress = partial(_say, settings, f"{label}, BlockRTRL, seed {seed}")
        arguments = (pair.make_cell(seed), config.block, task, config.batch_size, seed, rate, pair.updates)
        runs.append(train_exactly(*arguments, progress))
    return runs


def _say(settings: Settings, label: str, updates: int) -> None:
    settings.progress(f"{label}, update {updates}")


def _bytes_of_exact(pair: Pair, task: Task, config: Config) -> int:
    return train_exactly(
        pair.make_cell(0), config.block, task, config.batch_size, 0, config.rates[0], 2, lambda n: None
    ).most_bytes


def _choose_rate(name: str, pair: Pair, task: Task, horizon: int, config: Config, seed: int) -> float:
    """Return the rate of the grid that solves first, or else whose mean score over the last updates is best."""
    n = len(config.rates)
    if n == 1:
        return config.rates[0]
    rule = make_rule(name, Copies([pair.make_cell(seed)] * n), horizon, seed)
    runs = train_copies(rule, task, config.batch_size, [seed] * n, config.rates, pair.tuning, lambda n: None)
    sign = 1 if task.measure == "accuracy" else -1
    best = max(range(n), key=lambda k: (-(runs[k].solved or ALL_STEPS), sign * runs[k].recent))
    return config.rates[best]


def _train_rival(
    name: str, pair: Pair, task: Task, horizon: int, rate: float, updates: int, label: str, config: Config,
    settings: Settings,
) -> list[Run]:  # fmt: skip
    seeds = range(settings.seed, settings.seed + config.seeds)
    rule = make_rule(name, Copies([pair.make_cell(seed) for seed in seeds]), horizon, settings.seed)
    progress = partial(_say, settings, f"{label}, {name}")
    return train_copies(rule, task, config.batch_size, seeds, [rate] * len(seeds), updates, progress)


def _seconds(pair: Pair, task: Task, horizon: int, names: Sequence[str], config: Config) -> dict[str, float]:
    """Return the median seconds of one update of one run, by learner, timed in turns."""

    def exact() -> Callable[[], None]:
        learner = BlockRTRL(pair.make_cell(0), config.batch_size, block=config.block)
        episodes = Episodes.draw(task, config.batch_size, [0], 0)  # type: ignore[arg-type]

        def once() -> None:
            learn_episode(learner, task, episodes)
            learner.cell.zero_grad()

        return once

    def rival(name: str) -> Callable[[], None]:
        rule = make_rule(name, Copies([pair.make_cell(0)]), horizon, 0)

        def once() -> None:
            train_copies(rule, task, config.batch_size, [0], [0.0], 1, lambda n: None)

        return once

    sides = {EXACT: exact(), **{name: rival(name) for name in names}}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(config.rounds + 1):
        for name, once in sides.items():
            start = time.process_time()
            once()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def verdict(m: Cases) -> Judgement:
    """Judge who solves what."""
    beyond = [case for case in m.cases if case.beyond]
    within = [case for case in m.cases if not case.beyond]
    if m.failures:
        return Judgement.does_not_hold("the gradient of BlockRTRL is not that of BPTT")
    if not beyond:
        return Judgement("not measured", "no delay is longer than the window that the bytes buy")
    runs = sum(len(case.exact.runs) for case in beyond)
    ours, theirs = _solved(beyond, EXACT), _solved(beyond, TRUNCATED)
    if ours <= theirs or 2 * ours < runs:
        return Judgement.does_not_hold(
            f"beyond the window BlockRTRL solved {ours} of {runs} runs, truncated BPTT {theirs}"
        )
    also = [
        f"{name} solved {_solved(m.cases, name)} of {_runs(m.cases, name)}"
        for name in m.config.rules
        if name not in (WHOLE, TRUNCATED) and _solved(m.cases, name)
    ]
    same = sorted({f"{name} ({case.pair.label})" for case in m.cases for name in case.same})
    parts = []
    if ours < runs or theirs or within:
        parts.append(
            f"the delay is longer than the window that the bytes buy: there BlockRTRL solved {ours} of {runs} runs, "
            f"truncated BPTT {theirs}"
        )
    if within:
        parts.append(
            f"at shorter delays truncated BPTT solved {_solved(within, TRUNCATED)} and BlockRTRL "
            f"{_solved(within, EXACT)} of {_runs(within, EXACT)}"
        )
    if also:
        parts.append(f"of all runs, within the window and beyond it, {', '.join(also)}")
    if same:
        parts.append(f"the rules that give the same gradient are left out: {', '.join(same)}")
    return Judgement.holds_when("; ".join(parts)) if parts else Judgement.holds()


def _solved(cases: Sequence[Case], name: str) -> int:
    return sum(outcome.solved for case in cases if (outcome := case.of(name)))


def _runs(cases: Sequence[Case], name: str) -> int:
    return sum(len(outcome.runs) for case in cases if (outcome := case.of(name)))


def show(m: Cases) -> Shown:
    """Show runs solved, updates and seconds to solve, and curves."""
    tables, plots = [], []
    columns = [
        "learner",
        "delay",
        "window",
        "bytes held",
        "rate",
        "solved",
        "of",
        "updates, median",
        "steps",
        "seconds",
    ]
    for pair in m.config.pairs:
        cases = [case for case in m.cases if case.pair == pair]
        rows: list[list[Cell]] = []
        for case in cases:
            for one in case.outcomes:
                window = {EXACT: None, TRUNCATED: case.horizon}.get(one.learner)
                held = {EXACT: case.bytes_held, TRUNCATED: case.horizon_bytes}.get(one.learner)
                n = one.updates
                costs = [None, None, None] if n is None else [n, n * case.steps, n * one.seconds]
                rows.append([one.learner, case.delay, window, held, one.rate, one.solved, len(one.runs), *costs])
            rows += [[f"{name}: the exact gradient", case.delay, *[None] * 8] for name in case.same]
        tables.append(Table(f"To solve: {pair.label}", columns, rows))
        if len(cases) > 1:
            plots += [_by_delay(cases, "updates"), _by_delay(cases, "seconds")]
        plots.append(_curves(cases[-1]))
    return Shown(_result(m), tables, plots, _headline(m), _model(m))


def _by_delay(cases: list[Case], what: str) -> Plot:
    """The median and the quartiles of the updates or seconds to solve, of learners that solved most runs."""
    lines = []
    for name in (one.learner for one in cases[0].outcomes):
        points = []
        for case in cases:
            one = case.of(name)
            if one is None or one.updates is None:
                continue
            worst = max(run.solved or 0 for run in one.runs)
            unit = 1.0 if what == "updates" else one.seconds
            low, middle, high = _quartiles([float(run.solved or worst) for run in one.runs])
            points.append((float(case.delay), low * unit, middle * unit, high * unit))
        if points:
            x, low_, middle_, high_ = (list(column) for column in zip(*points, strict=True))
            lines.append(Series(name, x, middle_, low=low_, high=high_))
    title = f"{what.capitalize()} to solve: {cases[0].pair.label}"
    return Plot(title, "delay, steps", f"{what} to solve", lines, kind="line", log_x=True, log_y=True)


def _curves(case: Case) -> Plot:
    """The median and the quartiles of the training score at one delay."""
    lines = []
    for one in case.outcomes:
        longest = max(len(run.scores) for run in one.runs)
        parts = range(0, longest, MEAN_OF)
        curves = [[statistics.fmean(_padded(run.scores, longest)[i : i + MEAN_OF]) for i in parts] for run in one.runs]
        spread = [_quartiles(list(column)) for column in zip(*curves, strict=True)]
        low, middle, high = (list(column) for column in zip(*spread, strict=True))
        lines.append(Series(one.learner, [float(i + MEAN_OF) for i in parts], middle, low=low, high=high))
    task = case.pair.make_task(case.delay)
    return Plot(f"Learning over {case.delay} steps: {case.pair.label}", "updates", f"training {task.measure}", lines)


def _padded(scores: list[float], length: int) -> list[float]:
    """Scores of a run, its last ones repeated once it has solved the task."""
    return scores + [statistics.fmean(scores[-MEAN_OF:])] * (length - len(scores))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _result(m: Cases) -> str:
    parts = []
    for where, is_beyond in (("beyond the window", True), ("within it", False)):
        cases = [case for case in m.cases if case.beyond == is_beyond]
        names = [name for name in (EXACT, *m.config.rules) if _runs(cases, name)]
        if names:
            counts = [f"{name} {_solved(cases, name)}/{_runs(cases, name)}" for name in names]
            parts.append(f"solved {where}: {', '.join(counts)}")
    return "; ".join(parts)


def _headline(m: Cases) -> str:
    beyond = [case for case in m.cases if case.beyond]
    if not beyond:
        return ""
    return (
        f"Over delays longer than the window that the same bytes buy, BlockRTRL solves {_solved(beyond, EXACT)} of "
        f"{_runs(beyond, EXACT)} runs and truncated BPTT {_solved(beyond, TRUNCATED)}."
    )


def _model(m: Cases) -> str:
    sizes = []
    for pair in m.config.pairs:
        cell = pair.make_cell(0)
        p, h = sum(p.numel() for p in cell.parameters()), rtrl.cells.protocol.first_state(cell, 1).numel()
        sizes.append(f"{pair.label} (P = {number(p)}, H = {h}, delays {', '.join(map(str, pair.delays))})")
    return f"{'; '.join(sizes)}; batches of {m.config.batch_size}, {m.config.seeds} seeds"


_FULL = (
    Pair("RTU", "T-maze", (8, 24, 64)),
    Pair("LRU", "copy", (6, 30), hidden=8, updates=150, tuning=75),
    Pair("ElementwiseLSTM", "adding", (8, 24), hidden=8, updates=250, tuning=60),
    Pair("MinGRU", "haystack", (6, 48), layers=2, hidden=4, updates=200, tuning=120),
)


@claim(
    "equal-memory",
    claimed="cells with independent rows learn by exact RTRL what truncated BPTT of the same bytes does not",
    threshold="beyond the window that the bytes buy, BlockRTRL solves more runs, and at least half",
    quick=Config(),
    full=Config(_FULL, rates=(0.01, 0.03, 0.1), seeds=5),
    small=Config(
        (Pair("RTU", "T-maze", (16,), hidden=3, updates=60),), (TRUNCATED,), (0.1,), seeds=1, block=2, rounds=1
    ),
    question="rivals",
    noticed_breaks=("truncate",),
    verdict=verdict,
    show=show,
)
def measure(config: Config, settings: Settings) -> Cases:
    """Measure all pairs."""
    measured = [measure_pair(pair, config, settings) for pair in config.pairs]
    cases = [case for found, _ in measured for case in found]
    return Cases(config=config, cases=cases, failures=[line for _, lines in measured for line in lines])
