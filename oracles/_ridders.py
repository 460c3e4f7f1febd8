"""The derivative of a function of one number, the step chosen by its own error estimate."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

EPS = sys.float_info.epsilon


def ridders(along: Callable[[float], float], first: float, halvings: int = 10) -> tuple[float, float]:
    """Ridders: f'(0) by Richardson extrapolation of halved steps, the entry of least estimated error being taken.

    No early stop on a bad row: a selection that flips within the larger steps spoils only the entries that use them.
    """
    best, error = math.nan, math.inf
    previous: list[float] = []
    for i in range(halvings):
        h = first / 2**i
        up, down = along(h), along(-h)
        noise = 4 * EPS * (abs(up) + abs(down)) / h  # rounding of the two passes, which extrapolation does not remove
        row = [(up - down) / (2 * h)]
        for j in range(1, i + 1):
            row.append(row[j - 1] + (row[j - 1] - previous[j - 1]) / (4**j - 1))
            estimate = max(abs(row[j] - row[j - 1]), abs(row[j] - previous[j - 1])) + noise
            if estimate < error:
                best, error = row[j], estimate
        if error < 2 * noise:  # smaller steps only round more
            break
        previous = row
    return best, error
