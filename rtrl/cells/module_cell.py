"""Any module whose state is a tree of tensors, as a cell with its state packed into one tensor."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import pytrees, validation
from rtrl._utils.real_pairs import as_real, is_continuous, paired, real_numbers
from rtrl.cells.protocol import Sparsity
from rtrl.errors import CellError, ConfigError, RTRLError, ShapeError, SparsityError

_PREFIX = "cell."


class Packing:
    """The layout of a tree of tensors (B, ...) in one tensor (B, N): its leaves side by side, each flattened, complex
    ones as pairs of real numbers.

    Args:
        example: the tree for one sample, each leaf a floating-point or complex tensor (1, ...).

    Raises:
        ConfigError: the tree holds no entry, or a leaf is something else; the message names the leaf.
    """

    def __init__(self, example: Any) -> None:
        named = pytrees.named_leaves("state", example)
        for name, leaf in named.items():
            if not isinstance(leaf, Tensor) or not is_continuous(leaf) or leaf.ndim == 0 or leaf.shape[0] != 1:
                raise ConfigError(
                    "the state of one sample must be a tree of floating-point or complex tensors (1, ...), but "
                    f"{name} is {_form(leaf)}; anything else belongs in x or in the module"
                )
        self.names = list(named)
        self.shapes = [tuple(leaf.shape[1:]) for leaf in named.values()]
        self.complex = [leaf.is_complex() for leaf in named.values()]
        self._edges = [0, *accumulate(real_numbers(leaf) for leaf in named.values())]
        self.size = self._edges[-1]
        if not self.size:
            raise ConfigError("a state must have at least one entry per sample, but this one has none")
        flat, refill = pytrees.flatten(example)
        self._structure = refill(list(range(len(flat))))  # a tree without tensors: it can be copied and pickled

    def pack(self, tree: Any, batch: int, error: type[RTRLError] = ShapeError, *, like: Tensor | None = None) -> Tensor:
        """Return the leaves, found by their names in the tree, as one tensor (batch, N).

        Args:
            tree: of tensors (batch, ...).
            batch: the size of dimension 0 of all leaves.
            error: the type of error to raise.
            like: the tensor whose dtype and device all leaves must have, complex ones the complex dtype of the same
                precision; the first leaf by default.

        Raises:
            error: a leaf is missing or unexpected, or is not a tensor of its shape, dtype and device; it is named.
        """
        named = pytrees.named_leaves("state", tree)
        for name in [*self.names, *named]:
            if name not in named or name not in self.names:
                fault = "lacks" if name in self.names else "has an unexpected"
                raise error(f"the state {fault} {name}; every state must hold {', '.join(self.names)}")
        for name, shape, complex_ in zip(self.names, self.shapes, self.complex, strict=True):
            leaf = named[name]
            if not isinstance(leaf, Tensor) or leaf.shape != (batch, *shape):
                raise error(f"{name} must be a tensor of shape {(batch, *shape)} at every step, got {_form(leaf)}")
            like = as_real(leaf) if like is None else like
            dtype = like.dtype.to_complex() if complex_ else like.dtype
            if leaf.dtype != dtype or leaf.device != like.device:
                raise error(f"{name} must be {dtype} on {like.device}, got {_form(leaf)}")
        leaves = [paired(leaf) if leaf.is_complex() else leaf for leaf in map(named.__getitem__, self.names)]
        pairs = zip(leaves, pairwise(self._edges), strict=True)
        return torch.cat([leaf.reshape(batch, high - low) for leaf, (low, high) in pairs], dim=1)

    def unpack(self, h: Tensor) -> Any:
        """Return the tree whose leaves are parts of h (B, N).

        Raises:
            ShapeError: h has another shape.
        """
        if h.ndim != 2 or h.shape[1] != self.size:
            raise ShapeError(f"a packed state must have shape (B, {self.size}), got {tuple(h.shape)}")
        refill = pytrees.flatten(self._structure)[1]
        forms = zip(self.shapes, self.complex, pairwise(self._edges), strict=True)
        return refill([_leaf(h[:, low:high], shape, complex_) for shape, complex_, (low, high) in forms])


class PackedCell(nn.Module, ABC):
    """The base of cells with a packed state (B, N). ``from_torch`` makes them.

    Args:
        cell: the module that takes the step.
        readout: maps the output of ``cell`` to y.
    """

    cell: Any
    _packing: Packing

    def __init__(self, cell: nn.Module, readout: nn.Module) -> None:
        super().__init__()
        self.cell, self.readout = cell, readout

    @abstractmethod
    def _first(self, batch_size: int) -> Any:
        """The first state, a tree of tensors (B, ...)."""

    def init_state(self, batch_size: int) -> Tensor:
        """Return the first state (batch_size, N).

        Raises:
            ConfigError: ``batch_size`` is not a positive integer.
            CellError: for this batch, the module returns a first state of another form.
        """
        validation.integer("batch_size", batch_size)
        return self._packing.pack(self._first(batch_size), batch_size, CellError)

    def unpack(self, h: Tensor) -> Any:
        """Return the tree of tensors (B, ...) of a packed state ``h`` (B, N); its leaves are views of h where possible.

        Raises:
            ShapeError: h has another shape.
        """
        return self._packing.unpack(h)

    def pack(self, state: Any) -> Tensor:
        """Return the packed state (B, N) of a tree of tensors (B, ...), for ``state=`` of a learner or of ``reset``.

        Raises:
            ShapeError: the tree differs from that of the first state; the message names the leaf.
        """
        tensors = pytrees.tensors(state)
        return self._packing.pack(state, tensors[0].shape[0] if tensors and tensors[0].ndim else 1)


class ModuleCell(PackedCell):
    """Make a cell with the state (B, N) of a module whose state is a tree of tensors. ``from_torch`` calls this.

    Each leaf of the tree is (B, ...); N is the number of their entries per sample. dtype and device are those of the
    parameters.

    Equation:
        ``y, s' = cell(x, unpack(h))``, ``h' = pack(s')``; the output is ``readout(y)``.

    Args:
        cell: the module.
        readout: maps the module's y to that of the cell.
        state: the first state, see ``from_torch``.
    """

    def __init__(self, cell: nn.Module, readout: nn.Module, state: Any) -> None:
        super().__init__(cell, readout)
        if state is not None and not callable(state):
            Packing(state)  # checks the state of one sample before it is repeated
            if any(leaf.requires_grad for leaf in pytrees.tensors(state)):
                raise ConfigError(
                    "the state passed requires grad, but it would be copied as a constant; detach it, or pass a "
                    "function (batch_size) -> state of parameters that the module owns"
                )
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
        like = next((p for p in self.parameters() if is_continuous(p)), None)
        if like is None:
            return tree
        device, real = like.device, like.dtype.to_real()

        def beside(leaf: Tensor) -> Tensor:
            if not is_continuous(leaf):
                return leaf
            return leaf.to(device, real.to_complex() if leaf.is_complex() else real)

        return pytrees.map_tensors(beside, tree)

    def forward(self, x: Any, h: Tensor) -> tuple[Any, Tensor] | tuple[Any, Tensor, Sparsity]:
        """Take one step; return ``(y, h_next)``, or ``(y, h_next, Sparsity)`` if the module declares what is active."""
        return self._packed(h, self.cell(x, self.unpack(h)))

    def _packed(self, h: Tensor, out: Any) -> tuple[Any, Tensor] | tuple[Any, Tensor, Sparsity]:
        kind = type(self.cell).__name__
        if not isinstance(out, tuple) or len(out) not in (2, 3):
            got = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
            raise CellError(f"{kind} must return (y, next_state) or (y, next_state, Sparsity), got {got}")
        h_next = self._packing.pack(out[1], h.shape[0], CellError, like=h)
        y = self.readout(out[0])
        if len(out) == 2:
            return y, h_next
        declared = out[2]
        if not isinstance(declared, Sparsity) or not isinstance(declared.active, Mapping):
            raise SparsityError(f"the third item of what {kind} returns must be rtrl.Sparsity with a mapping as active")
        if declared.reads is not None or declared.writes is not None:
            raise SparsityError(
                f"{kind} declares reads or writes, but a packed state has no rows; declare active alone, or keep the "
                "state in one tensor (B, n, ...), which needs no from_torch"
            )
        return y, h_next, Sparsity(active={_PREFIX + name: index for name, index in declared.active.items()})


class ReplayingModuleCell(ModuleCell):
    """A ``ModuleCell`` whose module takes ``replay=``: the ``active`` slices to use."""

    def forward(
        self, x: Any, h: Tensor, replay: Sparsity | None = None
    ) -> tuple[Any, Tensor] | tuple[Any, Tensor, Sparsity]:
        """Take one step, with the choices of ``replay`` if it is given."""
        if replay is None:
            return super().forward(x, h)
        active = {n.removeprefix(_PREFIX): index for n, index in replay.active.items() if n.startswith(_PREFIX)}
        return self._packed(h, self.cell(x, self.unpack(h), replay=Sparsity(active=active)))


def _leaf(entries: Tensor, shape: tuple[int, ...], complex_: bool) -> Tensor:
    """A leaf (B, *shape) of its entries (B, N); those of a complex one are pairs."""
    if not complex_:
        return entries.reshape(len(entries), *shape)
    pairs = entries.reshape(len(entries), *shape, 2)
    return torch.complex(pairs[..., 0], pairs[..., 1])


def _form(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}" if isinstance(leaf, Tensor) else type(leaf).__name__
