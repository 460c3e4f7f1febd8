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
from rtrl.errors import CellError


def rows_of(n: int, width: int) -> list[Tensor]:
    """Return the one group of n independent rows of a state (B, n, ...) with ``width`` entries per row."""
    return [torch.arange(n * width).view(n, width)]


def declared_groups(cell: nn.Module) -> list[Tensor] | None:
    """Return what a cell declares; None if it declares nothing."""
    declare: Any = getattr(cell, "row_groups", None)
    return declare() if callable(declare) else None


def declares_independent_slots(cell: nn.Module, state: Tensor) -> bool:
    """Whether a cell declares the slots of a state (B, n, ...), two or more of them, as the rows of one group."""
    groups = declared_groups(cell)
    if groups is None or len(groups) != 1 or state.shape[1] < 2 or groups[0].shape[:1] != state.shape[1:2]:
        return False
    return torch.equal(groups[0].cpu(), rows_of(state.shape[1], state[0, 0].numel())[0])


def groups_of(cell: nn.Module) -> list[Tensor]:
    """Return what a cell declares, or one row of all entries if it declares nothing."""
    declared = declared_groups(cell)
    return rows_of(1, first_state(cell, 1).numel()) if declared is None else declared


def moved(groups: Sequence[Tensor], offset: int) -> list[Tensor]:
    """Return groups whose entries are counted from ``offset`` on."""
    return [rows + offset for rows in groups]


def check_row_groups(groups: Any, size: int) -> None:
    """Refuse what is not a list of LongTensors (rows, width) in which every flat entry of the state occurs once.

    Args:
        groups: what ``row_groups()`` returned.
        size: the number of entries in one sample's state.

    Raises:
        CellError: it is not; the message says what is wrong and what is expected.
    """
    form = "row_groups() must return a list of LongTensors (rows, width) of flat entries of one sample's state"
    if not isinstance(groups, list | tuple) or not groups:
        raise CellError(f"{form}, got {type(groups).__name__ if groups else 'an empty list'}")
    for k, rows in enumerate(groups):
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 2:
            kind = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise CellError(f"{form}; group {k} is {kind}")
    entries = sorted(entry for rows in groups for entry in rows.flatten().tolist())
    if entries != list(range(size)):
        strange = sorted(
            {e for e in entries if not 0 <= e < size or entries.count(e) > 1} | {*range(size)} - {*entries}
        )
        raise CellError(
            f"row_groups() must name every entry 0 … {size - 1} of the state once; entry {strange[0]} occurs "
            f"{entries.count(strange[0])} times"
        )
