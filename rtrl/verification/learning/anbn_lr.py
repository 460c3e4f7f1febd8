"""Claim: on aⁿbⁿ Adam converges at a rate of 2e-3, and stalls near 48 % at 1e-2.

**How it is measured.** `RecurrentMoE` learns to accept aⁿbⁿ and to reject aⁿbᵐ, one symbol per step, at both rates,
with several seeds of the weights for each. All runs read the same strings, half of which are accepted, with one update
after each batch of them, and plain Adam without clipping. The curve is the mean accuracy in training over the seeds. A
run has converged when its accuracy over the last updates is at least 95 %, and has stalled when that is below 75 %: a
cell that only tells strings with far too few or too many b from the others comes to about 70 %, one that answers
blindly to 50 %.

**Why that is fair.** Nothing but the rate differs. All runs go forward together, stacked along one more axis
(`torch.func`), each with its own parameters and Adam, and backward through time. *Control:* the first updates of a run
at either rate are taken once more in float64 by `BlockRTRL` and PyTorch's Adam; the weights must agree, or the check
fails.

**What it leaves open.** The quick run has `d_model` 8 and two seeds per rate, the full one `d_model` 32 and four. The
number of updates is fixed, and a slow rate could do better with more. Nothing is said of rates with a schedule, with
clipping or of other optimizers.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

import rtrl
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import Table
from rtrl.tasks.anbn import AnBn
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.measuring import percent
from rtrl.verification.harness.training_runs import Progress, TrainingConfig, distance, train
from rtrl.verification.show import plot

CONVERGED, STALLED, TOLERANCE = 0.95, 0.75, 1e-6
CLAIMED_WIDTH = 32
RATES = (2e-3, 1e-2)


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    width: int = 8  # d_model of the cell
    hidden: int = 8  # its hidden widths
    seeds: int = 2  # seeds for each rate
    slack: int = 2  # the largest difference of a rejected string
    batch_size: int = 16  # B
    episodes: int = 200  # the number of updates
    every: int = 25  # accuracies are taken over this number of updates
    train_n: tuple[int, ...] = (1, 2, 4)  # the n of the strings
    control: int = 2  # updates that ``BlockRTRL`` takes as well

    @property
    def task(self) -> AnBn:
        """The task."""
        return AnBn(self.train_n, (3,), self.slack)


@dataclass(kw_only=True)
class Accuracies(Measurements):
    """(rate, seed) → the accuracy over every ``every`` updates; rate → the distance of ``BlockRTRL``; P."""

    config: Config
    curves: dict[tuple[float, int], list[float]]
    apart: dict[float, float]
    parameters: int = 0

    def __post_init__(self) -> None:
        self.failures += [
            f"at {rate:g} the weights of BlockRTRL are apart by {distance:.1e} from those of the stacked runs"
            for rate, distance in self.apart.items()
            if not distance <= TOLERANCE
        ]

    @property
    def last(self) -> dict[float, list[float]]:
        """Rate → the accuracies at the end."""
        return {rate: [curve[-1] for (of, _), curve in self.curves.items() if of == rate] for rate in RATES}


def make_cell(width: int, hidden: int, seed: int, dtype: torch.dtype | None = None) -> rtrl.RecurrentMoE:
    """Return a cell with 2 heads, 4 slots and 4 experts, top-2, its weights the same in every dtype."""
    cell = rtrl.RecurrentMoE(
        2, 2, d_model=width, n_heads=2, n_slots=4, n_experts=4, topk=2, expert_hidden=hidden, ffn_hidden=hidden,
        generator=torch.Generator().manual_seed(seed), dtype=torch.float32,
    )  # fmt: skip
    return cell.to(dtype or torch.get_default_dtype())


def stacked_runs(
    cells: Sequence[nn.Module], rates: Sequence[float], config: Config, seed: int, progress: Progress
) -> Tensor:
    """Train all cells on the same strings, each at its own rate; the cells receive the trained weights.

    Returns:
        (rows, K): the accuracy of every run over each ``every`` updates.
    """
    first = cells[0]
    stacked = {
        name: torch.stack([dict(cell.named_parameters())[name].detach() for cell in cells]).requires_grad_()
        for name, _ in first.named_parameters()
    }
    # Adam works entry by entry, so that stacked runs do not interact; the rate is a tensor with one entry for each run.
    means = {name: torch.zeros_like(p) for name, p in stacked.items()}
    squares = {name: torch.zeros_like(p) for name, p in stacked.items()}
    rate = torch.tensor(rates, dtype=next(iter(stacked.values())).dtype)

    def one(values: dict[str, Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, after, _ = functional_call(first, values, (x, h))
        return y, after

    step = vmap(one, in_dims=(0, None, 0))
    stream = config.task.stream(config.batch_size, seed=seed, dtype=rate.dtype)
    item, rows = next(stream), []
    right, n_targets = torch.zeros(len(cells)), 0
    for number in range(1, config.episodes + 1):
        progress(number - 1)
        h = first.init_state(config.batch_size).detach().expand(len(cells), -1, -1, -1)  # type: ignore[operator]
        loss = rate.new_zeros(())
        while True:
            y, h = step(stacked, item.x, h)
            if bool(item.has_target.any()):
                target = item.target[item.has_target]
                answers = y[:, item.has_target]
                loss = loss + F.cross_entropy(answers.flatten(0, 1), target.repeat(len(cells)), reduction="sum")
                right += (answers.argmax(dim=2) == target).sum(dim=1)
                n_targets += len(target)
            item = next(stream)
            if bool(item.is_first.all()):
                break
        gradients = torch.autograd.grad(loss / config.batch_size, list(stacked.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(stacked.items(), gradients, strict=True):
                means[name].lerp_(gradient, 0.1)
                squares[name].lerp_(gradient.square(), 0.001)
                scale = (squares[name] / (1 - 0.999**number)).sqrt() + 1e-8
                p -= rate.reshape(-1, *[1] * (p.ndim - 1)) * means[name] / (1 - 0.9**number) / scale
        if number % config.every == 0:
            rows.append(right / n_targets)
            right, n_targets = torch.zeros(len(cells)), 0
    with torch.no_grad():
        for k, cell in enumerate(cells):
            for name, p in cell.named_parameters():
                p.copy_(stacked[name][k])
    return torch.stack(rows)


def control(config: Config, seed: int) -> dict[float, float]:
    """Return, by rate, how far the weights of stacked runs are from those of ``BlockRTRL`` after the first updates."""
    cells = [make_cell(config.width, config.hidden, seed, torch.float64) for _ in RATES]
    alone = [copy.deepcopy(cell) for cell in cells]
    few = replace(config, episodes=config.control, every=1)
    stacked_runs(cells, RATES, few, seed, lambda _: None)
    found = {}
    for rate, stacked, cell in zip(RATES, cells, alone, strict=True):
        how = TrainingConfig(config.task, config.batch_size, rate, config.control, clip=math.inf, seed=seed)
        train(cell, how, lambda cell, b: BlockRTRL(cell, b, block=2, window=2, audit="off"), lambda _: None)
        found[rate] = distance(stacked, cell)
    return found


def verdict(m: Accuracies) -> Judgement:
    """Judge the accuracies at the end by rate; say so where the model is smaller than the claim's."""
    found = judge(m.config, m.last)
    if m.config.width >= CLAIMED_WIDTH:
        return found
    return Judgement.not_at_claimed_size(
        f"d_model {m.config.width}: {found.condition or 'every seed converges at the low rate, stalls at the high'}"
    )


def _outcomes(last: dict[float, list[float]]) -> tuple[int, int, dict[float, str]]:
    """Return how many seeds converge at the low rate, how many stall at the high one, and the mean by rate."""
    low, high = RATES
    means = {rate: percent(sum(values) / len(values)) for rate, values in last.items()}
    return sum(a >= CONVERGED for a in last[low]), sum(a < STALLED for a in last[high]), means


def judge(config: Config, last: dict[float, list[float]]) -> Judgement:
    """Judge the accuracies at the end by rate."""
    (low, high), n = RATES, config.seeds
    good, bad, means = _outcomes(last)
    if good == n and bad == n:
        if all(0.43 <= a <= 0.53 for a in last[high]):
            return Judgement.holds()
        return Judgement.holds_when(f"a stall is one at {means[high]}, not near 48 %")
    if good and bad:
        return Judgement.holds_when(
            f"the seed is a good one: within {config.episodes} updates {n - good} of {n} do not converge at {low:g}, "
            f"and {n - bad} of {n} do not stall at {high:g}; a stall is one at {means[high]}"
        )
    what = f"no seed converges at {low:g}" if not good else f"no seed stalls at {high:g}"
    return Judgement.does_not_hold(f"{what} within {config.episodes} updates")


def show(m: Accuracies) -> Shown:
    """Show accuracies and curves by rate and seed."""
    (low, high), n, every = RATES, m.config.seeds, m.config.every
    good, bad, percents = _outcomes(m.last)
    means = {}
    for rate in RATES:
        curves = [curve for (of, _), curve in m.curves.items() if of == rate]
        means[f"{rate:g}, mean of {len(curves)} seeds"] = [
            sum(values) / len(values) for values in zip(*curves, strict=True)
        ]
    runs = {f"{rate:g}, seed {seed}": curve for (rate, seed), curve in m.curves.items()}
    lines = {name: {every * n: a for n, a in enumerate(curve, 1)} for name, curve in {**means, **runs}.items()}
    rows = [[rate, seed, curve[-1], max(curve)] for (rate, seed), curve in m.curves.items()]
    title, columns = "aⁿbⁿ at two rates of Adam", ["rate", "seed", f"accuracy over the last {every} updates", "best"]
    return Shown(
        f"at {low:g}: {good} of {n} seeds converge (mean {percents[low]}); at {high:g}: {bad} of {n} stall "
        f"(mean {percents[high]})",
        [Table(title, columns, rows)],
        [plot(title, "updates", "training accuracy", lines, dashed=runs)],
        model=(
            f"RecurrentMoE, d_model {m.config.width}, P = {m.parameters:,}, H = {4 * m.config.width}, {n} seeds, B = "
            f"{m.config.batch_size}, n = {', '.join(map(str, m.config.train_n))}"
        ),
    )


@claim(
    "anbn-lr",
    claimed="Adam 2e-3 converges on aⁿbⁿ, 1e-2 stalls near 48 %",
    threshold=f"≥ {percent(CONVERGED)} at {RATES[0]:g}, < {percent(STALLED)} at {RATES[1]:g}",
    quick=Config(),
    full=Config(width=32, hidden=64, seeds=4, slack=3, episodes=800, every=50, train_n=(1, 2, 4, 5)),
    small=Config(width=8, seeds=1, batch_size=2, episodes=2, every=1, train_n=(8, 10)),
    verdict=verdict,
    show=show,
    question="learns",
    void="the runs are not those of BlockRTRL",
    noticed_breaks=("truncate", "forget-dormant-losses", "off-by-one", "lost-updates"),
)
def measure(config: Config, settings: Settings) -> Accuracies:
    """Take the control's updates, and train all runs at once."""
    settings.progress("the first updates by BlockRTRL")
    apart = control(config, settings.seed)
    pairs = [(rate, settings.seed + n) for rate in RATES for n in range(config.seeds)]
    cells = [make_cell(config.width, config.hidden, seed) for _, seed in pairs]
    rows = stacked_runs(
        cells, [rate for rate, _ in pairs], config, settings.seed,
        lambda n: settings.progress(f"{len(pairs)} runs, update {n}"),
    )  # fmt: skip
    curves = dict(zip(pairs, rows.T.tolist(), strict=True))
    return Accuracies(
        config=config, curves=curves, apart=apart, parameters=sum(p.numel() for p in cells[0].parameters())
    )
