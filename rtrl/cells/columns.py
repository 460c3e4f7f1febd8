"""Independent recurrent units side by side, each of which sees the whole input."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl._utils import validation
from rtrl.cells.protocol import call_cell, first_state
from rtrl.cells.row_groups import groups_of, moved, rows_of
from rtrl.cells.supported import runs_as_written
from rtrl.cells.torch_cells import TorchCell
from rtrl.cells.torch_equations import Weights, gated, mode_of
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

    Attributes:
        units: the units; if all of them are PyTorch's cells as ``from_torch`` makes them, without a readout, one module
            in their place, which holds each weight of all units in one tensor and computes them all at once.

    Raises:
        ConfigError: n is not a positive integer, ``make_unit`` returns the same module again, or something else than a
            cell.
        ShapeError: the units' states are not of the same size.

    Cost:
        That of n units: at once for PyTorch's cells, one after the other for any other unit. A unit's parameters have
        influence on its own state alone.

    Source:
        Javed, Shah, Sutton and White (2023), "Scalable Real-Time Recurrent Learning Using Columnar-Constructive
        Networks", JMLR 24, section 3: columns of LSTM cells with one unit each.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.Columns(lambda: rtrl.from_torch(torch.nn.LSTMCell(3, 1)), n=5)
        >>> y, h = cell(torch.ones(2, 3), cell.init_state(2))
        >>> y.shape, h.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2]))
    """

    def __init__(self, make_unit: Callable[[], nn.Module], n: int) -> None:
        super().__init__()
        units = [make_unit() for _ in range(validation.integer("n", n))]
        if len({id(unit) for unit in units}) != n:
            raise ConfigError("make_unit must return a new module at each call, but it returned one of them again")
        firsts = [first_state(unit, 1) for unit in units]
        if any(first.shape != firsts[0].shape for first in firsts):
            raise ShapeError(f"all units must have states of the same size, got {[tuple(f.shape) for f in firsts]}")
        cells: list[Any] = [unit.cell for unit in units if _is_plain(unit)]
        alike = len(cells) == n and len({(mode_of(cell), cell.input_size, cell.bias) for cell in cells}) == 1
        self.units: Any = _JointUnits(cells) if alike else _SeparateUnits(units, firsts[0].shape[1:])

    def init_state(self, batch_size: int) -> Tensor:
        """Return the units' first states, (batch_size, n, entries)."""
        first: Tensor = self.units.init_state(batch_size)
        return first

    def row_groups(self) -> list[Tensor]:
        """Return the units' groups side by side; see ``rtrl.cells.row_groups``."""
        groups: list[Tensor] = self.units.row_groups()
        return groups

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of all units.

        Raises:
            ConfigError: a unit declares a sparsity.
        """
        after: tuple[Tensor, Tensor] = self.units(x, h)
        return after


class _SeparateUnits(nn.ModuleList):
    """Units of any kind, one after the other; their states are of this shape."""

    def __init__(self, units: Sequence[nn.Module], shape: torch.Size) -> None:
        super().__init__(units)
        self._shape = shape

    def init_state(self, batch_size: int) -> Tensor:
        return torch.stack([first_state(unit, batch_size).flatten(1) for unit in self], dim=1)

    def row_groups(self) -> list[Tensor]:
        units = [moved(groups_of(unit), i * self._shape.numel()) for i, unit in enumerate(self)]
        return [torch.cat([rows for rows in level if rows is not None]) for level in zip_longest(*units)]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for unit, own in zip(self, h.unbind(dim=1), strict=True):
            y, h_next, sparsity = call_cell(unit, x, own.unflatten(1, self._shape), None)
            if sparsity.reads is not None or sparsity.writes is not None or sparsity.active:
                raise ConfigError(f"a unit of Columns declares no sparsity, but {type(unit).__name__} does")
            outputs.append(y)
            states.append(h_next.flatten(1))
        return torch.cat(outputs, dim=-1), torch.stack(states, dim=1)


class _JointUnits(nn.Module):
    """PyTorch's cells of one kind, all at once.

    Attributes:
        weight_ih: (n·G·U, I), the cells' own ones below one another, G being the number of gates and U of a cell's
            units.
        weight_hh: (n, G·U, U).
        bias_ih: (n·G·U,), or None.
        bias_hh: (n, G·U), or None.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(self, cells: Sequence[nn.RNNCellBase]) -> None:
        super().__init__()
        self._mode, self._size = mode_of(cells[0]), cells[0].hidden_size
        with torch.no_grad():
            for name in Weights._fields[:4]:
                own = [getattr(cell, name) for cell in cells]
                joint = None if own[0] is None else (torch.cat if name.endswith("ih") else torch.stack)(own)
                self.register_parameter(name, None if joint is None else nn.Parameter(joint))

    def init_state(self, batch_size: int) -> Tensor:
        parts = 2 if self._mode == "LSTM" else 1
        return self.weight_ih.new_zeros(batch_size, len(self.weight_hh), parts * self._size)

    def row_groups(self) -> list[Tensor]:
        return rows_of(*self.init_state(1).shape[1:])

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.split(h, self._size, dim=-1)
        from_x = F.linear(x, self.weight_ih, self.bias_ih).unflatten(-1, self.weight_hh.shape[:2])
        if self._size == 1:
            from_h = self.weight_hh.squeeze(-1) * state[0]
        else:
            from_h = torch.einsum("bnu,ngu->bng", state[0], self.weight_hh)
        after = gated(self._mode, from_x, from_h if self.bias_hh is None else from_h + self.bias_hh, state)
        return after[0].flatten(1), after[0] if len(after) == 1 else torch.cat(after, dim=-1)


def _is_plain(unit: nn.Module) -> bool:
    """Whether a unit is one of PyTorch's cells as it was written, and nothing else."""
    if not isinstance(unit, TorchCell) or type(unit.readout) is not nn.Identity:
        return False
    modules = (unit, unit.cell, unit.readout)
    return all(map(runs_as_written, modules)) and type(unit.cell) in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
