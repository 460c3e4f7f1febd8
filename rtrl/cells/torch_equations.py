"""One step of PyTorch's recurrent layers, written so that every weight is met in a linear map."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Weights(NamedTuple):
    """The parameters of one layer under PyTorch's names: (G·H, I), (G·H, H or P), (G·H,) twice and (P, H), with G = 1,
    3 or 4 gates; None for what the layer does not have."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None


def weights_of(module: nn.Module, suffix: str = "") -> Weights:
    """The present parameters of a cell, or of the layer ``suffix`` (``"_l0"``, …) of a layered module."""
    held: Any = module._parameters  # asked first: a module itself asks there last
    projection = getattr(module, f"weight_hr{suffix}", None) if module.__dict__.get("proj_size") else None
    try:
        return Weights(
            held["weight_ih" + suffix],
            held["weight_hh" + suffix],
            held["bias_ih" + suffix],
            held["bias_hh" + suffix],
            projection,
        )
    except KeyError:  # without biases, or some are computed (torch.nn.utils.parametrize)
        ih, hh, b_ih, b_hh = (getattr(module, name + suffix, None) for name in Weights._fields[:4])
        return Weights(ih, hh, b_ih, b_hh, projection)  # type: ignore[arg-type]


_RNN_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}


def mode_of(module: nn.Module) -> str:
    """Which equations a module of PyTorch has: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``."""
    if isinstance(module, (nn.RNNCell, nn.RNN)):
        return _RNN_MODES[module.nonlinearity]
    return "GRU" if isinstance(module, (nn.GRUCell, nn.GRU)) else "LSTM"


_WHOLE: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "GRU": torch.gru_cell,
    "LSTM": torch.lstm_cell,
}


def step(mode: str, x: Tensor, state: tuple[Tensor, ...], weights: Weights) -> tuple[Tensor, ...]:
    """One step of one layer: where no gradient is asked for in PyTorch's one call, else so that every weight is met in
    a linear map.

    Equation: that of ``torch.nn.RNNCell``, ``GRUCell`` or ``LSTMCell``; an LSTM with a projection ends in
    ``h' = W_hr (o ⊙ tanh c')``.

    Args:
        mode: see ``mode_of``.
        x: (B, I). state: ``(h,)``, or ``(h, c)`` for an LSTM: h (B, H), or (B, P) with a projection; c (B, H).

    Returns:
        The next state, in the same form.

    Cost: G·H·(I + H) multiply-adds a sample.
    """
    h = state[0]
    if weights.weight_hr is None and not torch.is_grad_enabled():
        whole = _WHOLE[mode](x, state if mode == "LSTM" else h, *weights[:4])
        return whole if mode == "LSTM" else (whole,)
    from_x, from_h = F.linear(x, weights.weight_ih, weights.bias_ih), F.linear(h, weights.weight_hh, weights.bias_hh)
    if mode == "GRU":
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        update = torch.sigmoid(update_x + update_h)
        return (new + update * (h - new),)
    if mode == "LSTM":
        enter, forget, new, out = (from_x + from_h).chunk(4, dim=-1)
        c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
        h = torch.sigmoid(out) * torch.tanh(c)
        return (h if weights.weight_hr is None else F.linear(h, weights.weight_hr)), c
    return (torch.tanh(from_x + from_h) if mode == "RNN_TANH" else torch.relu(from_x + from_h),)
