"""Claim: a sparse mixture of experts reaches 100 % on aⁿbⁿ, by BPTT and by `BlockRTRL` alike.

**How it is measured.** A cell reads aⁿbᵐ, one symbol per step, and says at the last symbol whether m = n; half of the
strings are accepted, the others differ by 1 to `slack`. *Update for update:* two copies of `RecurrentMoE` (2 heads, 4
slots, 4 experts, top-2), in float64, learn strings of 16 symbols and more, one by BPTT, one by `BlockRTRL` with blocks
of 4 steps and a tree of 2 blocks; after each update the largest relative difference of their weights is taken. *To the
end:* cells are trained from the same weights on the same strings by both learners, until the accuracy in training over
25 updates is 99.5 %, and evaluated on strings of the n that were trained, of an n left out between them, and of larger
n. Three cells: `RecurrentMoE`; a mixture whose experts are the gates of an LSTM, so that a slot can add up
(`CountingMixture`), sparse (2 of 4 slots, 2 of 4 experts per step) and dense (all of both); and PyTorch's LSTM.

**Why that is fair.** The strings of the first part are several blocks long, and experts are dormant for several blocks,
so that a learner that truncates, forgets the losses of dormant experts, or composes blocks in the wrong order fails.
The n that are left out have no part in training or in when it ends. The strings of the trained n are few and the cell
has seen them all, so that 100 % there may be memory; the left-out n say whether it has learned to count.

**Where both learners part.** Their gradients differ by rounding alone. Training makes the difference grow, a little
with every update, until a score is so near a tie that one choice of a slot or an expert differs; from then on both
train different functions. The full run follows the distance and the choices through a whole training (`d_model` 8):
were the distance to grow a hundred-fold in one update while all choices agree, the check would fail.

**What it leaves open.** `BlockRTRL` at `d_model` 32 has 4.2 million numbers of influence per sample, so that there it
takes some updates beside BPTT, which is then trained to the end alone. Some seeds learn slowly or not at all within the
updates allowed; all are reported.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

import rtrl
from rtrl.learners import BPTT
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import Cell, Plot, Table
from rtrl.tasks.anbn import AnBn
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.measuring import percent
from rtrl.verification.harness.training_runs import MakeLearner, TrainingConfig, evaluate_held_out, train
from rtrl.verification.learning.anbn_lr import CLAIMED_WIDTH
from rtrl.verification.learning.anbn_lr import make_cell as make_mixture
from rtrl.verification.learning.counting_mixture import CountingMixture
from rtrl.verification.learning.parting import Parting, part, parting_plot
from rtrl.verification.show import plot

TOLERANCE = 1e-6
"""The largest distance of the weights in the updates that are taken side by side."""
STEEP = 100.0
"""A factor by which the distance may not grow in one update while all choices agree."""
SAME = 0.01
"""How far `BlockRTRL` may fall behind BPTT: one point of accuracy."""
SPARSE, DENSE, LSTM = "counting mixture, sparse", "counting mixture, dense", "LSTM"


@dataclass(frozen=True)
class SideBySide:
    """Updates that two copies of ``RecurrentMoE`` take side by side."""

    width: int  # d_model
    updates: int
    batch_size: int
    train_n: tuple[int, ...]
    block: int
    window: int
    hidden: int | None = None  # hidden widths; twice the width by default
    held_out_n: tuple[int, ...] = (99,)  # a part of the stream's seed alone: no string of these n is taken

    def run(self, seed: int, rate: float, settings: Settings) -> Parting:
        """Take the updates."""
        cell = make_mixture(self.width, self.hidden or 2 * self.width, seed, torch.float64)
        task = AnBn(self.train_n, self.held_out_n, 3)

        def block_rtrl(cell: nn.Module, batch_size: int) -> BlockRTRL:  # audits would run the cell besides
            return BlockRTRL(cell, batch_size, block=self.block, window=self.window, audit="off")

        return part(
            cell, TrainingConfig(task, self.batch_size, rate, self.updates, seed=seed), BPTT, block_rtrl,
            lambda n: settings.progress(f"side by side, d_model {self.width}, update {n}"),
        )  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A cell that is trained to the end from several seeds, by each of the learners."""

    cell: str  # "RecurrentMoE", or one of the names above
    width: int  # d_model, or H
    seeds: int = 1  # how many, counted from the settings' seed
    learners: tuple[str, ...] = ("BPTT", "BlockRTRL")
    episodes: int = 600  # the most updates
    batch_size: int = 32  # B
    rate: float = 1e-2  # the learning rate of Adam

    def make(self, seed: int) -> nn.Module:
        """Return the cell with the weights of a seed, in float64."""
        if self.cell == "RecurrentMoE":
            hidden = self.width if self.width < CLAIMED_WIDTH else 2 * self.width
            return make_mixture(self.width, hidden, seed, torch.float64)
        if self.cell == LSTM:
            torch.manual_seed(seed)
            lstm, head = nn.LSTMCell(2, self.width), nn.Linear(self.width, 2)
            return rtrl.cells.from_torch(lstm, head).to(torch.float64)
        sizes = {"topk": 2, "read_slots": 2} if self.cell == SPARSE else {"topk": 4, "read_slots": 4}
        generator = torch.Generator().manual_seed(seed)
        return CountingMixture(2, 2, self.width, **sizes, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    beside: SideBySide  # judged: both learners must take the same updates
    trainings: tuple[Training, ...] = ()
    parting: SideBySide | None = None  # followed until a choice differs
    train_n: tuple[int, ...] = (1, 2, 3, 4, 6, 7, 8)  # the n of training
    between_n: tuple[int, ...] = (5,)  # the n left out between them
    beyond_n: tuple[int, ...] = (9, 10)  # larger n
    slack: int = 3  # the largest difference of a rejected string
    block: int = 8  # of ``BlockRTRL`` in trainings
    evaluation_steps: int = 400  # steps of an evaluation
    longest: int = 16  # trained cells are evaluated on each n up to this one

    @property
    def task(self) -> AnBn:
        """The task of training."""
        return AnBn(self.train_n, (*self.between_n, *self.beyond_n), self.slack)

    def evaluate(self, cell: nn.Module, held_out: tuple[int, ...] | None) -> float:
        """Return the accuracy on trained n (None), or on other n."""
        task = self.task if held_out is None else AnBn((max(held_out) + 1,), held_out, self.slack)
        return evaluate_held_out(cell, task, held_out=held_out is not None, steps=self.evaluation_steps)


@dataclass(frozen=True)
class Marks:
    """Accuracies of one trained cell on trained n, the n between and those beyond, and the updates it took."""

    cell: str
    width: int
    learner: str
    seed: int
    trained: float
    between: float
    beyond: float
    updates: int

    @property
    def counts(self) -> bool:
        """Whether the cell is right on every n, those included that it never saw."""
        return min(self.trained, self.between, self.beyond) >= AnBn.solved


@dataclass(kw_only=True)
class Runs(Measurements):
    """The updates side by side, the marks of all trainings, their curves, and accuracies by n."""

    config: Config
    beside: Parting
    parting: Parting | None = None
    marks: list[Marks] = field(default_factory=list)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    by_n: dict[str, dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.beside.apart or not all(d <= TOLERANCE for d in self.beside.apart):
            self.failures.append(
                "with the same strings the weights of BlockRTRL and BPTT are apart by "
                f"{max(self.beside.apart, default=float('nan')):.1e}"
            )
        if self.parting is not None and not self.parting.steepest <= STEEP:
            self.failures.append(
                f"the distance of BlockRTRL and BPTT grew {self.parting.steepest:.1e}-fold in one update while all "
                "choices agree"
            )


def verdict(m: Runs) -> Judgement:
    """Judge the marks, once the updates side by side have not voided the claim."""
    claimed = [mark for mark in m.marks if (mark.cell, mark.width) == ("RecurrentMoE", CLAIMED_WIDTH)]
    ours = [mark for mark in m.marks if mark.cell == "RecurrentMoE"]
    parts = []
    if ours and not all(mark.counts for mark in ours):
        reached = [mark for mark in ours if mark.trained >= AnBn.solved]
        parts.append(
            f"n is one of those trained: there {len(reached)} of {len(ours)} runs of RecurrentMoE come to 100 %, on "
            f"the n between them to {_mean(ours, 'between')}, beyond to {_mean(ours, 'beyond')} (chance 50.0 %)"
        )
    others = [
        f"{name} {sum(mark.counts for mark in group)} of {len(group)}"
        for name, group in _by_cell([mark for mark in m.marks if mark.cell != "RecurrentMoE"])
    ]
    if others:
        parts.append(f"with a cell that can add, these runs are right on every n: {', '.join(others)}")
    behind = _behind(m.marks)
    if behind:
        parts.append(f"BlockRTRL ended more than a point behind BPTT: {', '.join(behind)}")
    said = "; ".join(parts)
    if not claimed:
        return Judgement.not_at_claimed_size(
            said or f"d_model {m.config.beside.width}: both learners take the same updates"
        )
    if all(mark.counts for mark in claimed) and not behind:
        return Judgement.holds()
    if not any(mark.trained >= AnBn.solved for mark in claimed):
        return Judgement.does_not_hold(f"no run of d_model {CLAIMED_WIDTH} comes to 100 % even on trained n; {said}")
    return Judgement.holds_when(said)


def _by_cell(marks: Sequence[Marks]) -> list[tuple[str, list[Marks]]]:
    names = dict.fromkeys(mark.cell for mark in marks)
    return [(name, [mark for mark in marks if mark.cell == name]) for name in names]


def _behind(marks: Sequence[Marks]) -> list[str]:
    """Return the runs in which ``BlockRTRL`` ended behind BPTT."""
    bptt = {(m.cell, m.width, m.seed): m.trained for m in marks if m.learner == "BPTT"}
    pairs = [(m, bptt.get((m.cell, m.width, m.seed), 0.0)) for m in marks if m.learner == "BlockRTRL"]
    return [f"{m.cell}, d_model {m.width}, seed {m.seed}" for m, reference in pairs if m.trained < reference - SAME]


def _mean(marks: Sequence[Marks], what: str) -> str:
    values = [getattr(m, what) for m in marks]
    return percent(sum(values) / len(values)) if values else "–"


def show(m: Runs) -> Shown:
    """Show distances, accuracies and training curves."""
    config, apart = m.config, max(m.beside.apart, default=None)
    trained = ", ".join(map(str, config.train_n))
    accuracies = [f"n = {trained}", f"n = {config.between_n[0]}", f"n = {config.beyond_n[0]} … {config.beyond_n[-1]}"]
    means = [
        f"{name}, {_learners(group)}: trained n {_mean(group, 'trained')}, between {_mean(group, 'between')}, beyond "
        f"{_mean(group, 'beyond')}"
        for name, group in _by_cell(m.marks)
    ]
    beside: list[Cell] = [apart, m.beside.steepest, sum(m.beside.flips), m.beside.first_flip]
    rows: list[list[Cell]] = [[f"d_model {config.beside.width}", len(m.beside.apart), *beside]]
    partings = {f"d_model {config.beside.width}": m.beside}
    if m.parting is not None and config.parting is not None:
        name, p = f"d_model {config.parting.width}, to the end", m.parting
        rows.append([name, len(p.apart), p.before_flip, p.steepest, sum(p.flips), p.first_flip])
        partings[name] = p
    agree = ["largest difference while choices agree", "largest growth in one update"]
    columns = ["model", "updates", *agree, "choices that differ", "from update"]
    tables = [Table("BlockRTRL beside BPTT, float64", columns, rows)]
    plots: list[Plot] = [parting_plot("How far BlockRTRL and BPTT are apart", partings)]
    if m.marks:
        heads = ["cell", "d_model or H", "learner", "seed", *accuracies, "updates"]
        tables.append(Table("Accuracy on aⁿbⁿ", heads, [list(asdict(mark).values()) for mark in m.marks]))
        dashed = [name for name in m.curves if "BPTT" in name]
        plots.append(plot("Learning aⁿbⁿ", "updates", "training accuracy", m.curves, dashed=dashed))
        plots.append(plot("How far the trained cells count", "n", "accuracy", m.by_n))
    counting = [name for name, group in _by_cell(m.marks) if any(mark.counts for mark in group)]
    headline = f"On aⁿbⁿ BlockRTRL takes the updates of BPTT (weights apart by {apart or 0.0:.0e})"
    return Shown(
        "; ".join([f"apart by {apart or 0.0:.1e} after {len(m.beside.apart)} updates", *means]),
        tables,
        plots,
        f"{headline}; {', '.join(counting)} counted beyond the trained n." if counting else f"{headline}.",
        "; ".join(
            [f"RecurrentMoE, d_model {config.beside.width}, beside BPTT"]
            + [f"{t.cell}, {t.width} wide, {t.seeds} seeds, B = {t.batch_size}" for t in config.trainings]
        ),
    )


def _learners(marks: Sequence[Marks]) -> str:
    return " and ".join(dict.fromkeys(mark.learner for mark in marks))


_BESIDE = SideBySide(CLAIMED_WIDTH, 2, 1, (8, 10), 4, 2)
_SMALL_N = {"train_n": (1, 2, 4), "between_n": (3,), "beyond_n": (5, 6), "slack": 2}


@claim(
    "anbn-learns",
    claimed="a sparse mixture of experts reaches 100 % on aⁿbⁿ",
    threshold=(
        f"weights apart by ≤ {TOLERANCE:.0e}; ≥ {percent(AnBn.solved)} on every n, trained or not; BlockRTRL ≥ BPTT − "
        "1 point"
    ),
    quick=Config(
        _BESIDE,
        (Training(LSTM, 8, 1, ("BlockRTRL",), 200, rate=2e-2),),
        evaluation_steps=60,
    ),
    full=Config(
        replace(_BESIDE, updates=20),
        (
            Training("RecurrentMoE", 32, 1, ("BPTT",), 1000, 32, 2e-3),
            Training("RecurrentMoE", 8, 1, episodes=400, rate=2e-3),
            Training(SPARSE, 8, 3, ("BPTT",)),
            Training(SPARSE, 8, 1, ("BlockRTRL",)),
            Training(DENSE, 8, 3, ("BPTT",)),
            Training(DENSE, 8, 1, ("BlockRTRL",)),
            Training(LSTM, 8, 3),
        ),
        SideBySide(8, 300, 32, (1, 2, 4, 5), 5, 8, 8, (3, 6, 7)),
        evaluation_steps=1000,
    ),
    small=Config(SideBySide(8, 2, 2, (8, 10), 2, 4, 8)),
    verdict=verdict,
    show=show,
    void="BlockRTRL does not take the updates of BPTT",
    question="learns",
    noticed_breaks=("truncate", "forget-dormant-losses", "reverse-products", "no-catch-up", "off-by-one"),
)
def measure(config: Config, settings: Settings) -> Runs:
    """Train all cells, and evaluate them."""
    beside = config.beside.run(settings.seed, 2e-3, settings)
    parting = None if config.parting is None else config.parting.run(settings.seed, 2e-3, settings)
    m = Runs(config=config, beside=beside, parting=parting)

    def block_rtrl(cell: nn.Module, batch_size: int) -> BlockRTRL:
        return BlockRTRL(cell, batch_size, block=config.block, window=8)

    learners: dict[str, MakeLearner] = {"BPTT": BPTT, "BlockRTRL": block_rtrl}
    for training in config.trainings:
        for seed in range(settings.seed, settings.seed + training.seeds):
            start = training.make(seed)
            for name in training.learners:
                _train(m, training, start, seed, name, learners[name], settings)
    return m


def _train(
    m: Runs, training: Training, start: nn.Module, seed: int, name: str, make: MakeLearner, settings: Settings
) -> None:
    """Train a copy of a cell to the end, and add its marks."""
    cell, config = copy.deepcopy(start), m.config
    how = TrainingConfig(config.task, training.batch_size, training.rate, training.episodes, seed=seed, until=0.995)
    label = f"{training.cell}, {training.width} wide, {name}"
    history = train(cell, how, make, lambda n: settings.progress(f"{label}, seed {seed}, update {n}"))
    trained, between, beyond = (config.evaluate(cell, n) for n in (None, config.between_n, config.beyond_n))
    marks = Marks(training.cell, training.width, name, seed, trained, between, beyond, history.episodes)
    m.marks.append(marks)
    m.curves[f"{label}, seed {seed}"] = history.scores
    m.by_n[f"{label}, seed {seed}"] = {n: config.evaluate(cell, (n,)) for n in range(1, config.longest + 1)}
