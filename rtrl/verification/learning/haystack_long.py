"""Claim: `BlockRTRL` learns to carry a symbol over a gap at which truncated BPTT of the same bytes stays at chance.

**How it is measured.** The task is the haystack: BOS, noise, KEY, k, SEP, noise, Q, one symbol a step, and k is asked
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
longer than it can see. Truncated BPTT is given half as many rounds again as `BlockRTRL` needed. "Solved" is judged on
held-out episodes of the last gap, from another stream.

**What it leaves open.** The advantage is that of a small state: the influence of a GRU takes about 3 H² times the bytes
of one step, so with H = 64 the same bytes would be a horizon of more than 10 000 steps, and there truncated BPTT would
win at any gap up to that. The quick run has a gap of 72 symbols, the full one of 256. One cell and one optimizer are
tried. A cap of rounds ends a run that does not learn; a gap that `BlockRTRL` did not learn within it is reported as not
learned.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

import rtrl
from rtrl.learners import TBPTT
from rtrl.tasks.haystack import Haystack
from rtrl.tasks.protocol import Task
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.gradients.broken_learners import learner_type
from rtrl.verification.harness.threads import one_thread
from rtrl.verification.harness.training_runs import Course, Lesson, MakeLearner, Tell, exam, percent, plain, teach


@dataclass(frozen=True)
class Sizes:
    """What is measured: k of so many symbols, the gaps of the stages, H, the block, and the lesson's numbers.

    Attributes:
        hidden: H of the GRU. keep: the bias of its update gate at the start.
        rounds: at most so many in the first stage; a later stage has at most a third.
        seeds: one pair of runs each, counted from the settings' seed. broken: a break put on trial.
    """

    values: int = 2
    gaps: tuple[int, ...] = (72,)
    hidden: int = 4
    block: int = 8
    keep: float = 3.0
    batch_size: int = 64
    rate: float = 0.03
    rounds: int = 700
    seeds: int = 1
    exam_steps: int = 1500
    broken: str | None = None


QUICK = Sizes()
FULL = Sizes(gaps=(72, 128, 256), seeds=3, exam_steps=4000)


@dataclass(frozen=True)
class Pair:
    """One seed: held-out accuracies at the last gap, bytes held and rounds taken, of both learners; the horizon."""

    seed: int
    rtrl: float
    tbptt: float
    rtrl_bytes: int
    tbptt_bytes: int
    horizon: int
    rtrl_rounds: int
    tbptt_rounds: int


def make_cell(sizes: Sizes, seed: int) -> nn.Module:
    """A GRU that begins by keeping its state."""
    torch.manual_seed(seed)
    gru, head = nn.GRUCell(sizes.values + 4, sizes.hidden), nn.Linear(sizes.hidden, sizes.values)
    with torch.no_grad():
        gru.bias_ih[sizes.hidden : 2 * sizes.hidden] = sizes.keep
        gru.bias_hh[sizes.hidden : 2 * sizes.hidden] = 0.0
    return rtrl.cells.from_torch(gru, head)


def horizon_within(budget: int, sizes: Sizes) -> int:
    """The longest horizon with which truncated BPTT holds at most ``budget`` bytes between steps."""

    def held(horizon: int) -> int:
        learner = TBPTT(make_cell(sizes, 0), sizes.batch_size, horizon)
        most = 0
        for _ in range(horizon + 3):
            learner.step(torch.zeros(sizes.batch_size, sizes.values + 4))
            most = max(most, sum(learner.retained_bytes().values()))
        return most

    a_step = held(3) - held(2)
    horizon = max(1, (budget - held(2)) // a_step + 2)
    while horizon > 1 and held(horizon) > budget:
        horizon -= 1
    return int(horizon)


def train_both(sizes: Sizes, seed: int, progress: Progress, done: int, pieces: int) -> tuple[Pair, list[list[Course]]]:
    """One pair of runs from the same weights."""
    start = make_cell(sizes, seed)
    tasks = [Haystack(sizes.values, gap=gap) for gap in sizes.gaps]
    learner = learner_type(sizes.broken)
    ours = copy.deepcopy(start)
    courses = _stages(
        ours, tasks, sizes, seed, lambda cell, b: learner(cell, b, block=sizes.block),
        lambda n: progress(f"seed {seed}, BlockRTRL, round {n}", done, pieces),
    )  # fmt: skip
    budget = max(course.most_bytes for course in courses)
    horizon = horizon_within(budget, sizes)
    theirs = copy.deepcopy(start)
    limits = [max(course.rounds[-1] * 3 // 2, 1) for course in courses]
    others = _stages(
        theirs, tasks, sizes, seed, lambda cell, b: TBPTT(cell, b, horizon),
        lambda n: progress(f"seed {seed}, truncated BPTT, round {n}", done + 1, pieces), limits,
    )  # fmt: skip
    pair = Pair(
        seed,
        exam(ours, tasks[-1], steps=sizes.exam_steps),
        exam(theirs, tasks[-1], steps=sizes.exam_steps),
        budget,
        max(course.most_bytes for course in others),
        horizon,
        sum(course.rounds[-1] for course in courses),
        sum(course.rounds[-1] for course in others),
    )
    return pair, [courses, others]


def _stages(
    cell: nn.Module, tasks: Sequence[Task], sizes: Sizes, seed: int, make: MakeLearner, tell: Tell,
    limits: Sequence[int] = (),
) -> list[Course]:  # fmt: skip
    """One lesson a task, one after the other."""
    limits = limits or [sizes.rounds if k == 0 else max(sizes.rounds // 3, 1) for k in range(len(tasks))]
    return [
        teach(cell, Lesson(task, sizes.batch_size, sizes.rate, limit, seed=seed, until=0.995), make, tell)
        for task, limit in zip(tasks, limits, strict=True)
    ]


def judge(sizes: Sizes, pairs: Sequence[Pair]) -> Finding:
    """The verdict of so many pairs of runs."""
    task = Haystack(sizes.values, gap=sizes.gaps[-1])
    chance, gap, first = task.chance, sizes.gaps[-1], sizes.gaps[0]
    near_chance = chance + 0.1 * (1 - chance)
    solved = [p.rtrl >= task.solved for p in pairs]
    stuck = [p.tbptt <= near_chance for p in pairs]
    over = [p for p in pairs if p.tbptt_bytes > p.rtrl_bytes]
    figure = (
        f"gap {gap}: BlockRTRL {_range([p.rtrl for p in pairs])}, TBPTT with the same bytes (horizon "
        f"{pairs[0].horizon}) {_range([p.tbptt for p in pairs])}"
    )
    threshold = f"BlockRTRL ≥ {percent(task.solved)}, TBPTT ≤ {percent(near_chance)} (chance {percent(chance)})"
    failures = [f"seed {p.seed}: truncated BPTT held {p.tbptt_bytes} bytes, more than {p.rtrl_bytes}" for p in over]
    good = [a and b for a, b in zip(solved, stuck, strict=True)]
    crossover = (
        f"the gap is longer than what the influence's bytes buy as a horizon: here {pairs[0].horizon} steps for "
        f"{pairs[0].rtrl_bytes} bytes"
    )
    verdict: Verdict
    if any(p.horizon >= first for p in pairs):
        verdict, condition = "not measured", f"the horizon of {pairs[0].horizon} steps reaches over the gap of {first}"
    elif all(good):
        verdict, condition = "holds when", crossover
    elif any(good):
        lucky = sum(good)
        verdict, condition = "holds when", f"{crossover}; and the seed is lucky: {lucky} of {len(good)} were"
    elif not any(solved):
        verdict, condition = "does not hold", "BlockRTRL does not solve this gap either, within the rounds it was given"
    else:
        verdict, condition = "does not hold", "truncated BPTT learns something in spite of its short horizon"
    return Finding(figure, threshold, verdict, condition, failures)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return percent(low) if low == high else f"{percent(low)} … {percent(high)}"


def measure_sizes(sizes: Sizes, settings: Settings, progress: Progress) -> Finding:
    """Train every pair and judge."""
    pairs, curves = [], []
    with one_thread():
        for n in range(sizes.seeds):
            pair, courses = train_both(sizes, settings.seed + n, progress, 2 * n, 2 * sizes.seeds)
            pairs.append(pair)
            for name, several in zip(("BlockRTRL", "TBPTT"), courses, strict=True):
                rounds, scores, before = [], [], 0
                for course in several:
                    rounds += [float(before + r) for r in course.rounds]
                    scores += course.scores
                    before += course.rounds[-1]
                curves.append(Series(f"{name}, seed {pair.seed}", rounds, scores))
    finding = judge(sizes, pairs)
    finding.tables.append(
        Table(
            f"Held-out accuracy at a gap of {sizes.gaps[-1]}, at equal memory",
            ["seed", "BlockRTRL", "TBPTT", "BlockRTRL, bytes", "TBPTT, bytes", "horizon", "rounds", "rounds, TBPTT"],
            [list(asdict(pair).values()) for pair in pairs],
        )
    )
    finding.plots.append(Plot("The long haystack", "episodes of the batch", "training accuracy", curves))
    finding.data = {"sizes": plain(asdict(sizes)), "pairs": [asdict(pair) for pair in pairs]}
    return finding


def measure(settings: Settings, progress: Progress) -> Finding:
    """One seed and a gap of 72 in the quick run; three seeds and gaps up to 256 in the full one."""
    return measure_sizes(FULL if settings.full else QUICK, settings, progress)


CLAIM = Claim(
    "haystack-long",
    "BlockRTRL solves a haystack whose gap truncated BPTT of equal memory cannot see over",
    measure,
)
