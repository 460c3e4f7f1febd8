"""What BPTT, truncated BPTT and full RTRL cost: short runs of ``rtrl.learners``, extrapolated.

With T steps and a horizon of k, multiply-adds and bytes of BPTT are linear in T; those of a window or chunk of
truncated BPTT in its steps; the multiply-adds of ``DenseRTRL`` in T, and its bytes do not depend on it.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from rtrl.costs.profile import Profile, Run
from rtrl.costs.result import Choice
from rtrl.learners import BPTT, TBPTT, DenseRTRL

SHORT = (4, 8, 16)
"""Numbers of steps that are measured of longer runs; shorter runs are measured as a whole."""

SHORT_HORIZONS = (3, 4, 8)
"""Horizons that are measured in place of longer ones."""

MOST_ROWS = 512
"""DenseRTRL is measured up to this number of rows of Jacobians per step."""


def line(first: tuple[int, int], second: tuple[int, int]) -> Callable[[int], int]:
    """Return the line through two points, rounded."""
    (x1, y1), (x2, y2) = first, second
    return lambda x: round(y2 + (x - x2) * (y2 - y1) / (x2 - x1))


def lines(first: tuple[int, dict[str, int]], second: tuple[int, dict[str, int]], at: int) -> dict[str, int]:
    """Return, part by part, the line through two points at a third; nothing falls below 0."""
    return {name: max(0, line((first[0], first[1][name]), (second[0], size))(at)) for name, size in second[1].items()}


def highest(points: list[tuple[int, dict[str, int]]], at: int) -> int:
    """Return the highest peak at a length that is too long to be run, by operation on the line through the longest two
    of three lengths; operations whose peaks grow more slowly there than before are left out."""
    (a, first), (b, second), (c, third) = points
    names = [name for name in third if name in first and name in second]
    lines = {name: (first[name], second[name], third[name]) for name in names}
    steady = [(y, z) for x, y, z in lines.values() if (z - y) / (c - b) >= 0.9 * (y - x) / (b - a)] + [
        (second["any"], third["any"])
    ]
    return max(line((b, y), (c, z))(at) for y, z in steady)


def bptt(profile: Profile, steps: int) -> Choice:
    """Predict ``BPTT``: what it holds and what it needs at its peak grow with the number of steps."""
    lengths = SHORT if steps > SHORT[-1] else (steps,)
    found = [(n, profile.run(BPTT, n)) for n in lengths]
    return _choice("BPTT", True, profile, steps, _along(found, steps), extrapolated=len(found) > 1)


def tbptt(profile: Profile, steps: int, horizon: int, sliding: bool) -> Choice:
    """Predict ``TBPTT``: exact if the run is no longer than its horizon; else its gradient is another one.

    Args:
        profile: of the cell.
        steps: T.
        horizon: k, as for the learner.
        sliding: as for the learner.
    """
    k = min(horizon, steps)
    lengths = SHORT_HORIZONS if k > SHORT_HORIZONS[-1] else (k,)
    chunks, rest = (steps - 1) // k, (steps - 1) % k + 1
    found = []
    for n in lengths:
        ran = min(steps, n + 2) if sliding else min(chunks, 2) * n + min(n, max(1, round(rest * n / k)))
        found.append((n, profile.run(TBPTT, ran, horizon=n, sliding=sliding)))
    macs, held, peak = _along(found, k)
    n, run = found[-1]
    if sliding:
        delivery = run.macs[-1] - run.macs[-2]
        forward = run.macs[-2] - run.macs[-3] - delivery if steps > 2 else 0
        by_window = [second - first for first, second in pairwise(run.macs[:-1])]  # from 1 step on
        if k > n:
            window = line((n // 2, by_window[n // 2 - 1]), (n, by_window[n - 1]))
            by_window = by_window[:n] + [window(i) for i in range(n + 1, k + 1)]
        by_step = [by_window[min(t, k, len(by_window)) - 1] for t in range(1, min(steps, k + 1))]
        macs = run.macs[0] + sum(by_step)
        macs += (steps - 1 - len(by_step)) * by_step[-1] + by_step[-1] - forward if by_step else delivery
    elif chunks > 2:
        by_chunk = [(n, run.macs[2 * n] - run.macs[n]) for n, run in found]
        macs += (chunks - 2) * (line(*by_chunk[-2:])(k) if len(found) > 1 else by_chunk[0][1])
    choice = _choice("TBPTT", horizon >= steps, profile, steps, (macs, held, peak), extrapolated=len(found) > 1)
    return replace(choice, horizon=horizon, sliding=sliding)


def dense_rtrl(profile: Profile, steps: int) -> Choice:
    """Predict ``DenseRTRL``, textbook RTRL: what it holds does not grow with the number of steps.

    Where a step has too many rows of Jacobians to be run, it is run for one sample with a state of H: a step and sample
    take ``H·H·P + H·P`` multiply-adds for the influence, and H + 1 backward passes, as measured on BPTT; the influence,
    H·P numbers, is there four times at the peak.
    """
    size, full = profile.batch_size, profile.state_size
    if size * full <= MOST_ROWS:
        ran = min(steps, 2)
        run = profile.run(DenseRTRL, ran)
        macs = run.macs[-1] + (steps - ran) * (run.macs[1] - run.macs[0])
        return _choice("DenseRTRL", True, profile, steps, (macs, run.most_held, run.peaks["any"]), False)
    row = full * profile.parameter_size
    one, two = (profile.run(BPTT, n) for n in SHORT[-2:])
    forward = two.macs[1] - two.macs[0]
    backward = (two.macs[-1] - one.macs[-1]) // (SHORT[-1] - SHORT[-2]) - 2 * forward
    macs = (steps + 1) * forward + steps * (size * (full + 1) * row + forward + (full + 1) * backward)
    influence, parameters = size * row * profile.itemsize, profile.parameter_size * profile.itemsize
    held = {**one.held[0], "influence": influence, "gradient": parameters * (steps > 1)}
    peak = sum(held.values()) + 3 * influence + size * full * full * profile.itemsize + 3 * parameters
    return _choice("DenseRTRL", True, profile, steps, (macs, held, peak), extrapolated=True)


def _along(found: list[tuple[int, Run]], at: int) -> tuple[int, dict[str, int], int]:
    """Multiply-adds, bytes held and peak bytes of a run, or on the lines through those of the last two runs."""
    n, two = found[-1]
    if len(found) == 1:
        return two.macs[-1], two.most_held, two.peaks["any"]
    m, one = found[-2]
    macs = line((m, one.macs[-1]), (n, two.macs[-1]))(at)
    peak = highest([(n, run.peaks) for n, run in found], at)
    return macs, lines((m, one.most_held), (n, two.most_held), at), peak


def _choice(
    method: str,
    exact: bool,
    profile: Profile,
    steps: int,
    found: tuple[int, dict[str, int], int],
    extrapolated: bool,
) -> Choice:
    macs, held, peak = found
    return Choice(method, exact, macs, steps, held, peak, estimated=not profile.steady, extrapolated=extrapolated)
