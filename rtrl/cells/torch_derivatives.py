"""The derivatives of one step of PyTorch's recurrent cells, unit by unit."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl.cells.analytic import UnitTap
from rtrl.cells.torch_equations import Weights


def derivatives(
    mode: str, x: Tensor, state: tuple[Tensor, ...], weights: Weights
) -> tuple[tuple[Tensor, ...], list[UnitTap], Tensor | None]:
    """The step ``rtrl.cells.torch_equations.step`` takes, with what it depends on.

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"`` without a projection.
        x: (N, I). state: ``(h,)``, or ``(h, c)`` for an LSTM, each (N, U).

    Returns:
        The next state in the same form, the taps, and ``direct`` (N, S, S, U) or None; see ``AnalyticStep``.

    Cost: that of a step, and some multiplications a unit.
    """
    h = state[0]
    from_x, from_h = F.linear(x, weights.weight_ih, weights.bias_ih), F.linear(h, weights.weight_hh, weights.bias_hh)

    def taps(by_x: Tensor, by_h: Tensor) -> list[UnitTap]:
        return [
            UnitTap(weights.weight_ih, weights.bias_ih, x, by_x),
            UnitTap(weights.weight_hh, weights.bias_hh, h, by_h, part=0),
        ]

    if mode == "GRU":
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + reset * new_h)
        by_new = (1 - update) * (1 - new.square())
        by_reset = by_new * new_h * reset * (1 - reset)
        by_update = (h - new) * update * (1 - update)
        by_x, by_h = (torch.stack([by_reset, by_update, last], dim=1).unsqueeze(1) for last in (by_new, by_new * reset))
        return (new + update * (h - new),), taps(by_x, by_h), update[:, None, None]
    if mode == "LSTM":
        before = state[1]
        enter, forget, new, out = (from_x + from_h).chunk(4, dim=-1)
        enter, forget, new, out = torch.sigmoid(enter), torch.sigmoid(forget), torch.tanh(new), torch.sigmoid(out)
        c = forget * before + enter * new
        squashed = torch.tanh(c)
        through = out * (1 - squashed.square())  # ∂h'/∂c'
        by_c = torch.stack(
            [
                new * enter * (1 - enter),
                before * forget * (1 - forget),
                enter * (1 - new.square()),
                torch.zeros_like(c),
            ],
            dim=1,
        )
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
