"""PyTorch's recurrent cells and layers, and any other modules, as cells of this package."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rtrl._utils import pytrees
from rtrl.cells.analytic import AnalyticStep
from rtrl.cells.module_cell import ModuleCell, PackedCell, Packing, ReplayingModuleCell
from rtrl.cells.protocol import takes_replay
from rtrl.cells.supported import original, runs_as_written
from rtrl.cells.torch_equations import derivatives, mode_of, sequence, step, weights_of
from rtrl.errors import ConfigError

_CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
_LAYERED = (nn.RNN, nn.GRU, nn.LSTM)


class TorchCell(nn.Module):
    """Make a cell of one of PyTorch's, with a readout: ``y = readout(h')``. ``from_torch`` calls this.

    Args:
        cell: used in place.
        readout: maps h' to y.
    """

    def __init__(self, cell: nn.RNNCell | nn.GRUCell | nn.LSTMCell, readout: nn.Module) -> None:
        super().__init__()
        self.cell, self.readout = cell, readout

    def init_state(self, batch_size: int) -> Tensor:
        """Return zeros: (batch_size, H), or (batch_size, 2, H) for the pair (h, c) of an LSTM."""
        parts = (2,) if isinstance(self.cell, nn.LSTMCell) else ()
        return self.cell.weight_hh.new_zeros(batch_size, *parts, self.cell.hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step from x (B, input_size) and the state; return y and the next state."""
        cell: Any = self._modules["cell"]
        readout: Any = self._modules["readout"]
        mode = mode_of(cell)
        before = h.unbind(dim=1) if mode == "LSTM" else (h,)
        after = step(mode, x, before, weights_of(cell)) if runs_as_written(cell) else _called(cell, x, before)
        y = after[0] if _is_identity(readout) else readout(after[0])
        return y, torch.stack(after, dim=1) if mode == "LSTM" else after[0]

    def unroll(self, xs: Tensor, h: Tensor) -> tuple[Any, Tensor] | None:
        """Take m steps by PyTorch's function for a whole sequence, equal to ``forward`` up to rounding.

        Args:
            xs: (m, B, input_size).
            h: (B, H).

        Returns:
            The readout of each step, (m, B, ...), and the states (m, B, H). None for an ``LSTMCell``, whose c PyTorch
            does not return, for a subclass with another ``forward``, and with hooks on a module.
        """
        plain = type(self).forward is TorchCell.forward and runs_as_written(self) and runs_as_written(self.cell)
        mode = mode_of(self.cell)
        if not plain or mode == "LSTM" or not runs_as_written(self.readout):
            return None
        states = sequence(mode, xs, h, weights_of(self.cell))
        if type(self.readout) is nn.Identity:
            return states, states
        y = self.readout(states.flatten(0, 1))
        return pytrees.map_tensors(lambda leaf: leaf.unflatten(0, states.shape[:2]), y), states

    def analytic_step(self, x: Tensor, h: Tensor) -> AnalyticStep | None:
        """Take one step with its derivatives; return None for a subclass with another ``forward``, or with hooks on the
        module."""
        cell: Any = self._modules["cell"]
        readout: Any = self._modules["readout"]
        if type(self).forward is not TorchCell.forward or not runs_as_written(cell):
            return None
        mode = mode_of(cell)
        grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # contexts cost several times as much
            before = h.unbind(dim=1) if mode == "LSTM" else (h,)
            after, taps, direct = derivatives(mode, x, before, weights_of(cell))
            h_next = (torch.stack(after, dim=1) if mode == "LSTM" else after[0]).requires_grad_()
            torch._C._set_grad_enabled(True)
            y = h_next[:, 0] if mode == "LSTM" else h_next
            if not _is_identity(readout):
                y = readout(y)
        finally:
            torch._C._set_grad_enabled(grad)
        return AnalyticStep(y, h_next, taps, direct)


def _is_identity(readout: nn.Module) -> bool:
    """Whether a call of the readout would only cost time."""
    return type(readout) is nn.Identity and runs_as_written(readout)


class TorchLayers(PackedCell):
    """Stack PyTorch's cells in layers, with a readout on the last: layer k's h' is layer k + 1's x.

    ``from_torch`` calls this. The state (B, N) is packed; ``unpack`` returns a tuple with the state of every layer,
    bottom first: h (B, H), or the pair (h, c) of an LSTM.

    Args:
        cell: the layers, used in place.
        readout: maps h' of the last layer to y.
    """

    def __init__(self, cell: nn.ModuleList | nn.RNNBase, readout: nn.Module) -> None:
        super().__init__(cell, readout)
        owners = list(cell) if isinstance(cell, nn.ModuleList) else [cell] * cell.num_layers
        self._modes = [mode_of(owner) for owner in owners]
        self._widths = [_widths(owner) for owner in owners]
        self._packing = Packing(self._first(1))

    def _first(self, batch_size: int) -> Any:
        like = next(self.cell.parameters())
        return tuple(_state([like.new_zeros(batch_size, width) for width in widths]) for widths in self._widths)

    def layer_entries(self) -> dict[str, Tensor]:
        """Return, for each layer, its parameters' names or their beginning, and its flat state entries."""
        entries: dict[str, Tensor] = {}
        listed, start = isinstance(self.cell, nn.ModuleList), 0
        for k, widths in enumerate(self._widths):
            own = torch.arange(start, start := start + sum(widths))
            names = [f"{k}."] if listed else [n for n, _ in self.cell.named_parameters() if n.endswith(f"_l{k}")]
            entries |= {f"cell.{name}": own for name in names}
        return entries

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of all layers from x (B, input_size) and the state (B, N); return y and the next state."""
        listed = isinstance(self.cell, nn.ModuleList)
        befores = [before if isinstance(before, tuple) else (before,) for before in self.unpack(h)]
        if not listed and not runs_as_written(self.cell):
            x, after = _called_in_layers(self.cell, x, befores)
            return self.readout(x), self._packing.pack(after, h.shape[0])
        layers = []
        for k, (mode, before) in enumerate(zip(self._modes, befores, strict=True)):
            if not listed:
                now = step(mode, x, before, weights_of(self.cell, f"_l{k}"))
            elif runs_as_written(self.cell[k]):
                now = step(mode, x, before, weights_of(self.cell[k]))
            else:
                now = _called(self.cell[k], x, before)
            x = now[0]
            layers.append(_state(now))
        return self.readout(x), self._packing.pack(tuple(layers), h.shape[0])


def _called(cell: Any, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The next state by a call of one of PyTorch's cells, with all its hooks, in the form of the state."""
    after = cell(x, state[0] if len(state) == 1 else state)
    return (after,) if len(state) == 1 else after


def _called_in_layers(module: Any, x: Tensor, states: list[tuple[Tensor, ...]]) -> tuple[Tensor, tuple[Any, ...]]:
    """The output and the states of all layers by a call of a layered module, with all its hooks, on one time step."""
    stacked = tuple(torch.stack(parts) for parts in zip(*states, strict=True))
    time = 1 if module.batch_first else 0
    out, after = module(x.unsqueeze(time), stacked[0] if len(stacked) == 1 else stacked)
    parts = (after,) if len(stacked) == 1 else after
    return out.squeeze(time), tuple(_state(layer) for layer in zip(*parts, strict=True))


def _widths(module: Any) -> tuple[int, ...]:
    """The widths of one layer's state: of h, and of c if there is one."""
    h: int = getattr(module, "proj_size", 0) or module.hidden_size
    return (h, module.hidden_size) if mode_of(module) == "LSTM" else (h,)


def _state(tensors: Sequence[Tensor]) -> Any:
    """One layer's state as PyTorch's cells know it: h alone, or the pair (h, c)."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


@overload
def from_torch(cell: nn.RNNCell | nn.GRUCell | nn.LSTMCell, readout: nn.Module | None = None) -> TorchCell: ...  # type: ignore[overload-overlap]
@overload
def from_torch(  # type: ignore[overload-overlap]
    cell: Sequence[nn.Module] | nn.ModuleList | nn.RNN | nn.GRU | nn.LSTM, readout: nn.Module | None = None
) -> TorchLayers: ...
@overload
def from_torch(cell: nn.Module, readout: nn.Module | None = None, *, state: Any = None) -> ModuleCell: ...
def from_torch(cell: Any, readout: nn.Module | None = None, *, state: Any = None) -> TorchCell | PackedCell:
    """Make a cell of a recurrent module of PyTorch, of layers of them, or of a module with a tree of tensors as state.

    The state is (B, H) for one cell, (B, 2, H) for the pair (h, c) of an ``LSTMCell``, and otherwise packed to (B, N),
    N entries per sample; ``unpack(h)`` returns the tree (for layers, the tuple of their states). dtype and device are
    those of the parameters.

    A module with a tree as its state may also return ``(y, s', rtrl.Sparsity(active=...))``, with its own parameter
    names, and take ``replay=`` if it routes. It cannot declare reads or writes, because a packed state has no rows.

    Equation:
        ``nn.RNNCell``, ``nn.GRUCell``, ``nn.LSTMCell``: the module's own equations; ``y = readout(h')``. A module with
        hooks (pruning, the older ``weight_norm``) is called itself; parametrizations may be registered at any time.

        A sequence or ``nn.ModuleList`` of these, which may be mixed: layer k's h' is layer k + 1's x.

        ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``: one time step of all layers; ``batch_first`` has no effect.

        Any other module: ``y, s' = cell(x, s)``, the state s a tensor or any tree (tuple, list, dict, nested) of
        tensors; the output is ``readout(y)``.

    Args:
        cell: the module, or a sequence of modules, used in place. Parameters keep their names under ``cell.``, or
            ``cell.0.``, ``cell.1.``, … for a sequence.
        readout: a module; the identity by default.
        state: the first state of a module that is not one of PyTorch's, ``cell.init_state(batch_size)`` by default: a
            tree of floating-point or complex tensors (1, ...), repeated for the batch, or a function that returns a
            tree of (batch_size, ...) for a batch size. A tree is a constant; what a function returns may depend on
            parameters of the module.

    Returns:
        The cell. Its steps raise ``CellError`` if the module does not return what is described above, or changes the
        structure, shapes, dtype or device of its state, and ``SparsityError`` if it declares reads or writes.

    Raises:
        ConfigError: the module is not one of these, has no first state, or has layers that do not fit together;
            ``bidirectional=True`` (a step would need the future) or ``dropout`` above 0 (a cell draws no random
            numbers: set it to 0, or write the layers as a module that takes its masks in x).

    Cost:
        That of the module. Weights used in ``nn.Linear`` or ``F.linear`` are tapped; those inside a fused
        ``nn.GRUCell`` of a module of another kind are not, which is slower and just as exact.

    Example:
        >>> import torch
        >>> cell = from_torch(torch.nn.LSTMCell(3, 5), torch.nn.Linear(5, 2))
        >>> y, h = cell(torch.ones(4, 3), cell.init_state(4))
        >>> y.shape, h.shape
        (torch.Size([4, 2]), torch.Size([4, 2, 5]))
        >>> layers = from_torch([torch.nn.GRUCell(3, 5), torch.nn.LSTMCell(5, 4)])
        >>> below, (h, c) = layers.unpack(layers.init_state(4))
        >>> below.shape, h.shape, c.shape
        (torch.Size([4, 5]), torch.Size([4, 4]), torch.Size([4, 4]))
    """
    kind = _kind(cell)
    if kind in _CELLS + _LAYERED:
        cell = original(cell)
    if state is not None and (_is_list(cell) or kind in _CELLS + _LAYERED):
        raise ConfigError(
            "state= is for other modules; PyTorch's own start from zeros, or from the state= of the learner"
        )
    readout = nn.Identity() if readout is None else readout
    if kind in _CELLS:
        return TorchCell(cell, readout)
    if kind in _LAYERED:
        _check_layered(cell)
        return TorchLayers(cell, readout)
    if _is_list(cell):
        _check_layers(list(cell))
        return TorchLayers(cell if isinstance(cell, nn.ModuleList) else nn.ModuleList(cell), readout)
    if not isinstance(cell, nn.Module) or (state is None and not callable(getattr(cell, "init_state", None))):
        raise ConfigError(
            "from_torch takes nn.RNNCell, nn.GRUCell, nn.LSTMCell, a sequence of these, nn.RNN, nn.GRU, nn.LSTM, or a "
            f"module with init_state(batch_size) or state=..., got {type(cell).__name__}"
        )
    return (ReplayingModuleCell if takes_replay(cell) else ModuleCell)(cell, readout, state)


def _kind(cell: Any) -> type:
    """The class of a module as it was written, before ``torch.compile`` and parametrizations."""
    return parametrize.type_before_parametrizations(original(cell)) if isinstance(cell, nn.Module) else type(cell)


def _is_list(cell: Any) -> bool:
    return type(cell) is nn.ModuleList or (isinstance(cell, Sequence) and not isinstance(cell, str | nn.Module))


def _check_layered(module: nn.RNNBase) -> None:
    if module.bidirectional:
        raise ConfigError("bidirectional=True: the backward direction needs the future; use a module without it")
    if module.dropout:
        raise ConfigError(
            f"dropout={module.dropout}: a cell draws no random numbers; set it to 0, or write the layers as a module "
            "that takes its masks in x"
        )


def _check_layers(cells: list[Any]) -> None:
    if not cells:
        raise ConfigError("from_torch needs at least one layer, got an empty sequence")
    for k, cell in enumerate(cells):
        if _kind(cell) not in _CELLS:
            raise ConfigError(
                f"layers must be nn.RNNCell, nn.GRUCell or nn.LSTMCell, but layer {k} is {type(cell).__name__}; other "
                "cells are layered by rtrl.cells.Stack"
            )
        if any(cell is other for other in cells[:k]):
            raise ConfigError(
                f"layer {k} is the same module as one below it; to share weights, let two modules have the same "
                "parameters: above.weight_ih = below.weight_ih, and so on"
            )
    for k, (below, above) in enumerate(pairwise(cells)):
        if below.hidden_size != above.input_size:
            raise ConfigError(
                f"h of layer {k} has width {below.hidden_size}, but layer {k + 1} takes x of width {above.input_size}"
            )
