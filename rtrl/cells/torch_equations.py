"""One step of PyTorch's recurrent layers, every weight used in a linear map, and its derivatives, unit by unit."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.cells.analytic import UnitTap


class Weights(NamedTuple):
    """The parameters of one layer under PyTorch's names: (G·H, I), (G·H, H or P), (G·H,) twice and (P, H), with G = 1,
    3 or 4 gates; None for what the layer does not have."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None


def weights_of(module: nn.Module, suffix: str = "") -> Weights:
    """The current parameters of a cell, or of the layer ``suffix`` (``"_l0"``, …) of a layered module."""
    parameters: Any = module._parameters  # faster than getattr, which looks here last
    projection = getattr(module, f"weight_hr{suffix}", None) if module.__dict__.get("proj_size") else None
    try:
        return Weights(
            parameters["weight_ih" + suffix],
            parameters["weight_hh" + suffix],
            parameters["bias_ih" + suffix],
            parameters["bias_hh" + suffix],
            projection,
        )
    except KeyError:  # without biases, or some are computed (torch.nn.utils.parametrize)
        ih, hh, b_ih, b_hh = (getattr(module, name + suffix, None) for name in Weights._fields[:4])
        return Weights(ih, hh, b_ih, b_hh, projection)  # type: ignore[arg-type]


_RNN_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}


def mode_of(module: nn.Module) -> str:
    """The equations of a module of PyTorch: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``."""
    if isinstance(module, (nn.RNNCell, nn.RNN)):
        return _RNN_MODES[module.nonlinearity]
    return "GRU" if isinstance(module, (nn.GRUCell, nn.GRU)) else "LSTM"


_FUSED: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "GRU": torch.gru_cell,
    "LSTM": torch.lstm_cell,
}


def step(mode: str, x: Tensor, state: tuple[Tensor, ...], weights: Weights) -> tuple[Tensor, ...]:
    """Take one step of one layer: PyTorch's fused function without gradients, else every weight in a linear map.

    Equation: that of ``torch.nn.RNNCell``, ``GRUCell`` or ``LSTMCell``; an LSTM with a projection ends in
    ``h' = W_hr (o ⊙ tanh c')``.

    Args:
        mode: see ``mode_of``.
        x: (B, I).
        state: ``(h,)``, or ``(h, c)`` for an LSTM: h (B, H), or (B, P) with a projection; c (B, H).
        weights: of the layer.

    Returns:
        The next state, in the same form.

    Cost: G·H·(I + H) multiply-adds per sample.
    """
    h = state[0]
    if weights.weight_hr is None and not torch.is_grad_enabled():
        fused = _FUSED[mode](x, state if mode == "LSTM" else h, *weights[:4])
        return fused if mode == "LSTM" else (fused,)
    from_x, from_h = F.linear(x, weights.weight_ih, weights.bias_ih), F.linear(h, weights.weight_hh, weights.bias_hh)
    after = gated(mode, from_x, from_h, state)
    return after if weights.weight_hr is None else (F.linear(after[0], weights.weight_hr), *after[1:])


def gated(mode: str, from_x: Tensor, from_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the next state from what the weights make of x and of h, each (..., G·H), the gates side by side."""
    h = state[0]
    if mode == "GRU":
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        update = torch.sigmoid(update_x + update_h)
        return (new + update * (h - new),)
    if mode == "LSTM":
        enter, forget, new, out = (from_x + from_h).chunk(4, dim=-1)
        c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(out) * torch.tanh(c), c
    return (torch.tanh(from_x + from_h) if mode == "RNN_TANH" else torch.relu(from_x + from_h),)


_FUSED_SEQUENCES: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "GRU": torch.gru,
}


def sequence(mode: str, xs: Tensor, h: Tensor, weights: Weights) -> Tensor:
    """Take m steps of one layer, without gradients; return the states after them, (m, B, H).

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"`` or ``"GRU"``.
        xs: (m, B, I).
        h: (B, H), the state before the first step.
        weights: of the layer.

    Cost: that of the steps, the part that depends on xs in one product.
    """
    held = [weight for weight in weights[:4] if weight is not None]
    with torch.backends.cudnn.flags(enabled=False) if xs.is_cuda else nullcontext():  # cuDNN rounds to TF32
        out: Tensor = _FUSED_SEQUENCES[mode](xs, h.unsqueeze(0), held, len(held) == 4, 1, 0.0, False, False, False)[0]
    return out


def derivatives(
    mode: str, x: Tensor, state: tuple[Tensor, ...], weights: Weights
) -> tuple[tuple[Tensor, ...], list[UnitTap], Tensor | None]:
    """Take the step that ``step`` takes, and differentiate it.

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"`` without a projection.
        x: (N, I).
        state: ``(h,)``, or ``(h, c)`` for an LSTM, each (N, U).
        weights: of the layer.

    Returns:
        The next state in the same form, the taps, and ``direct`` (N, S, S, U) or None; see ``AnalyticStep``.

    Cost: that of a step, and some multiplications per unit.
    """
    h = state[0]
    from_x, from_h = F.linear(x, weights.weight_ih, weights.bias_ih), F.linear(h, weights.weight_hh, weights.bias_hh)

    def taps(by_x: Tensor, by_h: Tensor) -> list[UnitTap]:
        return [
            UnitTap(weights.weight_ih, weights.bias_ih, x, by_x),
            UnitTap(weights.weight_hh, weights.bias_hh, h, by_h, part=0),
        ]

    if mode == "GRU":
        size, units = h.shape
        (gates_x, new_x), (gates_h, new_h) = (z.split((2 * units, units), dim=1) for z in (from_x, from_h))
        gates = torch.sigmoid(gates_x + gates_h)
        reset, update = gates.chunk(2, dim=1)
        new = torch.tanh(torch.addcmul(new_x, reset, new_h))
        change, rest = h - new, 1 - update
        by_new = torch.addcmul(rest, rest * new, new, value=-1)  # (1 − update) (1 − new²)
        slopes = torch.addcmul(gates, gates, gates, value=-1)
        by_gates = torch.cat([by_new * new_h, change], dim=1) * slopes
        by_x, by_h = (torch.cat([by_gates, last], dim=1).view(size, 1, 3, units) for last in (by_new, by_new * reset))
        return (torch.addcmul(new, update, change),), taps(by_x, by_h), update.view(size, 1, 1, units)
    if mode == "LSTM":
        before = state[1]
        enter, forget, new, out = (from_x + from_h).chunk(4, dim=-1)
        enter, forget, new, out = torch.sigmoid(enter), torch.sigmoid(forget), torch.tanh(new), torch.sigmoid(out)
        c = forget * before + enter * new
        squashed = torch.tanh(c)
        through = out * (1 - squashed.square())  # ∂h'/∂c'
        by_enter, by_forget = new * enter * (1 - enter), before * forget * (1 - forget)
        by_c = torch.stack([by_enter, by_forget, enter * (1 - new.square()), torch.zeros_like(c)], dim=1)
        by_h = through.unsqueeze(1) * by_c
        by_h[:, 3] = squashed * out * (1 - out)
        response = torch.stack([by_h, by_c], dim=1)
        direct = torch.zeros(c.shape[0], 2, 2, c.shape[1], dtype=c.dtype, device=c.device)
        direct[:, 0, 1] = through * forget
        direct[:, 1, 1] = forget
        return (out * squashed, c), taps(response, response), direct
    total = from_x + from_h
    if mode == "RNN_TANH":
        after = torch.tanh(total)
        slope = 1 - after.square()
    else:
        after = torch.relu(total)
        slope = (total > 0).to(total.dtype)
    slope = slope[:, None, None]
    return (after,), taps(slope, slope), None
