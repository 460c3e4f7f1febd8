"""Count multiply-adds, fit lines, and format ratios."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rtrl.profiling.macs import MacCounter


def count_macs(work: Callable[[], Any]) -> int:
    """Return the multiply-adds of a call."""
    with MacCounter() as counter:
        work()
    return counter.macs


def fit_line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return (a, b) of the least-squares line ``a + b · size``."""
    xs, ys = (torch.tensor(list(numbers), dtype=torch.float64) for numbers in (sizes, values))
    b = float(((xs - xs.mean()) * (ys - ys.mean())).sum() / (xs - xs.mean()).square().sum())
    return float(ys.mean()) - b * float(xs.mean()), b


def times(number: float) -> str:
    """Format a ratio: "3.1 ×"."""
    return f"{number:,.0f} ×" if number >= 100 else f"{number:.3g} ×"


def percent(value: float) -> str:
    """Format a share: "99.3 %"."""
    return f"{100 * value:.1f} %"
