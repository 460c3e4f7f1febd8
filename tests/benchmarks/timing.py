"""Side by side: the sides of a comparison take turns in one process, so that whatever else the machine does meets all.

Times scatter by a factor of two on a busy machine; the ratio of two neighbours in one round does not. What is reported
is the median over the rounds of such ratios.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Side = Callable[[], int]
"""Does some work, and returns how many units of it: steps, or multiply-adds."""


def alternate(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds a unit of every side, round by round, after a round that is not counted; the order turns every time."""
    order = list(sides)
    for name in order:
        sides[name]()
    times: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            units = sides[name]()
            times[name].append((time.perf_counter() - start) / units)
        order.reverse()
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}
