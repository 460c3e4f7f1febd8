"""Claim: exact RTRL trains a sparse mixture over gaps that are too long for truncated BPTT of the same bytes.

**How it is measured.** The stream consists of episodes: one of four signals, noise for longer than the horizon that
the bytes buy, then a question for the signal. A `RecurrentMoE` with independent slots, which writes one slot per
step and uses one expert in it, is trained on 10⁵ steps of 8 samples, with a loss that balances the experts, by
`BlockRTRL`; and from the same weights, on the same stream, with the same Adam, clipping and times of updates, by
sliding truncated BPTT. Its horizon is the longest whose bytes held between steps do not exceed those of `BlockRTRL`,
influence and tree included. Beside them stands the dense cell of equal cost: a GRU trained by `BlockRTRL` with at
most as many multiply-adds per step. Accuracies are those of the answers in the stream, before each update: every
episode is new. An expert is *dormant* in a block in which a sample does not use it, and *dead* if no sample uses it
in the last tenth of the stream. SnAp-1 takes the full matrices in this implementation, and would take hours here:
what is measured is the cosine between its gradient of one episode and the exact one, before training and after, and
its seconds per step. At last the gradient of one episode is held against BPTT in float64, with blocks and a window
far shorter than the episode.

**Why that is fair.** All gates begin so that they keep what they hold for up to an episode, those of the GRU too.
Truncated BPTT also needs the graph of its whole horizon while it goes backward, which is not counted.

**What it leaves open.** The mixture is small: a larger one has more bytes of influence, which buy a longer horizon,
so that its gaps must be longer too. One task, one optimizer and one rate were tried. Times depend on the machine; all
sides ran in one process after one another.
"""

import copy
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.learners import TBPTT, Learner, SnAp
from rtrl.report.model import Table
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.measuring import percent, times
from rtrl.verification.show import plot
from rtrl.verification.thesis.sides import (
    Mixture,
    Routing,
    Trained,
    Training,
    gru,
    gru_of_equal_cost,
    horizon_within,
    macs_per_step,
    train,
    train_watched,
)
from rtrl.verification.thesis.signal import Signal

SOLVED, STEPS = 0.95, 100_000


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    mixture: Mixture = field(default_factory=Mixture)
    training: Training = field(default_factory=Training)
    seeds: int = 1
    costs: bool = True  # whether multiply-adds and SnAp-1 are measured, and the GRU is chosen by them
    hidden: int = 16  # of the GRU otherwise
    check_steps: int = 40  # of the episode that is held against BPTT


@dataclass(kw_only=True)
class Sides(Measurements):
    """All sides.

    Attributes:
        config: how much was measured.
        rtrl, tbptt, dense: one training each per seed.
        routing: of the mixture that ``BlockRTRL`` trained.
        horizon: of truncated BPTT.
        macs: multiply-adds per step, by side.
        snap_cosines: of SnAp-1's gradient and the exact one, before and after training; none if not measured.
        snap_seconds: per step.
        error: of the gradient of an episode, relative to BPTT's.
    """

    config: Config
    rtrl: list[Trained] = field(default_factory=list)
    tbptt: list[Trained] = field(default_factory=list)
    dense: list[Trained] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    horizon: int = 0
    macs: dict[str, float] = field(default_factory=dict)
    snap_cosines: list[float] = field(default_factory=list)
    snap_seconds: float = 0.0
    error: float = 0.0


def _verdict_of_sides(m: Sides) -> Judgement:
    """Judge what was learned, at any size."""
    signal = m.config.training.signal
    chance = 1 / signal.values
    solved, short = ([side.final for side in sides] for sides in (m.rtrl, m.tbptt))
    if m.horizon >= signal.gap:
        return Judgement("not measured", f"the horizon of {m.horizon} steps reaches over the gap of {signal.gap}")
    if min(solved) < SOLVED:
        return Judgement.does_not_hold(
            f"BlockRTRL answers {percent(min(solved))} after {m.config.training.steps:,} steps (chance: "
            f"{percent(chance)})"
        )
    if max(short) > chance + 0.1 * (1 - chance):
        return Judgement.does_not_hold(
            f"truncated BPTT of the same bytes answers {percent(max(short))}, with a horizon of {m.horizon} steps"
        )
    dense = min(side.final for side in m.dense)
    return Judgement.holds_when(
        f"the gap ({signal.gap}) is longer than the horizon that the bytes buy ({m.horizon}). The dense cell of equal "
        f"cost answers {percent(dense)}, in {_clock(m)} of the mixture's time"
    )


def _clock(m: Sides) -> str:
    return times(sum(side.seconds for side in m.dense) / sum(side.seconds for side in m.rtrl))


def verdict(m: Sides) -> Judgement:
    """Judge the claim, which is about streams of 10⁵ steps."""
    steps = m.config.training.steps
    if steps >= STEPS:
        return _verdict_of_sides(m)
    return Judgement.not_at_claimed_size(f"after {steps:,} steps BlockRTRL answers {percent(m.rtrl[0].final)}")


def show(m: Sides) -> Shown:
    """Show what each side learned, what it took, and how the mixture used its experts."""
    sides = {"BlockRTRL, mixture": m.rtrl, "truncated BPTT, mixture": m.tbptt, "BlockRTRL, GRU": m.dense}
    keys = {"BlockRTRL, mixture": "mixture", "truncated BPTT, mixture": "truncated", "BlockRTRL, GRU": "GRU"}
    signal, mixture = m.config.training.signal, m.config.mixture
    rows = [
        [
            name,
            k,
            side.parameters,
            side.final,
            _solved_at(side),
            side.n_bytes,
            _rounded(m.macs.get(keys[name])),
            side.seconds,
        ]
        for name, trained in sides.items()
        for k, side in enumerate(trained)
    ]
    curves = {f"{name}, seed {k}": side.accuracy for name, trained in sides.items() for k, side in enumerate(trained)}
    losses = {f"{name}, seed {k}": side.loss for name, trained in sides.items() for k, side in enumerate(trained)}
    routing = [
        [k, mixture.n_experts, each.dead, each.dormant, each.longest, each.combines] for k, each in enumerate(m.routing)
    ]
    snap = [[*m.snap_cosines, m.snap_seconds]] if m.snap_cosines else []
    finals = [f"{name} {percent(min(side.final for side in trained))}" for name, trained in sides.items()]
    columns = [
        "side",
        "seed",
        "P",
        "accuracy, last tenth",
        f"step of {percent(SOLVED)}",
        "bytes",
        "multiply-adds per step",
    ]
    return Shown(
        f"gap {signal.gap}, horizon {m.horizon}: {', '.join(finals)}; {percent(m.routing[0].dormant)} dormant, "
        f"{m.routing[0].dead} experts dead",
        [
            Table("A sparse mixture on a long stream", [*columns, "CPU seconds"], rows),
            Table(
                "Experts and tree",
                ["seed", "experts", "dead", "dormant", "longest dormancy, steps", "combines per step"],
                routing,
            ),
            Table("SnAp-1 beside the exact gradient", ["cosine before", "cosine after", "CPU seconds per step"], snap),
        ],
        [
            plot("Answers", "steps of the stream", "accuracy", curves),
            plot("Loss", "steps of the stream", "nats", losses),
        ],
        headline=_headline(m),
        model=(
            f"RecurrentMoE, independent slots: {mixture.n_slots} slots of {mixture.d_model} (H = {mixture.state}), "
            f"{mixture.n_experts} experts, P = {m.rtrl[0].parameters}; T = {m.config.training.steps:,}, B = "
            f"{m.config.training.batch_size}; {len(m.rtrl)} seed{'s' * (len(m.rtrl) > 1)}"
        ),
    )


def _headline(m: Sides) -> str:
    """The result at the claimed size in one sentence."""
    if m.config.training.steps < STEPS:
        return ""
    sides = [percent(trained[0].final) for trained in (m.rtrl, m.tbptt, m.dense)]
    return (
        f"A sparse mixture trained exactly in {m.rtrl[0].n_bytes:,} bytes answers {sides[0]} over a gap of "
        f"{m.config.training.signal.gap} steps, truncated BPTT of the same bytes {sides[1]}, a dense GRU of equal cost "
        f"{sides[2]}."
    )


def _rounded(number: float | None) -> int | None:
    return None if number is None else round(number)


def _solved_at(side: Trained) -> int | None:
    """The step from which on all answers of a curve are right often enough."""
    solved = None
    for step, accuracy in side.accuracy.items():
        solved = (solved or step) if accuracy >= SOLVED else None
    return solved


def error_of_an_episode(config: Config) -> float:
    """Return the largest error of a gradient of ``BlockRTRL`` beside BPTT's, in float64, with short blocks."""
    signal = replace(config.training.signal, gap=config.check_steps, questions=2)
    cell = config.mixture.cell(signal, 0, torch.float64)
    stream = signal.stream(2, 1, torch.float64)
    steps = [step for _, step in zip(range(signal.steps), stream, strict=False)]

    def loss(t: int, y: rtrl.cells.MoEOutput) -> Tensor | None:
        target = steps[t].target
        return None if target is None else nn.functional.cross_entropy(y.output, target)

    right = oracles.bptt(cell, torch.stack([step.x for step in steps]), loss)
    learner = rtrl.BlockRTRL(cell, 2, block=4, window=2)
    found = _gradient(cell, learner, [step.x for step in steps], [step.target for step in steps])
    errors = [
        float((found[name] - value).abs().max() / value.abs().max()) for name, value in right.items() if value.any()
    ]
    return max(errors)


def _gradient(cell: nn.Module, learner: Learner, xs: list[Tensor], targets: list[Tensor | None]) -> dict[str, Tensor]:
    """The gradient of the answers of one episode."""
    cell.zero_grad()
    for x, target in zip(xs, targets, strict=True):
        y = learner.step(x)
        if target is not None:
            learner.backward(nn.functional.cross_entropy(y.output, target))
    learner.sync()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in cell.named_parameters()}
    cell.zero_grad()
    return found


def snap_cosine(cell: nn.Module, config: Config) -> float:
    """Return the cosine of SnAp-1's gradient and the exact one, of one episode."""
    signal = config.training.signal
    steps = [step for _, step in zip(range(signal.steps), signal.stream(1, 2), strict=False)]
    xs, targets = [step.x for step in steps], [step.target for step in steps]
    snap, exact = (
        torch.cat([value.flatten() for value in _gradient(cell, learner, xs, targets).values()])
        for learner in (SnAp(cell, 1), rtrl.BlockRTRL(cell, 1, block=config.training.every))
    )
    return float(torch.cosine_similarity(snap, exact, dim=0))


@claim(
    "thesis",
    claimed=(
        "a sparse recurrent mixture, trained by exact RTRL on a long stream, learns dependencies beyond the horizon "
        "that the same bytes buy for truncated BPTT"
    ),
    threshold=(
        f"{STEPS:,} steps: BlockRTRL ≥ {percent(SOLVED)}, TBPTT of equal bytes near chance; gradients as BPTT's, 1e-10"
    ),
    quick=Config(training=Training(steps=1000, batch_size=4), costs=False),
    full=Config(),
    small=Config(
        Mixture(d_model=2, n_slots=4, n_experts=8, expert_hidden=2),
        Training(Signal(gap=12), batch_size=2, steps=48, every=8),
        costs=False,
        check_steps=24,
    ),
    verdict=verdict,
    show=show,
    question="rivals",
    void="the gradients of the mixture are not exact",
    noticed_breaks=("truncate", "no-catch-up", "forget-dormant-losses"),
)
def measure(config: Config, settings: Settings) -> Sides:
    """Train all sides, and check the gradients."""
    m, training = Sides(config=config), config.training
    signal, hidden = training.signal, config.hidden

    def exact(cell: nn.Module, batch_size: int) -> Learner:
        return rtrl.BlockRTRL(cell, batch_size, block=training.every, window=training.window)

    def exact_dense(cell: nn.Module, batch_size: int) -> Learner:
        return rtrl.BlockRTRL(cell, batch_size, block=training.every)

    def truncated(cell: nn.Module, batch_size: int) -> Learner:
        return TBPTT(cell, batch_size, m.horizon)

    settings.progress("the gradient of an episode")
    m.error = error_of_an_episode(config)
    if not m.error <= 1e-10:
        m.failures.append(f"a gradient differs by {m.error:.1e} from BPTT's, relative to its largest entry")
    for seed in range(settings.seed, settings.seed + config.seeds):
        start = config.mixture.cell(signal, seed)
        if config.costs and seed == settings.seed:
            settings.progress("SnAp-1, before training")
            m.snap_cosines.append(snap_cosine(start, config))
        cell = copy.deepcopy(start)
        trained, routing = train_watched("BlockRTRL", config.mixture, cell, exact, training, seed, settings.progress)
        m.rtrl.append(trained)
        m.routing.append(routing)
        if config.costs and seed == settings.seed:
            settings.progress("SnAp-1, after training")
            began = time.process_time()
            m.snap_cosines.append(snap_cosine(cell, config))
            m.snap_seconds = (time.process_time() - began) / signal.steps
        if not m.horizon:
            settings.progress("the horizon that the bytes buy")
            m.horizon = horizon_within(trained.n_bytes, start, training)
        if config.costs and not m.macs:
            settings.progress("multiply-adds")
            blocks = -(-signal.steps // training.every) + training.window
            m.macs["mixture"] = macs_per_step(copy.deepcopy(start), exact, training, blocks)
            m.macs["truncated"] = macs_per_step(copy.deepcopy(start), truncated, training, blocks)
            hidden = gru_of_equal_cost(m.macs["mixture"], training)
            m.macs["GRU"] = macs_per_step(gru(hidden, signal, seed), exact_dense, training, blocks)
        m.tbptt.append(train("truncated BPTT", copy.deepcopy(start), truncated, training, seed, settings.progress))
        m.dense.append(train("GRU", gru(hidden, signal, seed), exact_dense, training, seed, settings.progress))
        if m.tbptt[-1].n_bytes > trained.n_bytes:
            m.failures.append(f"truncated BPTT held {m.tbptt[-1].n_bytes} bytes, more than {trained.n_bytes}")
    return m
