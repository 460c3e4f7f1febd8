"""Claim: BPTT reaches 100 % on short haystacks, read one token per step.

**How it is measured.** The haystack of 8 to 16 symbols: BOS, noise, KEY, k, SEP, noise, Q, k being asked at Q and
the noise being made of the same symbols as k. `rtrl.learners.BPTT` takes the episode one symbol per step, and the
parameters change at its end. The score is the accuracy on held-out episodes (their noise is in no training episode)
of a stream of its own. The quick run trains a GRU of 24 units on an alphabet of 10 symbols, and the full run
`RecurrentMoE` as well (`d_model` 32, 4 slots, 8 experts, top-2), on 8 symbols.

**Why that is fair.** No symbol is seen before its step, and nothing but the recurrent state carries k to the question.
Noise of the same symbols rules out reading k off the presence of a symbol. Training ends when the accuracy in training
is 100 % over 50 episodes of the batch; the held-out accuracy has no part in that.

**What it leaves open.** Lengths above 16 are the claim haystack-long's. The mixture is slow to train, so the quick run
leaves it out, and the full run trains it on one seed. Its gate starts biased towards keeping (−3), which speeds
learning.
"""

from dataclasses import dataclass

import torch
from torch import nn

import rtrl
from rtrl.learners import BPTT
from rtrl.report.model import Cell, Table
from rtrl.tasks.haystack import Haystack
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.measuring import percent
from rtrl.verification.harness.training_runs import History, TrainingConfig, evaluate_held_out, train
from rtrl.verification.show import plot


@dataclass(frozen=True)
class Case:
    """One cell on one haystack. ``cell`` is "GRU" or "RecurrentMoE", ``width`` its H or ``d_model``."""

    cell: str
    width: int
    values: int
    lengths: tuple[int, int]
    rate: float
    batch_size: int = 32
    episodes: int = 400
    seed: int = 0
    gate: float = -3.0  # the bias of the mixture's gate at the start

    @property
    def task(self) -> Haystack:
        """The haystack."""
        return Haystack(self.values, self.lengths)

    @property
    def label(self) -> str:
        """The case in words."""
        what = f"GRU, H = {self.width}" if self.cell == "GRU" else f"RecurrentMoE, d_model = {self.width}"
        return f"{what}, {self.values + 4} symbols"

    def training(self, seed: int) -> TrainingConfig:
        """Return how the cell is trained."""
        task, limit = self.task, self.episodes
        return TrainingConfig(task, self.batch_size, self.rate, limit, seed=seed, check_every=50, until=1.0)


@dataclass(frozen=True)
class Config:
    """The cases, and the steps of the evaluation."""

    cases: tuple[Case, ...]
    evaluation_steps: int = 400


@dataclass(frozen=True)
class Result:
    """What a case came to: held-out accuracy, and its training."""

    case: Case
    seed: int
    accuracy: float
    history: History


@dataclass(kw_only=True)
class Results(Measurements):
    """What all cases came to."""

    results: list[Result]


def make_cell(case: Case, seed: int, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the cell of a case, with the weights of a seed, the same in every dtype."""
    task = case.task
    if case.cell == "GRU":
        torch.manual_seed(seed)
        gru, head = nn.GRUCell(task.d_in, case.width), nn.Linear(case.width, task.d_out)
        return rtrl.cells.from_torch(gru, head).to(dtype or torch.get_default_dtype())
    cell = rtrl.RecurrentMoE(
        task.d_in, task.d_out, d_model=case.width, n_slots=4, n_experts=8, topk=2,
        generator=torch.Generator().manual_seed(seed), dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        cell.gate.bias.fill_(case.gate)
    return cell.to(dtype or torch.get_default_dtype())


def verdict(m: Results) -> Judgement:
    """Judge whether every case is solved."""
    missed = [r for r in m.results if r.accuracy < r.case.task.solved]
    reached = sorted({r.case.label for r in m.results if r not in missed})
    if not missed:
        return Judgement.holds()
    short = "; ".join(f"{r.case.label}, seed {r.case.seed}: {percent(r.accuracy)}" for r in missed)
    instead = f"not within {max(r.case.episodes for r in missed)} episodes of the batch: {short}"
    if not reached:
        return Judgement.does_not_hold(instead)
    return Judgement.holds_when(f"the cell is {', '.join(reached)}; {instead}")


def show(m: Results) -> Shown:
    """Show accuracies and training curves."""
    title, columns = "Short haystacks by BPTT", ["cell", "seed", "chance", "held-out accuracy"]
    rows: list[list[Cell]] = [
        [r.case.label, r.seed, r.case.task.chance, r.accuracy, r.history.episodes, r.history.steps] for r in m.results
    ]
    lines = {f"{r.case.label}, seed {r.case.seed}": r.history.scores for r in m.results}
    return Shown(
        "; ".join(f"{r.case.label}: {percent(r.accuracy)}" for r in m.results),
        [Table(title, [*columns, "episodes of the batch", "steps"], rows)],
        [plot(title, "episodes of the batch", "training accuracy", lines)],
        model="; ".join(f"{r.case.label}, B = {r.case.batch_size}, seed {r.seed}" for r in m.results),
    )


_QUICK = (Case("GRU", 24, 6, (8, 16), 0.02), Case("GRU", 24, 6, (8, 16), 0.02, seed=1))


@claim(
    "haystack-bptt",
    claimed="BPTT 100 % on short haystacks: lengths 8–16, 8–12 symbols, one token per step",
    threshold=f"≥ {percent(0.99)} on held-out episodes, every cell and seed",
    quick=Config(_QUICK),
    full=Config(
        (
            *_QUICK,
            Case("GRU", 32, 8, (8, 16), 0.02, episodes=800),
            Case("RecurrentMoE", 32, 4, (8, 16), 2e-3, episodes=1500),
        )
    ),
    small=Config((Case("GRU", 8, 2, (8, 9), 0.05, episodes=150),), 100),
    verdict=verdict,
    show=show,
    question="learns",
    noticed_breaks=("lost-updates", "forgetful-cell"),
)
def measure(config: Config, settings: Settings) -> Results:
    """Train every case by BPTT, and evaluate it."""
    m = Results(results=[])
    for case in config.cases:
        seed = settings.seed + case.seed
        cell = make_cell(case, seed)

        def progress(n: int, case: Case = case) -> None:
            settings.progress(f"{case.label}, episode {n}")

        history = train(cell, case.training(seed), BPTT, progress)
        accuracy = evaluate_held_out(cell, case.task, steps=config.evaluation_steps)
        m.results.append(Result(case, seed, accuracy, history))
    return m
