"""Layers of cells as one cell, so that the gradient through all layers is exact."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from rtrl.cells.protocol import Sparsity, call_cell, first_state, takes_replay
from rtrl.errors import ConfigError, ShapeError


class Stack(nn.Module):
    """Stack cells in layers: each layer's y is the next one's x.

    The states of the layers are concatenated along dimension 1.

    Equation:
        ``y_k, h'_k = cell_k(y_{k−1}, h_k)``, y_0 = x; the state is ``[h_1, …, h_K]`` and the output y_K.

    Args:
        layers: cells whose states agree in all dimensions but the batch and dimension 1; y of all but the last is a
            tensor.

    Raises:
        ConfigError: there are no layers, or one has no ``init_state``.
        ShapeError: the states do not fit together.

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
        """Return the layers' first states, concatenated along dimension 1."""
        return torch.cat([first_state(layer, batch_size) for layer in self.layers], dim=1)

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
        if h.ndim < 2 or h.shape[1] != self._edges[-1]:
            raise ShapeError(f"h must have {self._edges[-1]} rows in dimension 1, got shape {tuple(h.shape)}")
        y, states, sparsities = x, [], []
        for k, (layer, (lo, hi)) in enumerate(zip(self.layers, pairwise(self._edges), strict=True)):
            choices = self._choices(replay, k, lo, hi) if replay is not None and takes_replay(layer) else None
            y, h_next, sparsity = call_cell(layer, y, h[:, lo:hi], choices)
            states.append(h_next)
            sparsities.append(sparsity)
        return y, torch.cat(states, dim=1), self._joined(sparsities, h) if replay is None else replay

    def _choices(self, replay: Sparsity, k: int, lo: int, hi: int) -> Sparsity:
        """The choices of layer k, with rows counted from its first one."""

        def rows(index: Tensor | None) -> Tensor | None:
            if index is None or not index.shape[0]:
                return index
            places = [i for i, row in enumerate(index[0].tolist()) if lo <= row < hi]  # the same for every sample
            return index[:, places] - lo

        prefix = f"layers.{k}."
        active = {name.removeprefix(prefix): index for name, index in replay.active.items() if name.startswith(prefix)}
        return Sparsity(rows(replay.reads), rows(replay.writes), active)

    def _joined(self, layers: list[Sparsity], h: Tensor) -> Sparsity:
        active = {f"layers.{k}.{name}": index for k, layer in enumerate(layers) for name, index in layer.active.items()}
        return Sparsity(self._rows([s.reads for s in layers], h), self._rows([s.writes for s in layers], h), active)

    def _rows(self, parts: list[Tensor | None], h: Tensor) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        rows = [torch.arange(lo, hi, device=h.device).expand(h.shape[0], -1) for lo, hi in pairwise(self._edges)]
        pairs = zip(parts, rows, strict=True)
        return torch.cat([all_rows if part is None else part + all_rows[:, :1] for part, all_rows in pairs], dim=1)
