"""Layers of cells as one cell, so that the gradient through all layers is exact."""

import inspect
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtrl.cells.protocol import Cell, Sparsity, call_cell, first_state, takes_replay
from rtrl.cells.row_groups import declared_groups, groups_of, moved
from rtrl.cells.supported import check_supported
from rtrl.errors import ConfigError, ShapeError


class _Place(NamedTuple):
    """Where the state of a layer lies: the rows lo … hi − 1 of the stack, each layer row ``entries`` of them, and its
    own form beside the batch."""

    lo: int
    hi: int
    entries: int
    shape: torch.Size


class Stack(nn.Module):
    """Stack cells in layers: each layer's y is the next one's x.

    The states of the layers are concatenated along dimension 1. If they differ in a later dimension, each is flattened
    first, to a state (B, entries of all layers).

    Equation:
        ``y_k, h'_k = layer_k(y_{k−1}, h_k)``, or ``y_k = layer_k(y_{k−1})`` for a layer without a state; y_0 = x. The
        state is ``[h_1, …, h_K]``, and the output is the last y.

    Args:
        layers: cells and, between and around them, modules without ``init_state``, such as ``nn.Linear``,
            ``nn.LayerNorm`` or ``nn.Tanh``. y of all but the last layer is a tensor.

    Raises:
        ConfigError: no layer is a cell, or a layer without a state does not take x alone.

    Cost:
        The sum of the layers' costs. The Jacobian of a step has a block for every pair of layers on and below the
        diagonal.

    Example:
        >>> import torch, rtrl
        >>> below = rtrl.RecurrentMoE(3, 8, d_model=4, n_slots=3, n_experts=4, topk=1)
        >>> above = rtrl.RecurrentMoE(8, 2, d_model=4, n_slots=2, n_experts=4, topk=1)
        >>> stack = Stack([below, above])
        >>> y, h, sparsity = stack(torch.ones(5, 3), stack.init_state(5))
        >>> y.shape, h.shape, sparsity.writes.shape
        (torch.Size([5, 2]), torch.Size([5, 5, 4]), torch.Size([5, 4]))
        >>> mixed = Stack([rtrl.cells.MinGRU(3, 8), torch.nn.LayerNorm(8), rtrl.cells.RTU(8, 4), torch.nn.Linear(8, 2)])
        >>> mixed.init_state(5).shape, [rows.shape for rows in mixed.row_groups()]
        (torch.Size([5, 16]), [torch.Size([8, 1]), torch.Size([4, 2])])
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        firsts = {k: first_state(layer, 1) for k, layer in enumerate(layers) if isinstance(layer, Cell)}
        if not firsts:
            raise ConfigError("a Stack needs at least one layer that is a cell, with init_state(batch_size)")
        if len({first.is_complex() for first in firsts.values()}) > 1:
            raise ConfigError(
                "the states of a Stack's layers must be all real or all complex; wrap a complex layer in "
                "rtrl.cells.RealState, which holds pairs of real numbers"
            )
        for k, layer in enumerate(layers):
            if k not in firsts:
                _check_stateless(k, layer)
        self._flat = len({first.shape[2:] for first in firsts.values()}) > 1
        rows = [first[0].numel() if self._flat else first.shape[1] for first in firsts.values()]
        self._places = {
            k: _Place(lo, hi, first[0, 0].numel() if self._flat else 1, first.shape[1:])
            for (k, first), (lo, hi) in zip(firsts.items(), pairwise([0, *accumulate(rows)]), strict=True)
        }
        self._size = sum(rows)

    def init_state(self, batch_size: int) -> Tensor:
        """Return the layers' first states, concatenated along dimension 1."""
        return torch.cat([self._joint(first_state(self.layers[k], batch_size)) for k in self._places], dim=1)

    def row_groups(self) -> list[Tensor] | None:
        """Return the groups of each layer above those of the layers below; None if a layer declares none. See
        ``rtrl.cells.row_groups``."""
        if any(declared_groups(self.layers[k]) is None for k in self._places):
            return None
        groups, offset = [], 0
        for k, place in self._places.items():
            groups += moved(groups_of(self.layers[k]), offset)
            offset += place.shape.numel()
        return groups

    def layer_entries(self) -> dict[str, Tensor]:
        """Return, for each layer with a state, the beginning of its parameters' names and its flat state entries."""
        entries, offset = {}, 0
        for k, place in self._places.items():
            size = place.shape.numel()
            entries[f"layers.{k}."] = torch.arange(offset, offset + size)
            offset += size
        return entries

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        """Take one step of all layers.

        Args:
            x: the input of the first layer.
            h: the states of all layers, concatenated along dimension 1.
            replay: the choices that layers with ``replay`` make; their own choices by default.

        Returns:
            y of the last layer, the next state, and the ``Sparsity`` of all layers.

        Raises:
            ShapeError: h has another number of rows.
        """
        if h.ndim < 2 or h.shape[1] != self._size:
            raise ShapeError(f"h must have {self._size} rows in dimension 1, got shape {tuple(h.shape)}")
        y, states, sparsities = x, [], []
        for k, layer in enumerate(self.layers):
            if k not in self._places:
                y = layer(y)
                continue
            place = self._places[k]
            own = h[:, place.lo : place.hi]
            own = own.unflatten(1, place.shape) if self._flat else own
            choices = self._choices(replay, k) if replay is not None and takes_replay(layer) else None
            y, h_next, sparsity = call_cell(layer, y, own, choices)
            states.append(self._joint(h_next))
            sparsities.append(sparsity)
        return y, torch.cat(states, dim=1), self._joined(sparsities, h) if replay is None else replay

    def _joint(self, state: Tensor) -> Tensor:
        return state.flatten(1) if self._flat else state

    def _choices(self, replay: Sparsity, k: int) -> Sparsity:
        """The choices of layer k, with rows counted from its first one."""
        lo, hi, entries, _ = self._places[k]

        def rows(index: Tensor | None) -> Tensor | None:
            if index is None or not index.shape[0]:
                return index
            places = [i for i, row in enumerate(index[0].tolist()) if lo <= row < hi]  # the same for every sample
            own = index[:, places] - lo
            return own if entries == 1 else own[:, ::entries] // entries

        prefix = f"layers.{k}."
        active = {name.removeprefix(prefix): index for name, index in replay.active.items() if name.startswith(prefix)}
        return Sparsity(rows(replay.reads), rows(replay.writes), active)

    def _joined(self, layers: list[Sparsity], h: Tensor) -> Sparsity:
        named = zip(self._places, layers, strict=True)
        active = {f"layers.{k}.{name}": index for k, layer in named for name, index in layer.active.items()}
        return Sparsity(self._rows([s.reads for s in layers], h), self._rows([s.writes for s in layers], h), active)

    def _rows(self, parts: list[Tensor | None], h: Tensor) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        rows = []
        for part, (lo, hi, entries, _) in zip(parts, self._places.values(), strict=True):
            if part is None:
                rows.append(torch.arange(lo, hi, device=h.device).expand(h.shape[0], -1))
            else:
                within = torch.arange(entries, device=h.device)
                rows.append(lo + (part.unsqueeze(2) * entries + within).flatten(1))
        return torch.cat(rows, dim=1)


def _check_stateless(k: int, layer: Any) -> None:
    """Refuse a layer without a state that does not take x alone."""
    if not isinstance(layer, nn.Module):
        raise ConfigError(f"layer {k} must be a torch.nn.Module, got {type(layer).__name__}")
    check_supported(layer)
    try:
        inspect.signature(layer.forward).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"layer {k}, {type(layer).__name__}, has no init_state(batch_size), and its forward does not take x alone; "
            "a cell needs init_state, any other layer is called as layer(x)"
        ) from error
