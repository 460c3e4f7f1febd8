"""Claim: on aⁿbⁿ Adam converges at a rate of 2e-3, and stalls near 48 % at 1e-2.

**How it is measured.** `RecurrentMoE` learns to accept aⁿbⁿ and to reject aⁿbᵐ, one symbol a step, at both rates, with
several seeds of the weights for each. All runs read the same strings, half of which are accepted, with one update
after each batch of them, and plain Adam without clipping. The curve is the mean accuracy in training over the seeds. A
run has converged when its accuracy over the last rounds is at least 95 %, and has stalled when that is below 75 %: a
cell that only tells strings with far too few or too many b from the others comes to about 70 %, one that answers
blindly to 50 %.

**Why that is fair.** Nothing but the rate differs. The gradients are those of BPTT, since the claim is about the
optimizer; that `BlockRTRL` has the same gradients is what the claims gradient-equivalence and haystack-rtrl are about.
All runs go forward together, stacked along one more axis (`torch.func`), each with parameters and Adam of its own; the
tests hold such a run against one that goes alone.

**What it leaves open.** The quick run has `d_model` 8 and three seeds a rate, the full one `d_model` 32 and four. The
number of rounds is fixed, and a slow rate could do better with more. Nothing is said of rates with a schedule, with
clipping or of other optimizers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

import rtrl
from rtrl.tasks.anbn import AnBn
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table
from rtrl.verification.harness.threads import one_thread
from rtrl.verification.harness.training_runs import Tell, percent, plain

CONVERGED, STALLED = 0.95, 0.75
CLAIMED_WIDTH = 32


@dataclass(frozen=True)
class Sizes:
    """What is measured: the cell's width, the rates, how many seeds for each, and how long.

    Attributes:
        every: accuracies are taken over so many rounds. train_n, slack: of the strings.
    """

    width: int = 8
    hidden: int = 8
    rates: tuple[float, float] = (2e-3, 1e-2)
    seeds: int = 3
    slack: int = 2
    batch_size: int = 16
    rounds: int = 250
    every: int = 25
    train_n: tuple[int, ...] = (1, 2, 4)

    @property
    def task(self) -> AnBn:
        return AnBn(self.train_n, (3,), self.slack)


QUICK = Sizes()
FULL = Sizes(width=32, hidden=64, seeds=4, slack=3, rounds=800, every=50, train_n=(1, 2, 4, 5))


def make_cell(width: int, hidden: int, seed: int, dtype: torch.dtype | None = None) -> rtrl.RecurrentMoE:
    """Config "quick" where the width is 32: 2 heads, 4 slots, 4 experts, top-2. The same weights in every dtype."""
    cell = rtrl.RecurrentMoE(
        2, 2, d_model=width, n_heads=2, n_slots=4, n_experts=4, topk=2, expert_hidden=hidden, ffn_hidden=hidden,
        generator=torch.Generator().manual_seed(seed), dtype=torch.float32,
    )  # fmt: skip
    return cell.to(dtype or torch.get_default_dtype())


def stacked_runs(cells: Sequence[nn.Module], rates: Sequence[float], sizes: Sizes, seed: int, tell: Tell) -> Tensor:
    """Train so many cells on the same strings, each at its own rate; the cells get the trained weights.

    Returns:
        (rows, K): the accuracy of every run over each ``every`` rounds.
    """
    first = cells[0]
    own = {
        name: torch.stack([dict(cell.named_parameters())[name].detach() for cell in cells]).requires_grad_()
        for name, _ in first.named_parameters()
    }
    # Adam works entry by entry, so that stacked runs do not meet; of the rate it makes a group for each run.
    means = {name: torch.zeros_like(p) for name, p in own.items()}
    squares = {name: torch.zeros_like(p) for name, p in own.items()}
    rate = torch.tensor(rates, dtype=next(iter(own.values())).dtype)

    def one(values: dict[str, Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, after, _ = functional_call(first, values, (x, h))
        return y, after

    step = vmap(one, in_dims=(0, None, 0))
    stream = sizes.task.stream(sizes.batch_size, seed=seed, dtype=rate.dtype)
    moment, rows = next(stream), []
    right, asked = torch.zeros(len(cells)), 0
    for number in range(1, sizes.rounds + 1):
        tell(number - 1)
        h = first.init_state(sizes.batch_size).detach().expand(len(cells), -1, -1, -1)  # type: ignore[operator]
        loss = rate.new_zeros(())
        while True:
            y, h = step(own, moment.x, h)
            if bool(moment.asked.any()):
                target = moment.target[moment.asked]
                answers = y[:, moment.asked]
                loss = loss + F.cross_entropy(answers.flatten(0, 1), target.repeat(len(cells)), reduction="sum")
                right += (answers.argmax(dim=2) == target).sum(dim=1)
                asked += len(target)
            moment = next(stream)
            if bool(moment.fresh.all()):
                break
        gradients = torch.autograd.grad(loss / sizes.batch_size, list(own.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(own.items(), gradients, strict=True):
                means[name].lerp_(gradient, 0.1)
                squares[name].lerp_(gradient.square(), 0.001)
                scale = (squares[name] / (1 - 0.999**number)).sqrt() + 1e-8
                p -= rate.reshape(-1, *[1] * (p.ndim - 1)) * means[name] / (1 - 0.9**number) / scale
        if number % sizes.every == 0:
            rows.append(right / asked)
            right, asked = torch.zeros(len(cells)), 0
    with torch.no_grad():
        for k, cell in enumerate(cells):
            for name, p in cell.named_parameters():
                p.copy_(own[name][k])
    return torch.stack(rows)


def judge(sizes: Sizes, last: dict[float, list[float]]) -> Finding:
    """The verdict, from the accuracies at the end by rate."""
    low, high = sizes.rates
    good = sum(a >= CONVERGED for a in last[low])
    bad = sum(a < STALLED for a in last[high])
    n = sizes.seeds
    mean = {rate: sum(values) / len(values) for rate, values in last.items()}
    figure = (
        f"at {low:g}: {good} of {n} seeds converge (mean {percent(mean[low])}); at {high:g}: {bad} of {n} stall "
        f"(mean {percent(mean[high])})"
    )
    finding = Finding(figure, f"≥ {percent(CONVERGED)} at {low:g}, < {percent(STALLED)} at {high:g}", "holds")
    if good == n and bad == n:
        if not all(0.43 <= a <= 0.53 for a in last[high]):
            finding.verdict = "holds when"
            finding.condition = f"a stall is one at {percent(mean[high])}, not near 48 %"
    elif good and bad:
        finding.verdict = "holds when"
        finding.condition = (
            f"the seed is a good one: within {sizes.rounds} updates {n - good} of {n} do not converge at {low:g}, and "
            f"{n - bad} of {n} do not stall at {high:g}; a stall is one at {percent(mean[high])}"
        )
    else:
        finding.verdict = "does not hold"
        what = f"no seed converges at {low:g}" if not good else f"no seed stalls at {high:g}"
        finding.condition = f"{what} within {sizes.rounds} updates"
    if sizes.width != CLAIMED_WIDTH and finding.condition:
        finding.condition += f" (d_model {sizes.width}; the claim was made for {CLAIMED_WIDTH}, as in the full run)"
    return finding


def measure_sizes(sizes: Sizes, settings: Settings, progress: Progress) -> Finding:
    """All runs at once, and the verdict."""
    pairs = [(rate, settings.seed + n) for rate in sizes.rates for n in range(sizes.seeds)]
    cells = [make_cell(sizes.width, sizes.hidden, seed) for _, seed in pairs]
    with one_thread():
        rows = stacked_runs(
            cells, [rate for rate, _ in pairs], sizes, settings.seed,
            lambda n: progress(f"{len(pairs)} runs, update {n}", n, sizes.rounds),
        )  # fmt: skip
    columns = rows.T.tolist()
    last: dict[float, list[float]] = {rate: [] for rate in sizes.rates}
    for (rate, _), column in zip(pairs, columns, strict=True):
        last[rate].append(column[-1])
    finding = judge(sizes, last)
    finding.tables.append(
        Table(
            "aⁿbⁿ at two rates of Adam",
            ["rate", "seed", f"accuracy over the last {sizes.every} updates", "best"],
            [[rate, seed, c[-1], max(c)] for (rate, seed), c in zip(pairs, columns, strict=True)],
        )
    )
    at = [float(sizes.every * (n + 1)) for n in range(len(rows))]
    lines = []
    for rate in sizes.rates:
        mine = [c for (r, _), c in zip(pairs, columns, strict=True) if r == rate]
        lines.append(
            Series(f"{rate:g}, mean of {len(mine)} seeds", at, [sum(v) / len(v) for v in zip(*mine, strict=True)])
        )
    lines += [
        Series(f"{rate:g}, seed {seed}", at, c, dashed=True) for (rate, seed), c in zip(pairs, columns, strict=True)
    ]
    finding.plots.append(Plot("aⁿbⁿ at two rates of Adam", "updates", "training accuracy", lines))
    finding.data = {"sizes": plain(asdict(sizes)), "last": {f"{rate:g}": values for rate, values in last.items()}}
    return finding


def measure(settings: Settings, progress: Progress) -> Finding:
    """Three seeds a rate of a small mixture; four of config "quick" in the full run."""
    return measure_sizes(FULL if settings.full else QUICK, settings, progress)


CLAIM = Claim("anbn-lr", "Adam 2e-3 converges on aⁿbⁿ, 1e-2 stalls near 48 %", measure)
