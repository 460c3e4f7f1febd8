"""A step was said to be 2000 × cheaper than one of full RTRL (H²·P) at 3 % active parameters.

**How it is measured.** The full form runs config *flow* itself (64 experts, 16 slots of 64, H = 1024, P = 1.1 million;
4.6 GB of influence), one sample, float32, one thread. ``BlockRTRL`` first takes as many steps as make every expert and
slot active; then multiply-adds are counted and seconds taken over the steps that follow, with the delivery of every
gradient: step by step, and in one block of 256. Full RTRL, the same learner with nothing declared, takes one step with
its influence in place, about 10¹² multiply-adds. Each run's influence fills the memory, so they come one after the
other and not in turns; beside each, before and after, the same matrix product is timed, and seconds are compared in
units of that. Gradients are compared with BPTT, roughly in float32 at this size, and exactly (float64, 1e-10) on
proxies: the same slots and experts, narrower slots, and the choices of config *flow*, replayed.

The quick form has the proxies alone. Multiply-adds per step are ``a·d⁴ + b·d³`` in the slots' width d, fitted through
two proxies and extrapolated to d = 64; the full form shows how far that is off. Full RTRL is counted at small sizes,
where H²·P must be exceeded by no more than what linearising the step takes. A proxy is timed too, in turns.

**Why that is fair.** The claim's baseline is H²·P, so that is the numerator, without what full RTRL needs for its
Jacobians. The gain of blocks is reported apart from that of sparsity: block 1 has sparsity alone.

**What it leaves open.** Experts are dormant here as a drawn stream and an untrained router have it. Times of small
proxies are mostly what is launched, so that the ratio by the clock is far below that of the counts and grows with size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from rtrl.cells.protocol import Sparsity
from rtrl.profiling.timing import alternate, median_ratio, medians
from rtrl.report.model import Cell, Plot, Table
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness import problems
from rtrl.verification.harness.measuring import count_macs, times
from rtrl.verification.harness.problems import ROUGH, LearnerRun, Mixture, Problem, check_gradients, problem, routing
from rtrl.verification.show import Columns, plot

CLAIMED = 2000.0


@dataclass(frozen=True, slots=True)
class Config:
    """How much is run.

    Attributes:
        mixture: the configuration of the claim.
        widths: of the slots of the two proxies that are fitted.
        blocks: the learner's blocks.
        warm: steps before counting, rounded up to whole blocks.
        steps: steps that are counted, likewise.
        window: of the learner, in steps.
        timed: width of the slots of the proxy that is timed.
        rounds: how many times it is.
        at_claimed_size: whether the configuration itself is run.
        claimed: the ratio that is asked for; another one than the claim's for another mixture.
    """

    mixture: Mixture = problems.FLOW
    widths: tuple[int, int] = (4, 8)
    blocks: tuple[int, ...] = (1, 64)
    warm: int = 64
    steps: int = 16
    window: int = 48
    timed: int = 8
    rounds: int = 2
    at_claimed_size: bool = False
    claimed: float = CLAIMED

    def lengths(self, block: int) -> tuple[int, int]:
        """Return the steps before and while counting, in whole blocks."""
        return -(-self.warm // block) * block, -(-self.steps // block) * block

    def narrow(self, width: int) -> Mixture:
        """Return the mixture with slots of another width."""
        return replace(self.mixture, d_model=width)


@dataclass(frozen=True, slots=True)
class Run:
    """One side at the claimed size.

    Attributes:
        macs: multiply-adds per step.
        seconds: per step.
        products: the same in units of a fixed matrix product, timed before and after.
        held: the bytes that the learner holds.
    """

    macs: float
    seconds: float
    products: float
    held: int


@dataclass(kw_only=True)
class Counts(Measurements):
    """Rows of full RTRL at small sizes; block → multiply-adds per step of the proxies; seconds by side of the timed
    proxy; H²·P; P; the share of the parameters that is active per step; the sides at the claimed size."""

    config: Config
    calibration: list[list[Cell]]
    macs: dict[int, tuple[float, float]]
    seconds: dict[str, list[float]]
    formula: int
    parameters: int
    share: float
    at_size: dict[str, Run] = field(default_factory=dict)

    @property
    def extrapolated(self) -> dict[int, float]:
        """Block → multiply-adds per step extrapolated to the claimed size."""
        return {b: extrapolate(self.config.widths, macs, self.config.mixture.d_model) for b, macs in self.macs.items()}

    @property
    def ratios(self) -> dict[int, float]:
        """Block → H²·P over the multiply-adds: those counted at the claimed size, or else the extrapolated ones."""
        counted = {b: self.at_size[f"block {b}"].macs for b in self.macs if f"block {b}" in self.at_size}
        return {block: self.formula / macs for block, macs in {**self.extrapolated, **counted}.items()}

    @property
    def clock(self) -> dict[str, float]:
        """Side → time of full RTRL over its own, at the claimed size."""
        full = self.at_size.get("full")
        return {} if full is None else {n: full.products / r.products for n, r in self.at_size.items() if n != "full"}


def extrapolate(widths: tuple[int, int], macs: tuple[float, float], to: int) -> float:
    """Return ``a·d⁴ + b·d³`` through two points, at another d."""
    a, b = torch.linalg.solve(
        torch.tensor([[float(d) ** 4, float(d) ** 3] for d in widths], dtype=torch.float64),
        torch.tensor(macs, dtype=torch.float64),
    ).tolist()
    return float(a * to**4 + b * to**3)


def verdict(m: Counts) -> Judgement:
    """Judge the ratios; extrapolated ones are no measurement of the claim."""
    found = judge(m.ratios, m.share, m.config.claimed)
    if m.at_size:
        return found
    more = f": {found.condition}" if found.condition else ""
    return Judgement.not_at_claimed_size(f"extrapolated from slots of {m.config.widths}, it {found.name}{more}")


def judge(ratios: dict[int, float], share: float, claimed: float = CLAIMED) -> Judgement:
    """Judge the ratio at each block; ``share`` of the parameters is active per step."""
    reached = [block for block, value in sorted(ratios.items()) if value >= claimed]
    sparsity = f"sparsity alone (block 1) gives {times(ratios[min(ratios)])}"
    active = f"{share:.1%} of the parameters are active, the experts' 3.1 %"
    if reached and reached[0] == min(ratios):
        return Judgement.holds()
    if reached:
        return Judgement.holds_when(f"steps are processed in blocks of {reached[0]} or more; {sparsity}; {active}")
    best = max(ratios, key=lambda block: ratios[block])
    longest = ", the longest tried" if best == max(ratios) else ""
    return Judgement.does_not_hold(f"{times(ratios[best])} in blocks of {best}{longest}; {sparsity}; {active}")


def show(m: Counts) -> Shown:
    """Show the claimed size if it was run, the calibration, the counts on proxies and extrapolated, and times."""
    config, ratios, d_model, predicted, clock = m.config, m.ratios, m.config.mixture.d_model, m.extrapolated, m.clock
    best, block = max(ratios, key=lambda block: ratios[block]), max(config.blocks)
    small = {name: median_ratio(m.seconds["full"], values) for name, values in m.seconds.items() if name != "full"}
    columns = ["block", *(f"d_model {width}" for width in config.widths), f"extrapolated to d_model {d_model}"]
    rows = [[b, *macs, predicted[b], m.formula / predicted[b]] for b, macs in m.macs.items()]
    times_ = [[name, value, small.get(name)] for name, value in medians(m.seconds).items()]
    size: list[list[Cell]] = []
    for name, run in m.at_size.items():
        foretold = predicted.get(int(name.split()[1])) if " " in name else m.formula
        off = None if foretold is None else foretold / run.macs - 1
        size.append([name, run.macs, m.formula / run.macs, off, run.seconds, run.products, clock.get(name), run.held])
    headings = [
        "side", "multiply-adds per step", "H²·P over them", "prediction over it − 1", "s per step",
        "in matrix products", "full over it, by the clock", "bytes held",
    ]  # fmt: skip
    how = f"counted at config {config.mixture.name}" if m.at_size else f"extrapolated to config {config.mixture.name}"
    timed = ", ".join(f"{times(value)} by the clock ({name})" for name, value in clock.items())
    model = f"config {config.mixture.name}, H = {config.mixture.hidden}, P = {m.parameters:,}, one seed"
    return Shown(
        f"{times(ratios[best])} fewer multiply-adds than H²·P in blocks of {best}, {times(ratios[min(ratios)])} step "
        f"by step ({how}); "
        + (timed or f"timed at d_model {config.timed}: {times(small[f'block {block}'])} by the clock"),
        [
            *([Table(f"Run at the claimed size: {model}, float32, one thread", headings, size)] if size else []),
            Table(
                "Full RTRL counted, and H²·P", ["d_model", "experts", "H²·P", "counted", "counted / H²·P"],
                m.calibration,
            ),
            Table("Multiply-adds per step of BlockRTRL, on proxies and extrapolated", [*columns, "H²·P over it"], rows),
            Table(f"Seconds per step at d_model {config.timed}, in turns", ["side", "s", "full over it"], times_),
        ],
        [_over_the_state(m)],
        model=model,
    )  # fmt: skip


def _over_the_state(m: Counts) -> Plot:
    """Plot multiply-adds per step over H: counted and extrapolated, beside H²·P."""
    config, flow = m.config, m.config.mixture
    states = [config.narrow(width).hidden for width in config.widths]
    counted: dict[str, dict[int, float]] = {}
    for b, macs in m.macs.items():
        here = {flow.hidden: m.at_size[f"block {b}"].macs} if f"block {b}" in m.at_size else {}
        counted[f"block {b}, counted"] = {**dict(zip(states, macs, strict=True)), **here}
    predicted: Columns = {
        **{f"block {b}, extrapolated": {states[-1]: m.macs[b][-1], flow.hidden: m.extrapolated[b]} for b in m.macs},
        "H²·P": {
            mixture.hidden: mixture.hidden**2 * problem(mixture, 1, 0).parameters
            for mixture in (*(config.narrow(width) for width in config.widths), flow)
        },
    }
    title = f"Multiply-adds per step over the state, {flow.n_experts} experts"
    return plot(title, "H", "multiply-adds", {**counted, **predicted}, dashed=predicted, log="xy")


@claim(
    "per-step",
    claimed="2000 × cheaper per step than full RTRL (H²·P) at 3 % active parameters",
    threshold="≥ 2000 ×",
    quick=Config(),
    full=Config(blocks=(1, 256), at_claimed_size=True),
    verdict=verdict,
    show=show,
    void="gradients or counts are wrong, so the results are void",
    small=Config(Mixture("small", 2, 2, 8, 4, 6), (2, 4), (1, 4), 8, 4, 8, 4, 1, True, 3.5),
    noticed_breaks=("ignore-experts", "ignore-writes", "linearize-twice", "truncate", "forget-dormant-losses"),
)
def measure(config: Config, settings: Settings) -> Counts:
    """Count full RTRL at small sizes and ``BlockRTRL`` on proxies, time a proxy, and run the claimed size."""
    failures: list[str] = []
    settings.progress("full RTRL at small sizes")
    calibration: list[list[Cell]] = []
    for width, experts in ((4, 8), (8, 8)):
        small = replace(config.narrow(width), n_experts=experts)
        full = LearnerRun(problem(small, 3, settings.seed), problems.DECLARE_NOTHING, block=1)
        full.advance(2)
        macs = count_macs(partial(full.advance, 1))
        formula = small.hidden**2 * full.problem.parameters
        calibration.append([width, experts, formula, macs, macs / formula])
        if not 1 <= macs / formula <= 1.5:
            failures.append(f"full RTRL took {macs} multiply-adds, H²·P is {formula}")

    longest = max(sum(config.lengths(block)) for block in config.blocks)
    flow = problem(config.mixture, longest, settings.seed)
    used = flow.cell(flow.xs[0], flow.cell.init_state(1))[2].active
    active = sum(
        p.numel() // p.shape[0] * used[n].shape[1] if n in used else p.numel() for n, p in flow.cell.named_parameters()
    )
    counts = {}
    for block in config.blocks:
        found = []
        for width in config.widths:
            settings.progress(f"blocks of {block}, slots of {width}")
            found.append(_count(config.narrow(width), block, _choices(flow, config.warm), config, settings.seed))
        counts[block] = found[0][0], found[1][0]
        failures += [line for _, lines in found for line in lines]

    settings.progress("timing")
    block = max(config.blocks)
    stream = problem(config.narrow(config.timed), block, settings.seed)
    runs = {
        "full": LearnerRun(stream, problems.DECLARE_NOTHING, block=1),
        "block 1": LearnerRun(stream, block=1, window=config.window),
        f"block {block}": LearnerRun(stream, block=block, window=2),
    }
    steps = {name: 1 if name == "full" else max(8, run.learner.block) for name, run in runs.items()}
    seconds = alternate({name: partial(run.advance, steps[name]) for name, run in runs.items()}, config.rounds)
    del runs
    m = Counts(
        config=config, calibration=calibration, macs=counts, seconds=seconds, failures=failures,
        formula=config.mixture.hidden**2 * flow.parameters, parameters=flow.parameters,
        share=active / flow.parameters,
    )  # fmt: skip
    if config.at_claimed_size:
        _run_claimed_size(m, flow, settings)
    return m


def _choices(flow: Problem, warm: int) -> list[Sparsity]:
    """Return choices that make every expert and slot active within the first ``warm`` steps if there are as many, and
    are the cell's own from then on."""
    cell, near = flow.cell, torch.arange(2)[None]
    forced = [cell.choices((t + near) % cell.n_slots, (t + near) % cell.n_slots, (t + near) % cell.n_experts)
              for t in range(warm)]  # fmt: skip
    return [*forced, *(cell.choices(*chosen) for chosen in routing(flow)[warm:])]


def _count(mixture: Mixture, block: int, replays: list[Sparsity], config: Config, seed: int) -> tuple[float, list[str]]:
    """Return the multiply-adds per step, and what was wrong with the gradients."""
    warm, steps = config.lengths(block)
    stream = problem(mixture, warm + steps, seed, torch.float64)
    run = LearnerRun(stream, block=block, window=max(2, config.window // block), replays=replays)
    _advance(run, warm)
    macs = count_macs(partial(_advance, run, steps)) / steps
    return macs, _check(run, stream, replays, f"d_model {mixture.d_model}, block {block}")


def _advance(run: LearnerRun, steps: int) -> None:
    run.advance(steps)
    run.sync()


def _check(run: LearnerRun, stream: Problem, replays: list[Sparsity], what: str) -> list[str]:
    """Compare the gradients of a run over the whole stream with those of backpropagation through time."""
    h, total = stream.cell.init_state(1), stream.xs.new_zeros(())
    for t, (x, replay) in enumerate(zip(stream.xs, replays, strict=False)):
        y, h, _ = stream.cell(x, h, replay)
        total = total + stream.loss(t, y)
    names = dict(stream.cell.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(total, list(names.values())), strict=True))
    tolerance = problems.EXACT if stream.xs.dtype == torch.float64 else ROUGH
    return check_gradients(run.gradients(), expected, what, tolerance)[1]


def _run_claimed_size(m: Counts, flow: Problem, settings: Settings) -> None:
    """Run the configuration itself, one side after the other, and add what they take and what differs."""
    config = m.config
    for block in config.blocks:
        settings.progress(f"config {config.mixture.name}, block {block}")
        warm, steps = config.lengths(block)
        stream, replays = flow.first(warm + steps), _choices(flow, config.warm)
        run = LearnerRun(stream, block=block, window=max(2, config.window // block), replays=replays)
        _advance(run, warm)
        settings.progress(f"config {config.mixture.name}, block {block}, {steps} steps")
        m.at_size[f"block {block}"] = _timed(run, partial(_advance, run, steps), steps)
        m.failures += _check(run, stream, replays, f"config {config.mixture.name}, block {block}")
        del run
    settings.progress(f"config {config.mixture.name}, full RTRL")
    run = LearnerRun(flow, problems.DECLARE_NOTHING, block=1)
    run.advance(2)
    m.at_size["full"] = _timed(run, partial(run.advance, 1), 1)
    if not 1 <= m.at_size["full"].macs / m.formula <= 1.5:
        m.failures.append(f"full RTRL took {m.at_size['full'].macs} multiply-adds, H²·P is {m.formula}")


def _timed(run: LearnerRun, work: Callable[[], object], steps: int) -> Run:
    """Count and time some work in one pass, beside a matrix product."""
    first = _product_s()
    began = time.perf_counter()
    macs = count_macs(work)
    seconds = time.perf_counter() - began
    beside = (first + _product_s()) / 2
    return Run(macs / steps, seconds / steps, seconds / steps / beside, run.held_bytes())


def _product_s(size: int = 512) -> float:
    """Return the seconds of a matrix product, the median of five after one that is not counted."""
    a, b, out = torch.ones(size, size), torch.ones(size, 4 * size), torch.empty(size, 4 * size)
    found = alternate({"product": lambda: len(torch.mm(a, b, out=out)) // size}, 5)
    return medians(found)["product"]
