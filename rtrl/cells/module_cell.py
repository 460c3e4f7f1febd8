"""Any module whose state is a tree of tensors, as a cell."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rtrl._utils import pytrees
from rtrl.cells.packing import PackedCell, Packing
from rtrl.cells.protocol import Sparsity
from rtrl.errors import CellError, SparsityError

_PREFIX = "cell."


class ModuleCell(PackedCell):
    """A module whose state is a tree of tensors, as a cell with the state (B, N). Made by ``from_torch``, which says
    what the arguments are.

    Equation: ``y, s' = cell(x, unpack(h))``, ``h' = pack(s')``; the output is ``readout(y)``.

    Shapes: each leaf of the tree (B, ...); N is the number of their entries a sample. dtype and device are those of
    the parameters.
    """

    def __init__(self, cell: nn.Module, readout: nn.Module, state: Any) -> None:
        super().__init__(cell, readout)
        if state is not None and not callable(state):
            Packing(state)  # refuses what is no state of one sample before it is repeated
            state = pytrees.map_tensors(lambda leaf: leaf.detach().clone(), state)
        self._state = state
        self._packing = Packing(self._first(1))

    def _first(self, batch_size: int) -> Any:
        """The first state as the module knows it, moved to where its parameters are."""
        if self._state is None:
            tree = self.cell.init_state(batch_size)
        elif callable(self._state):
            tree = self._state(batch_size)
        else:
            tree = pytrees.map_tensors(lambda leaf: leaf.expand(batch_size, *leaf.shape[1:]), self._state)
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        if like is None:
            return tree
        return pytrees.map_tensors(lambda leaf: leaf.to(like) if leaf.is_floating_point() else leaf, tree)

    def forward(self, x: Any, h: Tensor) -> tuple[Any, Tensor] | tuple[Any, Tensor, Sparsity]:
        """One step: x and the state (B, N) → y, the next state, and what is active, if the module says so."""
        return self._packed(h, self.cell(x, self.unpack(h)))

    def _packed(self, h: Tensor, out: Any) -> tuple[Any, Tensor] | tuple[Any, Tensor, Sparsity]:
        kind = type(self.cell).__name__
        if not isinstance(out, tuple) or len(out) not in (2, 3):
            found = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
            raise CellError(f"{kind} must return (y, next_state) or (y, next_state, Sparsity), got {found}")
        h_next = self._packing.pack(out[1], h.shape[0], CellError, like=h)
        y = self.readout(out[0])
        if len(out) == 2:
            return y, h_next
        declared = out[2]
        if not isinstance(declared, Sparsity) or not isinstance(declared.active, Mapping):
            raise SparsityError(f"the third item of what {kind} returns must be rtrl.Sparsity with a mapping as active")
        if declared.reads is not None or declared.writes is not None:
            raise SparsityError(
                f"{kind} declares reads or writes, but a packed state has no rows of its own; declare active alone, "
                "or keep the state in one tensor (B, n, ...), which needs no from_torch"
            )
        return y, h_next, Sparsity(active={_PREFIX + name: index for name, index in declared.active.items()})


class ReplayingModuleCell(ModuleCell):
    """A ``ModuleCell`` whose module takes ``replay=``: it is given the ``active`` slices that it is to use."""

    def forward(
        self, x: Any, h: Tensor, replay: Sparsity | None = None
    ) -> tuple[Any, Tensor] | tuple[Any, Tensor, Sparsity]:
        """One step, with the choices of ``replay`` if it is given."""
        if replay is None:
            return super().forward(x, h)
        active = {n.removeprefix(_PREFIX): index for n, index in replay.active.items() if n.startswith(_PREFIX)}
        return self._packed(h, self.cell(x, self.unpack(h), replay=Sparsity(active=active)))
