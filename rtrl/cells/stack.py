"""Layers of cells as one cell, so that the influence between layers is exact too."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from rtrl.cells.protocol import Sparsity, call_cell, first_state, takes_replay
from rtrl.errors import ConfigError, ShapeError


class Stack(nn.Module):
    """Cells in layers: each layer's y is the next one's x, and their states lie one after another along dimension 1.

    Equation: ``y_k, h'_k = cell_k(y_{k−1}, h_k)``, y_0 = x; the state is ``[h_1, …, h_K]`` and the output y_K.

    Args:
        layers: cells whose states agree in all dimensions but the batch and dimension 1, and whose y (the last one's
            excepted) is a tensor.

    Raises:
        ConfigError: no layers, or one without ``init_state``. ShapeError: states that do not fit together.

    Cost: the sum of the layers'. The Jacobian of a step has a block for every pair of layers on and below the diagonal.

    >>> import torch, rtrl
    >>> below = rtrl.RecurrentMoE(3, 8, d_model=4, n_slots=3, n_experts=4, topk=1)
    >>> above = rtrl.RecurrentMoE(8, 2, d_model=4, n_slots=2, n_experts=4, topk=1)
    >>> stack = Stack([below, above])
    >>> y, h, sparsity = stack(torch.ones(5, 3), stack.init_state(5))
    >>> y.shape, h.shape, sparsity.writes.shape
    (torch.Size([5, 2]), torch.Size([5, 5, 4]), torch.Size([5, 4]))
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        if not layers:
            raise ConfigError("a Stack needs at least one layer")
        self.layers = nn.ModuleList(layers)
        firsts = [first_state(layer, 1) for layer in layers]
        if len({tuple(first.shape[2:]) for first in firsts}) != 1:
            raise ShapeError(f"the layers' states must agree after dimension 1, got {[tuple(f.shape) for f in firsts]}")
        self._edges = [0, *accumulate(first.shape[1] for first in firsts)]

    def init_state(self, batch_size: int) -> Tensor:
        """The layers' first states, one after another."""
        return torch.cat([first_state(layer, batch_size) for layer in self.layers], dim=1)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        """One step of all layers; see the class docstring."""
        if h.ndim < 2 or h.shape[1] != self._edges[-1]:
            raise ShapeError(f"h must have {self._edges[-1]} rows in dimension 1, got shape {tuple(h.shape)}")
        y, states, found = x, [], []
        for k, (layer, (low, high)) in enumerate(zip(self.layers, pairwise(self._edges), strict=True)):
            own = self._own(replay, k, low, high) if replay is not None and takes_replay(layer) else None
            y, h_next, sparsity = call_cell(layer, y, h[:, low:high], own)
            states.append(h_next)
            found.append(sparsity)
        return y, torch.cat(states, dim=1), self._joined(found, h) if replay is None else replay

    def _own(self, replay: Sparsity, k: int, low: int, high: int) -> Sparsity:
        """The part of a step's choices that is layer k's, counted from its own first row."""

        def rows(index: Tensor | None) -> Tensor | None:
            if index is None or not index.shape[0]:
                return index
            places = [
                i for i, row in enumerate(index[0].tolist()) if low <= row < high
            ]  # in the same places for every sample
            return index[:, places] - low

        prefix = f"layers.{k}."
        active = {name.removeprefix(prefix): index for name, index in replay.active.items() if name.startswith(prefix)}
        return Sparsity(rows(replay.reads), rows(replay.writes), active)

    def _joined(self, found: list[Sparsity], h: Tensor) -> Sparsity:
        active = {
            f"layers.{k}.{name}": index for k, sparsity in enumerate(found) for name, index in sparsity.active.items()
        }
        return Sparsity(self._rows([s.reads for s in found], h), self._rows([s.writes for s in found], h), active)

    def _rows(self, parts: list[Tensor | None], h: Tensor) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        every = [torch.arange(low, high, device=h.device).expand(h.shape[0], -1) for low, high in pairwise(self._edges)]
        return torch.cat(
            [all_rows if part is None else part + all_rows[:, :1] for part, all_rows in zip(parts, every, strict=True)],
            dim=1,
        )
