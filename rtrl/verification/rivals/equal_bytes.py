"""How far truncated backpropagation sees with the bytes that another learner holds."""

from torch import Tensor, nn

from rtrl.learners import TBPTT, Learner


def held(learner: Learner) -> int:
    """Return the bytes that a learner holds now."""
    return sum(learner.retained_bytes().values())


def bytes_of_horizon(cell: nn.Module, x: Tensor, horizon: int) -> int:
    """Return the most bytes that truncated BPTT with a sliding window holds between two steps, its window being full.

    Args:
        cell: the cell.
        x: an input (B, ...).
        horizon: the number of steps of the window.
    """
    learner = TBPTT(cell, len(x), horizon)
    most = 0
    for _ in range(horizon + 3):
        learner.step(x)
        most = max(most, held(learner))
    return most


def horizon_within(budget: int, cell: nn.Module, x: Tensor) -> int:
    """Return the longest horizon, at least 1, with which truncated BPTT holds at most ``budget`` bytes.

    Args:
        budget: the bytes.
        cell: the cell.
        x: an input (B, ...).
    """
    two = bytes_of_horizon(cell, x, 2)
    per_step = bytes_of_horizon(cell, x, 3) - two
    horizon = int(max(1, (budget - two) // per_step + 2))
    while horizon > 1 and bytes_of_horizon(cell, x, horizon) > budget:
        horizon -= 1
    return horizon
