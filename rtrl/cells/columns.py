"""Independent recurrent units side by side, each of which sees the whole input."""

from collections.abc import Callable
from itertools import zip_longest

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.cells.protocol import call_cell, first_state
from rtrl.cells.row_groups import groups_of, moved
from rtrl.errors import ConfigError, ShapeError


class Columns(nn.Module):
    """Build a columnar network: n small recurrent units that see the same x, and nothing of one another.

    Equation:
        ``y_i, h'_i = unit_i(x, h_i)``; the state is (B, n, entries of a unit's state), and the output is
        ``[y_1, …, y_n]``, joined along its last dimension.

    Args:
        make_unit: returns a new unit at each call, a cell whose y is a tensor, such as
            ``lambda: rtrl.from_torch(nn.LSTMCell(d_in, 1))``.
        n: number of units.

    Raises:
        ConfigError: n is not a positive integer, ``make_unit`` returns the same module again, or something else than a
            cell.
        ShapeError: the units' states are not of the same size.

    Cost:
        That of n units, one after the other. A unit's parameters have influence on its own state alone.

    Source:
        Javed, Shah, Sutton and White (2023), "Scalable Real-Time Recurrent Learning Using Columnar-Constructive
        Networks", JMLR 24, section 3: columns of LSTM cells with one unit each.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.Columns(lambda: rtrl.from_torch(torch.nn.LSTMCell(3, 1)), n=5)
        >>> y, h = cell(torch.ones(2, 3), cell.init_state(2))
        >>> y.shape, h.shape
        (torch.Size([2, 10]), torch.Size([2, 5, 2]))
    """

    def __init__(self, make_unit: Callable[[], nn.Module], n: int) -> None:
        super().__init__()
        units = [make_unit() for _ in range(validation.integer("n", n))]
        if len({id(unit) for unit in units}) != n:
            raise ConfigError("make_unit must return a new module at each call, but it returned one of them again")
        self.units = nn.ModuleList(units)
        firsts = [first_state(unit, 1) for unit in units]
        self._shape = firsts[0].shape[1:]
        if any(first.shape != firsts[0].shape for first in firsts):
            raise ShapeError(f"all units must have states of the same size, got {[tuple(f.shape) for f in firsts]}")

    def init_state(self, batch_size: int) -> Tensor:
        """Return the units' first states, (batch_size, n, entries)."""
        return torch.stack([first_state(unit, batch_size).flatten(1) for unit in self.units], dim=1)

    def row_groups(self) -> list[Tensor]:
        """Return the units' groups side by side; see ``rtrl.cells.row_groups``."""
        size = self._shape.numel()
        units = [moved(groups_of(unit), i * size) for i, unit in enumerate(self.units)]
        return [torch.cat([rows for rows in level if rows is not None]) for level in zip_longest(*units)]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of all units.

        Raises:
            ConfigError: a unit declares a sparsity.
        """
        outputs, states = [], []
        for unit, own in zip(self.units, h.unbind(dim=1), strict=True):
            y, h_next, sparsity = call_cell(unit, x, own.unflatten(1, self._shape), None)
            if sparsity.reads is not None or sparsity.writes is not None or sparsity.active:
                raise ConfigError(f"a unit of Columns declares no sparsity, but {type(unit).__name__} does")
            outputs.append(y)
            states.append(h_next.flatten(1))
        return torch.cat(outputs, dim=-1), torch.stack(states, dim=1)
