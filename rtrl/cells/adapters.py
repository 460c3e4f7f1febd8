"""PyTorch's own recurrent cells as cells of this package."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.errors import ConfigError


def _rnn(cell: nn.RNNCell, x: Tensor, h: Tensor) -> Tensor:
    squash = torch.tanh if cell.nonlinearity == "tanh" else torch.relu
    return squash(F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh))


def _gru(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    reset_x, update_x, new_x = F.linear(x, cell.weight_ih, cell.bias_ih).chunk(3, dim=-1)
    reset_h, update_h, new_h = F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, dim=-1)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    update = torch.sigmoid(update_x + update_h)
    return new + update * (h - new)


def _lstm(cell: nn.LSTMCell, x: Tensor, state: Tensor) -> Tensor:
    h, c = state.unbind(dim=1)
    gates = F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
    enter, forget, new, out = gates.chunk(4, dim=-1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.stack([torch.sigmoid(out) * torch.tanh(c), c], dim=1)


_STEPS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.RNNCell: _rnn, nn.GRUCell: _gru, nn.LSTMCell: _lstm}


class TorchCell(nn.Module):
    """One of PyTorch's cells with a readout: ``y = readout(h')``. Made by ``from_torch``."""

    def __init__(self, cell: nn.RNNCell | nn.GRUCell | nn.LSTMCell, readout: nn.Module) -> None:
        super().__init__()
        self.cell, self.readout = cell, readout

    def init_state(self, batch_size: int) -> Tensor:
        """Zeros: (batch_size, H), or (batch_size, 2, H) for the pair (h, c) of an LSTM."""
        shape = (
            (batch_size, 2, self.cell.hidden_size)
            if isinstance(self.cell, nn.LSTMCell)
            else (batch_size, self.cell.hidden_size)
        )
        return self.cell.weight_hh.new_zeros(shape)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One step: x (B, input_size) and the state → y and the next state."""
        h_next = _STEPS[type(self.cell)](self.cell, x, h)
        return self.readout(h_next[:, 0] if h_next.ndim == 3 else h_next), h_next


def from_torch(cell: nn.RNNCell | nn.GRUCell | nn.LSTMCell, readout: nn.Module | None = None) -> TorchCell:
    """Adapt ``nn.RNNCell``, ``nn.GRUCell`` or ``nn.LSTMCell``; its own equations, written so that every weight is met
    in a linear map.

    Args:
        cell: the cell; its parameters are used in place and keep their names under ``cell.``.
        readout: maps the new h (B, H) to y; the identity by default.

    Raises:
        ConfigError: another kind of module.

    Cost: as PyTorch's cell.

    >>> import torch
    >>> cell = from_torch(torch.nn.LSTMCell(3, 5), torch.nn.Linear(5, 2))
    >>> y, h = cell(torch.ones(4, 3), cell.init_state(4))
    >>> y.shape, h.shape
    (torch.Size([4, 2]), torch.Size([4, 2, 5]))
    """
    if type(cell) not in _STEPS:
        raise ConfigError(f"from_torch takes nn.RNNCell, nn.GRUCell or nn.LSTMCell, got {type(cell).__name__}")
    return TorchCell(cell, nn.Identity() if readout is None else readout)
