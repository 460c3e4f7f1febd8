"""Which entries of the state depend on which, for cells that declare it by a method ``row_groups()``.

A cell may return from ``row_groups()`` a list of groups, each a LongTensor (rows, width) of flat entries of one
sample's state. A row of a group depends on itself and on all rows of the groups before it, at every point; every entry
is in exactly one row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtrl.cells.protocol import first_state


def rows_of(n: int, width: int) -> list[Tensor]:
    """Return the one group of n independent rows of a state (B, n, ...) with ``width`` entries per row."""
    return [torch.arange(n * width).view(n, width)]


def groups_of(cell: nn.Module) -> list[Tensor]:
    """Return what a cell declares, or one row of all entries if it declares nothing."""
    declared: Any = getattr(cell, "row_groups", None)
    if declared is not None:
        groups: list[Tensor] = declared()
        return groups
    return rows_of(1, first_state(cell, 1).numel())


def moved(groups: Sequence[Tensor], offset: int) -> list[Tensor]:
    """Return groups whose entries are counted from ``offset`` on."""
    return [rows + offset for rows in groups]
