"""Claim: `BlockRTRL` learns to carry a symbol over a gap at which truncated BPTT of the same bytes stays at chance.

**How it is measured.** The task is the haystack: BOS, noise, KEY, k, SEP, noise, Q, one symbol per step, and k is asked
at Q. The noise is made of the same symbols as k, so nothing but the key says which of them counts, and between SEP and
Q stand at least `gap` of them. One small GRU, float32, is trained twice from the same weights, on the same episodes,
with the same Adam and the same clipping; the parameters change at the ends of episodes alone, so that every gradient
belongs to one set of parameters. One copy learns by `BlockRTRL`, the other by sliding truncated BPTT. Its horizon
is the longest whose bytes held between steps do not exceed those of `BlockRTRL`; both are read off
`retained_bytes()` in the run, the influence included. Truncated BPTT also needs the graph of its whole horizon while
it goes backward, and `BlockRTRL` that of one block; neither is counted, which favours truncated BPTT.

**Why that is fair.** Truncation alone differs. Both start with the update gate biased towards keeping the state, which
is what makes so long a memory learnable at all. The full run lengthens the gap in stages, the same for both, and the
first stage is already longer than the horizon: below it truncated BPTT would learn to keep k and might then keep it for
longer than it can see. Truncated BPTT is allowed half as many episodes again as `BlockRTRL` needed. "Solved" is judged
on held-out episodes of the last gap, from another stream.

**What it leaves open.** The advantage is that of a small state: the influence of a GRU takes about 3 H² times the bytes
of one step, so with H = 64 the same bytes would be a horizon of more than 10 000 steps, and there truncated BPTT would
win at any gap up to that. The quick run has a gap of 72 symbols, the full one of 256. One cell and one optimizer are
tried. A cap of episodes ends a run that does not learn; a gap that `BlockRTRL` did not learn within it is reported as
not learned.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

import rtrl
from rtrl.learners import TBPTT
from rtrl.report.model import Table
from rtrl.tasks.haystack import Haystack
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.gradients.broken_learners import learner_type
from rtrl.verification.harness.measuring import percent
from rtrl.verification.harness.training_runs import History, MakeLearner, TrainingConfig, evaluate_held_out, train
from rtrl.verification.show import plot


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    values: int = 2  # k is one of this number of symbols
    gaps: tuple[int, ...] = (72,)  # the gaps of the stages
    hidden: int = 4  # H of the GRU
    block: int = 8  # of ``BlockRTRL``
    keep: float = 3.0  # the bias of the update gate at the start
    batch_size: int = 64  # B
    rate: float = 0.03  # the learning rate of Adam
    episodes: int = 700  # the most episodes in the first stage; a later stage has at most a third
    seeds: int = 1  # one pair of runs each, counted from the settings' seed
    evaluation_steps: int = 1500  # steps of the evaluation
    broken: str | None = None  # the name of a broken learner to take in place of the real one

    @property
    def tasks(self) -> list[Haystack]:
        """The haystacks of the stages."""
        return [Haystack(self.values, gap=gap) for gap in self.gaps]


@dataclass(frozen=True)
class Pair:
    """One seed: held-out accuracies at the last gap, bytes held and episodes taken, of both learners; the horizon."""

    seed: int
    rtrl: float
    tbptt: float
    rtrl_bytes: int
    tbptt_bytes: int
    horizon: int
    rtrl_episodes: int
    tbptt_episodes: int


@dataclass(kw_only=True)
class Pairs(Measurements):
    """All pairs of runs, and their training curves."""

    config: Config
    pairs: list[Pair]
    curves: dict[str, dict[int, float]]

    def __post_init__(self) -> None:
        self.failures += [
            f"seed {p.seed}: truncated BPTT held {p.tbptt_bytes} bytes, more than {p.rtrl_bytes}"
            for p in self.pairs
            if p.tbptt_bytes > p.rtrl_bytes
        ]


def make_cell(config: Config, seed: int) -> nn.Module:
    """Return a GRU that begins by keeping its state."""
    torch.manual_seed(seed)
    gru, head = nn.GRUCell(config.values + 4, config.hidden), nn.Linear(config.hidden, config.values)
    with torch.no_grad():
        gru.bias_ih[config.hidden : 2 * config.hidden] = config.keep
        gru.bias_hh[config.hidden : 2 * config.hidden] = 0.0
    return rtrl.cells.from_torch(gru, head)


def horizon_within(budget: int, config: Config) -> int:
    """Return the longest horizon with which truncated BPTT holds at most ``budget`` bytes between steps."""

    def held(horizon: int) -> int:
        learner = TBPTT(make_cell(config, 0), config.batch_size, horizon)
        most = 0
        for _ in range(horizon + 3):
            learner.step(torch.zeros(config.batch_size, config.values + 4))
            most = max(most, sum(learner.retained_bytes().values()))
        return most

    per_step = held(3) - held(2)
    horizon = max(1, (budget - held(2)) // per_step + 2)
    while horizon > 1 and held(horizon) > budget:
        horizon -= 1
    return int(horizon)


def train_both(config: Config, seed: int, settings: Settings) -> tuple[Pair, dict[str, dict[int, float]]]:
    """Train one pair of runs from the same weights; return it with its training curves."""
    start, learner = make_cell(config, seed), learner_type(config.broken)

    def stages(name: str, make: MakeLearner, limits: Sequence[int]) -> tuple[float, list[History]]:
        """Train through all stages; return the held-out accuracy after the last one, and the training."""
        cell, histories = copy.deepcopy(start), []
        for task, limit in zip(config.tasks, limits, strict=True):
            training = TrainingConfig(task, config.batch_size, config.rate, limit, seed=seed, until=0.995)
            histories.append(
                train(cell, training, make, lambda n: settings.progress(f"seed {seed}, {name}, episode {n}"))
            )
        return evaluate_held_out(cell, config.tasks[-1], steps=config.evaluation_steps), histories

    limits = [config.episodes] + [max(config.episodes // 3, 1)] * (len(config.gaps) - 1)
    rtrl, online = stages("BlockRTRL", lambda cell, b: learner(cell, b, block=config.block), limits)
    budget = max(history.most_bytes for history in online)
    horizon = horizon_within(budget, config)
    limits = [max(history.episodes * 3 // 2, 1) for history in online]
    tbptt, truncated = stages("truncated BPTT", lambda cell, b: TBPTT(cell, b, horizon), limits)
    most = max(history.most_bytes for history in truncated)
    episodes = (sum(history.episodes for history in histories) for histories in (online, truncated))
    curves = {f"BlockRTRL, seed {seed}": _curve(online), f"TBPTT, seed {seed}": _curve(truncated)}
    return Pair(seed, rtrl, tbptt, budget, most, horizon, *episodes), curves


def _curve(stages: list[History]) -> dict[int, float]:
    """Return the training scores of all stages, one after the other."""
    scores, before = {}, 0
    for history in stages:
        scores.update({before + n: score for n, score in history.scores.items()})
        before += history.episodes
    return scores


def _near_chance(task: Haystack) -> float:
    return task.chance + 0.1 * (1 - task.chance)


def verdict(m: Pairs) -> Judgement:
    """Judge all pairs of runs."""
    task, pairs = m.config.tasks[-1], m.pairs
    solved = [p.rtrl >= task.solved for p in pairs]
    good = [a and p.tbptt <= _near_chance(task) for a, p in zip(solved, pairs, strict=True)]
    crossover = (
        f"the gap is longer than what the influence's bytes buy as a horizon: here {pairs[0].horizon} steps for "
        f"{pairs[0].rtrl_bytes} bytes"
    )
    if any(p.horizon >= m.config.gaps[0] for p in pairs):
        reason = f"the horizon of {pairs[0].horizon} steps reaches over the gap of {m.config.gaps[0]}"
        return Judgement("not measured", reason)
    if all(good):
        return Judgement.holds_when(crossover)
    if any(good):
        return Judgement.holds_when(f"{crossover}; and the seed is lucky: {sum(good)} of {len(good)} were")
    if not any(solved):
        return Judgement.does_not_hold("BlockRTRL does not solve this gap either, within the episodes it was allowed")
    return Judgement.does_not_hold("truncated BPTT learns something in spite of its short horizon")


def show(m: Pairs) -> Shown:
    """Show accuracies at equal memory, and training curves."""
    gap, horizon = m.config.gaps[-1], m.pairs[0].horizon
    columns = ["seed", "BlockRTRL", "TBPTT", "BlockRTRL, bytes", "TBPTT, bytes", "horizon", "episodes"]
    rows = [list(asdict(pair).values()) for pair in m.pairs]
    title = f"Held-out accuracy at a gap of {gap}, at equal memory"
    return Shown(
        f"gap {gap}: BlockRTRL {_range([p.rtrl for p in m.pairs])}, TBPTT with the same bytes (horizon "
        f"{horizon}) {_range([p.tbptt for p in m.pairs])}",
        [Table(title, [*columns, "episodes, TBPTT"], rows)],
        [plot("The long haystack", "episodes of the batch", "training accuracy", m.curves)],
    )


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return percent(low) if low == high else f"{percent(low)} … {percent(high)}"


_TASK = Config().tasks[-1]


@claim(
    "haystack-long",
    claimed="BlockRTRL solves a haystack whose gap truncated BPTT of equal memory cannot see over",
    threshold=(
        f"BlockRTRL ≥ {percent(_TASK.solved)}, TBPTT ≤ {percent(_near_chance(_TASK))} (chance {percent(_TASK.chance)})"
    ),
    quick=Config(),
    full=Config(gaps=(72, 128, 256), seeds=3, evaluation_steps=4000),
    verdict=verdict,
    show=show,
)
def measure(config: Config, settings: Settings) -> Pairs:
    """Train every pair."""
    runs = [train_both(config, settings.seed + n, settings) for n in range(config.seeds)]
    curves = {name: curve for _, curves in runs for name, curve in curves.items()}
    return Pairs(config=config, pairs=[pair for pair, _ in runs], curves=curves)
