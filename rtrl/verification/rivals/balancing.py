"""Claim: where a parameter helps at first and harms later, exact RTRL converges and its rivals do not.

The system is *influence balancing* of Tallec and Ollivier (2017): a chain of units, each of which becomes half its own
value plus half that of the unit behind it. The parameter pushes units near the output up and units far behind it down,
and there are more of the latter. So a larger parameter first raises the output, and in the end lowers it. A learner
that sees the beginning alone learns in the wrong direction.

**How it is measured.** Two systems. *One parameter*, as in the source: 23 units, the first 10 pushed up and the other
13 down. *Many parameters*: several chains, each with a parameter of its own that pushes the first unit up, the last
three down, and those between not at all. The loss at every step is half the squared distance of each output from 1. The
parameters change by plain gradient descent every few steps, at the rates of a grid, from several random starts, in
float64. `BlockRTRL` takes the real steps. Truncated BPTT has the longest sliding window that holds no more bytes than
`BlockRTRL`, both read off `retained_bytes()`; RFLO has the leak that fits this chain, 1/2. The rivals run side by side,
in a form that is compared with `rtrl.learners` in each measurement. A rule *converges* if its mean loss over the last
tenth of the steps is at most a thousandth of the loss at rest of the starting parameters, from every start, at its best
rate. *Beside:* each rule's gradient at the starting parameters, held fixed, against the exact one: its direction, its
length and its scatter over random draws; and truncated BPTT with more bytes, until it converges.

**Why that is fair.** Every rule is judged at its own best rate of the same grid, over the same steps. The leak of RFLO
is the true diagonal of the dynamics, so that what it lacks is what it always lacks, the coupling of units.

**What it leaves open.** The system is made to mislead, by its authors, and is linear. UORO is unbiased, and converges
in the source with small rates in many more steps than are taken here. With one parameter that drives every unit, SnAp-1
leaves nothing out: the verdict says so if it is seen.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._utils.formatting import number
from rtrl.learners import RFLO, TBPTT, UORO, Learner, SnAp
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import Cell, Plot, Series, Table
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.rivals.balancing_cell import BalancingCell, Chains
from rtrl.verification.rivals.copies import Copies
from rtrl.verification.rivals.equal_bytes import bytes_of_horizon, held, horizon_within
from rtrl.verification.rivals.rules import LeakingRule, MaskedRule, RankOneRule, Rule, TruncatedRule

LEAK = 0.5
CONVERGED = 1e-3
"""Of the loss at rest of the starting parameters."""
LARGEST = 1e12
"""A loss beyond it ends the learning."""
EXACT = "BlockRTRL"
TRUNCATED = "TBPTT, same bytes"
TOLERANCE = 1e-9
WARM = 200
"""Steps with fixed parameters before gradients are compared."""
COMPARED = 40
"""Steps whose gradients are compared."""
_X = torch.zeros(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class System:
    """The chains, the rate of `BlockRTRL`, and the steps of each run."""

    chains: Chains
    rate: float
    steps: int

    @property
    def label(self) -> str:
        """The system in words."""
        count = self.chains.count
        return "one parameter" if count == 1 else f"{count} parameters"


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    systems: tuple[System, ...] = (System(Chains(1, 4, 0, 7), 5e-4, 280), System(Chains(2, 1, 12, 3), 7e-4, 400))
    slower: tuple[int, ...] = (1, 3, 10, 30)  # the rivals have the rate divided by each of these, and their best counts
    every: int = 8  # steps between two updates
    seeds: int = 3  # starts, counted from the settings' seed
    longer: tuple[int, ...] = ()  # truncated BPTT also has windows this number of times as long
    draws: int = 40  # of UORO, for the scatter of its gradient


@dataclass(frozen=True)
class Learned:
    """The losses of one rule on one system: rate → for each seed, the mean loss of each stretch between updates."""

    rule: str
    curves: dict[float, list[list[float]]]

    def end(self, rate: float) -> list[float]:
        """Return, for each seed, the mean loss over the last tenth of the steps."""
        return [statistics.fmean(curve[-max(len(curve) // 10, 1) :]) for curve in self.curves[rate]]

    @property
    def best(self) -> float:
        """The rate at which the worst seed ends best."""
        return min(self.curves, key=lambda rate: max(self.end(rate)))


@dataclass(frozen=True)
class Direction:
    """A rule's gradient at the starting parameters: its cosine with the exact one, its length and its scatter over
    random draws as multiples of the exact one's length."""

    rule: str
    cosine: float
    length: float
    scatter: float


@dataclass(frozen=True)
class SystemResult:
    """What was measured on one system."""

    system: System
    at_rest: float  # the loss at rest of the starting parameters, the least of all seeds
    learned: list[Learned]
    directions: list[Direction]
    exact_bytes: int
    horizons: dict[str, int]  # rule → horizon, of truncated BPTT
    horizon_bytes: dict[str, int]

    @property
    def rivals(self) -> list[Learned]:
        """All rules but the exact one, and without truncated BPTT of more bytes."""
        return [one for one in self.learned[1:] if one.rule == TRUNCATED or one.rule not in self.horizons]

    def converges(self, learned: Learned) -> bool:
        """Return whether a rule converges from every start."""
        return max(learned.end(learned.best)) <= CONVERGED * self.at_rest


@dataclass(kw_only=True)
class Results(Measurements):
    """What was measured on all systems."""

    config: Config
    systems: list[SystemResult]


def starts(chains: Chains, seeds: Sequence[int]) -> list[BalancingCell]:
    """Return a cell for each seed, with parameters around 1/2."""
    cells = []
    for seed in seeds:
        cell = BalancingCell(chains)
        noise = torch.randn(chains.count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            cell.theta.add_(0.1 * noise)
        cells.append(cell)
    return cells


def learn_exactly(cell: BalancingCell, system: System, config: Config) -> tuple[list[float], int]:
    """Learn by `BlockRTRL`; return the mean loss of each stretch between updates, and the most bytes held."""
    learner = BlockRTRL(cell, 1)
    losses: list[float] = []
    most, stretches = 0, system.steps // config.every
    for _ in range(stretches):
        total = 0.0
        for _ in range(config.every):
            loss = (learner.step(_X) - 1).square().sum() / 2
            learner.backward(loss)
            total += float(loss.detach())
            if losses:  # in the first stretch the learner still looks for structure
                most = max(most, held(learner))
            learner.sync()
        losses.append(min(total / config.every, LARGEST))
        if losses[-1] >= LARGEST:
            break
        assert cell.theta.grad is not None
        with torch.no_grad():
            cell.theta.sub_(system.rate * cell.theta.grad)
        cell.theta.grad = None
    return losses + [LARGEST] * (stretches - len(losses)), most


def learn(rule: Rule, rates: Tensor, steps: int, every: int) -> list[list[float]]:
    """Learn by a rule, each copy at its own rate; return each copy's mean loss of each stretch between updates."""
    copies = rule.copies
    theta, h = copies.values["theta"], copies.first_state(1)
    losses: list[Tensor] = []
    for _ in range(steps // every):
        run = copies.record(_X.expand(every, len(copies), 1, 1), h)
        h, dys = run.last, run.ys - 1
        losses.append((dys.square().sum(dim=(0, 2, 3)) / 2 / every).clamp(max=LARGEST).nan_to_num(LARGEST))
        gradient = rule.gradient(run, dys)["theta"]
        going = (losses[-1] < LARGEST)[:, None]
        with torch.no_grad():
            theta.sub_(torch.where(going, rates[:, None] * gradient, 0.0))
    return torch.stack(losses, dim=1).tolist()


def rivals(horizons: dict[str, int], first_seed: int) -> dict[str, Callable[[Copies], Rule]]:
    """Return the rivals by name, each as a function of the copies."""

    def generators(copies: Copies) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(first_seed + k) for k in range(len(copies))]

    def truncated(horizon: int) -> Callable[[Copies], Rule]:
        return lambda copies: TruncatedRule(copies, horizon)

    return {
        **{name: truncated(horizon) for name, horizon in horizons.items()},
        "RFLO": lambda copies: LeakingRule(copies, LEAK),
        "SnAp-1": MaskedRule,
        "UORO": lambda copies: RankOneRule(copies, generators(copies)),
    }


def directions(chains: Chains, rules: dict[str, Callable[[Copies], Rule]], draws: int) -> list[Direction]:
    """Compare the gradients of rules at fixed parameters with the exact one."""

    def gradients(make: Callable[[Copies], Rule], count: int) -> Tensor:
        copies = Copies([BalancingCell(chains)] * count)
        rule, h = make(copies), copies.first_state(1)
        for steps in (WARM, COMPARED):
            run = copies.record(_X.expand(steps, count, 1, 1), h)
            h, dys = run.last, run.ys - 1
            found = rule.gradient(run, dys if steps == COMPARED else torch.zeros_like(dys))["theta"]
        return found.detach()

    everything = torch.ones(chains.count * chains.length, chains.count, dtype=torch.bool)
    exact = gradients(lambda copies: MaskedRule(copies, everything), 1)[0]
    made = []
    for name, make in rules.items():
        found = gradients(make, draws if name == "UORO" else 1)
        mean = found.mean(dim=0)
        cosine = torch.nn.functional.cosine_similarity(mean, exact, dim=0)
        scatter = float((found - mean).square().sum(dim=1).mean().sqrt() / exact.norm())
        made.append(Direction(name, float(cosine), float(mean.norm() / exact.norm()), scatter))
    return made


def difference(rule: Rule, learner: Learner) -> float:
    """Return how far the gradient of a rule is from that of the learner it stands for, relative to its length, after
    two runs of steps."""
    copies, h = rule.copies, rule.copies.first_state(1)
    total = torch.zeros_like(copies.values["theta"][0])
    for steps in (4, 5):
        run = copies.record(_X.expand(steps, 1, 1, 1), h)
        h = run.last
        total = total + rule.gradient(run, run.ys - 1)["theta"][0]
        for _ in range(steps):
            learner.backward((learner.step(_X) - 1).square().sum() / 2)
    learner.sync()
    grad = learner.cell.get_parameter("theta").grad
    assert grad is not None
    return float((total - grad).norm() / grad.norm())


def compare_with_learners(chains: Chains) -> list[str]:
    """Return a failure for each rule whose gradient is not that of the learner it stands for."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def cell() -> BalancingCell:
        return BalancingCell(chains)

    def copies() -> Copies:
        return Copies([BalancingCell(chains)])

    pairs: dict[str, tuple[Rule, Learner]] = {
        "TBPTT": (TruncatedRule(copies(), 3), TBPTT(cell(), 1, 3)),
        "RFLO": (LeakingRule(copies(), LEAK), RFLO(cell(), 1, LEAK)),
        "SnAp-1": (MaskedRule(copies()), SnAp(cell(), 1)),
        "UORO": (RankOneRule(copies(), [generator()]), UORO(cell(), 1, generator=generator())),
        EXACT: (TruncatedRule(copies(), 9), BlockRTRL(cell(), 1, block=4)),
    }
    apart = {name: difference(*pair) for name, pair in pairs.items()}
    return [f"the gradient of {name} is off by {far:.1e}" for name, far in apart.items() if not far <= TOLERANCE]


def measure_system(system: System, config: Config, settings: Settings) -> SystemResult:
    """Measure all rules on one system."""
    chains, seeds = system.chains, range(settings.seed, settings.seed + config.seeds)
    drive = 2.0 * (chains.up - chains.down)
    at_rest = min(float((drive * cell.theta.detach() - 1).square().sum() / 2) for cell in starts(chains, seeds))
    exact = []
    for seed, cell in zip(seeds, starts(chains, seeds), strict=True):
        settings.progress(f"{system.label}, BlockRTRL, seed {seed}")
        exact.append(learn_exactly(cell, system, config))
    budget = max(most for _, most in exact)
    cell = BalancingCell(chains)
    horizons = {TRUNCATED: horizon_within(budget, cell, _X)}
    horizons |= {f"TBPTT, {n} × the bytes": n * horizons[TRUNCATED] for n in config.longer}
    learned = [Learned(EXACT, {system.rate: [losses for losses, _ in exact]})]
    rules = rivals(horizons, settings.seed)
    rates = [system.rate / slower for slower in config.slower]
    of_copies = torch.tensor(rates, dtype=torch.float64).repeat_interleave(config.seeds)
    for name, make in rules.items():
        settings.progress(f"{system.label}, {name}")
        rule = make(Copies(starts(chains, seeds) * len(rates)))
        curves = learn(rule, of_copies, system.steps, config.every)
        by_rate = {rate: curves[i * config.seeds : (i + 1) * config.seeds] for i, rate in enumerate(rates)}
        learned.append(Learned(name, by_rate))
    settings.progress(f"{system.label}, directions")
    return SystemResult(
        system, at_rest, learned, directions(chains, rules, config.draws), budget, horizons,
        {name: bytes_of_horizon(cell, _X, horizon) for name, horizon in horizons.items()},
    )  # fmt: skip


def verdict(m: Results) -> Judgement:
    """Judge which rules converge."""
    also, lost = [], []
    for found in m.systems:
        if not found.converges(found.learned[0]):
            lost.append(found.system.label)
        names = [one.rule for one in found.rivals if found.converges(one)]
        if names:
            also.append(f"{', '.join(names)} with {found.system.label}")
    if lost or m.failures:
        return Judgement.does_not_hold(f"BlockRTRL does not converge with {', '.join(lost) or 'its own gradient'}")
    if also:
        return Judgement.holds_when(f"these are left out, which converge as well: {'; '.join(also)}")
    return Judgement.holds()


def show(m: Results) -> Shown:
    """Show where the losses end, why, and how they get there."""
    tables, plots, parts = [], [], []
    for found in m.systems:
        rows: list[list[Cell]] = []
        for one in found.learned:
            ends = one.end(one.best)
            held_bytes = found.exact_bytes if one.rule == EXACT else found.horizon_bytes.get(one.rule)
            horizon = found.horizons.get(one.rule)
            came = "converges" if found.converges(one) else "diverges" if min(ends) >= found.at_rest else "neither"
            rows.append([one.rule, one.best, statistics.median(ends), max(ends), came, horizon, held_bytes])
        columns = ["rule", "best rate", "loss at the end, median", "worst seed", "came to", "window", "bytes held"]
        tables.append(
            Table(f"Influence balancing, {found.system.label} (loss at rest {found.at_rest:.2g})", columns, rows)
        )
        columns = ["rule", "cosine with the exact gradient", "length ÷ exact", "scatter ÷ exact"]
        why: list[list[Cell]] = [[d.rule, d.cosine, d.length, d.scatter] for d in found.directions]
        tables.append(Table(f"Why: gradients at the start, {found.system.label}", columns, why))
        xs = [float(m.config.every * (i + 1)) for i in range(found.system.steps // m.config.every)]
        lines = [Series.of_runs(one.rule, xs, one.curves[one.best]) for one in found.learned]
        title = f"Influence balancing, {found.system.label}: each rule at its best rate"
        plots.append(Plot(title, "step", "loss", lines, log_y=True))
        good = [one.rule for one in found.learned if found.converges(one)]
        bad = [one.rule for one in found.learned if not found.converges(one)]
        parts.append(f"{found.system.label}: {', '.join(good) or 'none'} converge; {', '.join(bad) or 'none'} do not")
    return Shown("; ".join(parts), tables, plots, headline(m), model(m))


def headline(m: Results) -> str:
    """Return the result in one sentence."""
    worst = m.systems[-1]
    ends = {one.rule: statistics.median(one.end(one.best)) for one in [worst.learned[0], *worst.rivals]}
    exact = ends.pop(EXACT)
    others = ", ".join(f"{name} {number(end)}" for name, end in ends.items())
    return (
        f"Where a parameter helps at first and harms later ({worst.system.label}), the loss ends at {number(exact)} by "
        f"BlockRTRL; by {others}."
    )


def model(m: Results) -> str:
    """Return what was measured on."""
    sizes = [
        f"{found.system.label}: H = {c.count * c.length}, T = {found.system.steps}"
        for found in m.systems
        for c in [found.system.chains]
    ]
    return f"linear chains; {'; '.join(sizes)}; {m.config.seeds} starts"


@claim(
    "influence-balancing",
    claimed="exact RTRL converges where truncation of the same bytes, RFLO, SnAp-1 and UORO do not",
    threshold=f"loss at the end ≤ {CONVERGED:g} × that at rest, from every start; more for every rival",
    quick=Config(),
    full=Config(
        (System(Chains(1, 10, 0, 13), 1.5e-4, 1200), System(Chains(4, 1, 20, 3), 6e-4, 960)),
        (1, 3, 10, 30, 100),
        seeds=5,
        longer=(2, 4),
        draws=50,
    ),
    small=Config((System(Chains(2, 1, 8, 3), 1e-3, 240),), (1, 10), seeds=1, draws=4),
    question="rivals",
    noticed_breaks=("truncate", "off-by-one"),
    verdict=verdict,
    show=show,
)
def measure(config: Config, settings: Settings) -> Results:
    """Measure all systems."""
    failures = [line for system in config.systems for line in compare_with_learners(system.chains)]
    systems = [measure_system(system, config, settings) for system in config.systems]
    return Results(config=config, systems=systems, failures=failures)
