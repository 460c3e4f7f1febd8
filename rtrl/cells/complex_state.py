"""Cells with a complex state, as cells whose state holds pairs of real numbers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils.real_pairs import as_real, paired
from rtrl.cells.protocol import call_cell, first_state
from rtrl.errors import CellError


class RealState(nn.Module):
    """Make a cell with a real state (B, n, ..., 2) of one with a complex state (B, n, ...). Learners do so themselves.

    Its parameters are those of the cell, under the same names, and so are the rows that a ``Sparsity`` names.

    Equation:
        ``y, s' = cell(x, a + i b)`` with the pairs ``h = (a, b)``; h' has the real and the imaginary part of s'.

    Args:
        cell: the cell.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        for name, in_pairs in (("row_groups", self._row_groups), ("layer_entries", self._layer_entries)):
            if hasattr(cell, name):  # what the cell does not declare, this one does not either
                setattr(self, name, in_pairs)

    def _row_groups(self) -> list[Tensor]:
        """The groups that the cell declares, each entry replaced by its pair."""
        return [_pairs_of(rows) for rows in self.cell.row_groups()]  # type: ignore[operator]

    def _layer_entries(self) -> dict[str, Tensor]:
        """The entries of the layers that the cell declares, each replaced by its pair."""
        return {name: _pairs_of(own) for name, own in self.cell.layer_entries().items()}  # type: ignore[operator]

    def init_state(self, batch_size: int) -> Tensor:
        """Return the pairs of the cell's first state."""
        return as_real(first_state(self.cell, batch_size))

    def forward(self, x: Any, h: Tensor, **choices: Any) -> tuple[Any, ...]:
        """Take one step of the cell, with the choices that it is given if it takes any.

        Raises:
            CellError: the next state is not complex.
        """
        state = torch.complex(h[..., 0], h[..., 1])
        y, h_next, sparsity = call_cell(self.cell, x, state, next(iter(choices.values()), None))
        if not h_next.is_complex():
            raise CellError(
                f"the cell turned a state of {state.dtype} into one of {h_next.dtype}; a state must keep it"
            )
        return y, paired(h_next), sparsity

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the cell under its own names.

        Args:
            prefix: as for ``torch.nn.Module.named_parameters``.
            recurse: likewise.
            remove_duplicate: likewise.
        """
        return self.cell.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers of the cell under its own names.

        Args:
            prefix: as for ``torch.nn.Module.named_buffers``.
            recurse: likewise.
            remove_duplicate: likewise.
        """
        return self.cell.named_buffers(prefix, recurse, remove_duplicate)


def _pairs_of(entries: Tensor) -> Tensor:
    """Flat entries (..., n) of a complex state → those of its pairs (..., 2n)."""
    return torch.stack([2 * entries, 2 * entries + 1], dim=-1).flatten(-2)
