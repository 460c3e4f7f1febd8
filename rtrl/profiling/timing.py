"""Time the sides of a comparison in turns, so that other work on the machine slows all of them alike.

Times scatter by a factor of two on a busy machine; the ratio of two neighbours in one round does not.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def alternate(sides: Mapping[str, Callable[[], int]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Time all sides in turns, after one round that is not counted; the order is reversed after every round.

    Args:
        sides: a call by name; it does some work and returns the number of units of it, such as steps.
        rounds: how many times each side is timed.
        device: the torch device that the sides compute on.

    Returns:
        Seconds per unit of every side, one number per round.

    Example:
        >>> seconds = alternate({"sum": lambda: len([sum(range(100))]), "max": lambda: len([max(range(100))])}, 3)
        >>> {name: len(values) for name, values in seconds.items()}
        {'sum': 3, 'max': 3}
    """
    order = list(sides)
    for name in order:
        sides[name]()
    times: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    for _ in range(rounds):
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            units = sides[name]()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / units)
        order.reverse()
    return times


def synchronize(device: str) -> None:
    """Wait until the device has finished what was launched on it; a CPU has.

    Args:
        device: the torch device.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Compute the median over rounds of ``above / below``, each ratio between neighbours in time.

    Args:
        above: the numerators, one per round.
        below: the denominators, one per round.

    >>> median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    3.0
    """
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Compute the median of every side's times.

    Args:
        times: what ``alternate`` returned.

    >>> medians({"ours": [1.0, 5.0, 2.0]})
    {'ours': 2.0}
    """
    return {name: statistics.median(values) for name, values in times.items()}
