"""What BPTT, truncated BPTT and full RTRL cost: short runs of ``rtrl.learners``, extrapolated.

Measured on the real learners: runs of at most ``WHOLE`` steps as a whole; of longer ones, two short runs. From these,
with T steps and a horizon of k:

    BPTT                  multiply-adds and bytes are linear in T
    TBPTT, sliding        a step's multiply-adds are linear in the steps of its window, at most k; bytes in k
    TBPTT, in chunks      a chunk's multiply-adds are linear in its steps; bytes in k
    DenseRTRL             multiply-adds are linear in T; bytes do not depend on it

The peak of a long backward pass is the graph of all its steps; that of a short one may be the gradient. So beside the
line through the short runs there is one for the graph, whose bytes a step are measured, too; the higher one counts.
"""

from collections.abc import Callable
from functools import partial

from rtrl.costs.profile import Profile, Run
from rtrl.costs.result import Choice
from rtrl.learners import BPTT, TBPTT, DenseRTRL

WHOLE = 12
"""Runs of at most this number of steps are measured as a whole."""

SHORT = (2, 4)
"""Numbers of steps, or horizons, that are measured of longer runs."""

MOST_ROWS = 64
"""DenseRTRL is measured up to this number of rows of Jacobians a step."""


def line(first: tuple[int, float], second: tuple[int, float]) -> Callable[[int], int]:
    """The line through two points."""
    (x1, y1), (x2, y2) = first, second
    return lambda x: round(y2 + (x - x2) * (y2 - y1) / (x2 - x1))


def lines(first: tuple[int, dict[str, int]], second: tuple[int, dict[str, int]], at: int) -> dict[str, int]:
    """Part by part, the line through two points, at a third; nothing falls below 0."""
    return {name: max(0, line((first[0], first[1][name]), (second[0], size))(at)) for name, size in second[1].items()}


def largest(held: list[dict[str, int]]) -> dict[str, int]:
    """The moment at which most bytes are held."""
    return max(held, key=lambda parts: sum(parts.values()))


def bptt(profile: Profile, steps: int) -> Choice:
    """``BPTT``: what it holds and what it needs at its peak grow with the number of steps."""
    if steps <= WHOLE:
        run = profile.run(BPTT, steps)
        return Choice(
            "BPTT", True, run.macs[-1], steps, largest(run.held), max(run.peaks), estimated=not profile.steady
        )
    one, two = (profile.run(BPTT, n) for n in SHORT)
    macs = line((SHORT[0], one.macs[-1]), (SHORT[1], two.macs[-1]))(steps)
    held = lines((SHORT[0], largest(one.held)), (SHORT[1], largest(two.held)), steps)
    peak = _peak(profile, two, held, steps, steps)
    return Choice("BPTT", True, macs, steps, held, peak, estimated=not profile.steady)


def tbptt(profile: Profile, steps: int, horizon: int, sliding: bool) -> Choice:
    """``TBPTT``: exact if the run is no longer than its horizon; else its gradient is another one."""
    choice = partial(
        Choice, "TBPTT", horizon >= steps, steps=steps, horizon=horizon, sliding=sliding, estimated=not profile.steady
    )
    if steps <= WHOLE:
        run = profile.run(TBPTT, steps, horizon=horizon, sliding=sliding)
        return choice(run.macs[-1], held=largest(run.held), peak_bytes=max(run.peaks))
    k = min(horizon, steps)
    runs = [profile.run(TBPTT, 2 * n + 2, horizon=n, sliding=sliding) for n in SHORT]
    forward = forward_macs(profile)
    if sliding:
        macs = runs[1].macs
        window = line((2, macs[2] - macs[1]), (4, macs[4] - macs[3]))  # a step that ends with a loss on 2 steps, on 4
        filling = sum(window(i) for i in range(2, k))
        total = macs[1] + filling + (steps - max(k, 2)) * window(k) + window(k) - forward
        if k == 1:
            total = macs[0] + steps * (macs[1] - macs[0]) - forward
    else:
        start = profile.run(BPTT, 1).macs[0] - forward
        chunks, rest = divmod(steps, k)
        total = start + steps * forward
        for count, length in ((chunks, k), (1, rest)):
            total += count * (bptt(profile, length).macs - length * forward - start) if length else 0
    kept = min(steps, k + 1)
    held = lines((SHORT[0] + 1, largest(runs[0].held)), (SHORT[1] + 1, largest(runs[1].held)), kept)
    run = runs[1] if k > 1 else profile.run(TBPTT, 4, horizon=1, sliding=sliding)
    return choice(total, held=held, peak_bytes=_peak(profile, run, held, 1 if sliding else kept, k))


def dense_rtrl(profile: Profile, steps: int) -> Choice:
    """``DenseRTRL``, textbook RTRL: what it holds does not grow with the number of steps.

    Where a step is too large to be measured, a step and sample with P parameters and a state of H are taken to cost
    ``H·H·P + H·P`` multiply-adds for the influence, and H + 1 backward passes, as measured on BPTT; the influence, H·P
    numbers, is there four times at the peak.
    """
    choice = partial(Choice, "DenseRTRL", True, steps=steps)
    size, full = profile.batch_size, profile.state_size
    if size * full <= MOST_ROWS and not profile.frozen:
        few = min(steps, 2)
        run = profile.run(DenseRTRL, few)
        macs = run.macs[-1] + (steps - few) * (run.macs[1] - run.macs[0])
        return choice(macs, held=largest(run.held), peak_bytes=max(run.peaks), estimated=not profile.steady)
    row = full * profile.parameter_size
    forward, backward = forward_macs(profile), backward_macs(profile)
    macs = (steps + 1) * forward + steps * (size * (full + 1) * row + forward + (full + 1) * backward)
    influence = size * row * profile.itemsize
    held = {**bptt(profile, 1).held, "influence": influence}
    held["gradient"] = profile.parameter_bytes * (steps > 1)
    working = 3 * influence + size * full * full * profile.itemsize + profile.copy_bytes + 2 * profile.parameter_bytes
    return choice(macs, held=held, peak_bytes=sum(held.values()) + working, computed=True, estimated=not profile.steady)


def forward_macs(profile: Profile) -> int:
    """Multiply-adds of a step forward."""
    macs = profile.run(BPTT, 2).macs
    return macs[1] - macs[0]


def backward_macs(profile: Profile, part: bool = False) -> int:
    """Multiply-adds of a step backward, within a long run of BPTT; ``part``: without the parameters that are too large
    to be measured."""
    one, two = (profile.run(BPTT, n, part=part).macs[-1] for n in SHORT)
    return (two - one) // (SHORT[1] - SHORT[0]) - 2 * forward_macs(profile)


def large_macs(profile: Profile) -> tuple[int, int]:
    """Multiply-adds of a step backward in the parameters that are too large to be measured, and in the others."""
    others = backward_macs(profile, part=True)
    return backward_macs(profile) - others, others


def _peak(profile: Profile, run: Run, held: dict[str, int], losses: int, steps: int) -> int:
    """Bytes at the peak of a backward pass through ``steps`` steps, with losses at this number of steps.

    Either what a short run has beside what it holds, and no more than that and what the graph grows by; or the graph, a
    copy of the parameters, the gradient, and of its largest part a step's share and the sum with that. A step keeps its
    loss's gradient at y twice.
    """
    states = profile.state_size * profile.batch_size * profile.itemsize
    one, two = (sum(parts.values()) for parts in profile.run(BPTT, 2).held[:2])
    outputs = two - 2 * one + states
    graph = line(*((n, profile.graph_bytes(n, losses > 1)) for n in (1, 3)))
    short, longer = max(run.peaks) - sum(largest(run.held).values()), graph(steps) - graph(min(steps, SHORT[1]))
    longer += max(0, losses - SHORT[1]) * outputs
    gradient = profile.parameter_bytes + 2 * (steps > 1) * max(profile.sizes.values()) * profile.itemsize
    at_once = losses * outputs + profile.copy_bytes + gradient + graph(steps)
    return sum(held.values()) + max(short, min(at_once, short + longer))
