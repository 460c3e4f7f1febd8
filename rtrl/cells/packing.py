"""States of several tensors, packed into the one tensor that a cell's state is."""

from abc import ABC, abstractmethod
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import pytrees, validation
from rtrl.errors import CellError, ConfigError, RTRLError, ShapeError


class Packing:
    """How a tree of tensors (B, ...) lies in one tensor (B, N): its leaves side by side, each flattened.

    Args:
        one: the tree for one sample, each leaf a floating-point tensor (1, ...).

    Raises:
        ConfigError: the tree holds no entry, or a leaf is something else; the message names the leaf.
    """

    def __init__(self, one: Any) -> None:
        named = pytrees.named_leaves("state", one)
        for name, leaf in named.items():
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim == 0 or leaf.shape[0] != 1:
                raise ConfigError(
                    "the state of one sample must be a tree of floating-point tensors (1, ...), but "
                    f"{name} is {_form(leaf)}; what is no tensor or not floating-point belongs in x or in the module"
                )
        self.names = list(named)
        self.shapes = [tuple(leaf.shape[1:]) for leaf in named.values()]
        self._edges = [0, *accumulate(prod(shape) for shape in self.shapes)]
        self.size = self._edges[-1]
        if not self.size:
            raise ConfigError("a state must have at least one entry a sample, this one has none")
        flat, refill = pytrees.flatten(one)
        self._places = refill(list(range(len(flat))))  # the bare tree: it can be copied and pickled

    def pack(self, tree: Any, batch: int, error: type[RTRLError] = ShapeError, *, like: Tensor | None = None) -> Tensor:
        """The leaves, found by their places in the tree, as one tensor (batch, N).

        Args:
            error: what to raise. like: the tensor whose dtype and device all leaves must have; the first of them by
                default.

        Raises:
            error: a leaf is missing, is one too many, or is no tensor of its shape, dtype and device; it is named.
        """
        named = pytrees.named_leaves("state", tree)
        for name in [*self.names, *named]:
            if name not in named or name not in self.names:
                wrong = "lacks" if name in self.names else "has an unexpected"
                raise error(f"the state {wrong} {name}; every state must hold {', '.join(self.names)}")
        for name, shape in zip(self.names, self.shapes, strict=True):
            leaf = named[name]
            if not isinstance(leaf, Tensor) or leaf.shape != (batch, *shape):
                raise error(f"{name} must be a tensor of shape {(batch, *shape)} at every step, got {_form(leaf)}")
            like = leaf if like is None else like
            if leaf.dtype != like.dtype or leaf.device != like.device:
                raise error(f"{name} must be {like.dtype} on {like.device}, got {_form(leaf)}")
        pairs = zip(self.names, pairwise(self._edges), strict=True)
        return torch.cat([named[name].reshape(batch, high - low) for name, (low, high) in pairs], dim=1)

    def unpack(self, h: Tensor) -> Any:
        """The tree whose leaves are parts of h (B, N).

        Raises:
            ShapeError: h has another shape.
        """
        if h.ndim != 2 or h.shape[1] != self.size:
            raise ShapeError(f"a packed state must have shape (B, {self.size}), got {tuple(h.shape)}")
        refill = pytrees.flatten(self._places)[1]
        pairs = zip(self.shapes, pairwise(self._edges), strict=True)
        return refill([h[:, low:high].reshape(h.shape[0], *shape) for shape, (low, high) in pairs])


class PackedCell(nn.Module, ABC):
    """What cells with a packed state (B, N) share: ``readout`` maps what ``cell`` gives to y. Made by ``from_torch``.

    A subclass says what the first state is (``_first``), as a tree of tensors (B, ...).
    """

    cell: Any
    _packing: Packing

    def __init__(self, cell: nn.Module, readout: nn.Module) -> None:
        super().__init__()
        self.cell, self.readout = cell, readout

    @abstractmethod
    def _first(self, batch_size: int) -> Any:
        """The first state, a tree."""

    def init_state(self, batch_size: int) -> Tensor:
        """The first state (batch_size, N).

        Raises:
            ConfigError: ``batch_size`` is no positive integer. CellError: another batch gives a state of another form.
        """
        validation.integer("batch_size", batch_size)
        return self._packing.pack(self._first(batch_size), batch_size, CellError)

    def unpack(self, h: Tensor) -> Any:
        """A packed state (B, N) → the tree of tensors (B, ...) that it was made of; its leaves are parts of h.

        Raises:
            ShapeError: h has another shape.
        """
        return self._packing.unpack(h)

    def pack(self, state: Any) -> Tensor:
        """A tree of tensors (B, ...) → the packed state (B, N), for ``BlockRTRL(state=...)`` or ``reset(state=...)``.

        Raises:
            ShapeError: the tree is not that of the first state: the message names the leaf.
        """
        tensors = pytrees.tensors(state)
        return self._packing.pack(state, tensors[0].shape[0] if tensors and tensors[0].ndim else 1)


def _form(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}" if isinstance(leaf, Tensor) else type(leaf).__name__
