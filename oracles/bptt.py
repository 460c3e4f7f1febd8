"""Backpropagation through time: one autograd graph over all steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oracles._common import LossFn, Offsets, call, check_schedule, initial, restarted, scalar_loss, shifted, trainable


def bptt(
    cell: nn.Module,
    xs: Tensor,
    loss_fn: LossFn,
    h0: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    offsets: Offsets | None = None,
) -> dict[str, Tensor]:
    """Compute the gradient of the summed loss by unrolled autograd.

    Equation:
        dL/dθ with L = Σ_t ℓ_t(y_t) and y_t, h_{t+1} = cell(x_t, h_t; θ + offsets[t]).

    Args:
        cell: module with `cell(x, h) -> (y, h_next)` or `(y, h_next, sparsity)`, and `init_state(B)`.
        xs: inputs (T, B, ...).
        loss_fn: `loss_fn(t, y)` gives the scalar loss of step t, or None.
        h0: constant first state (B, ...); None means `cell.init_state(B)`.
        resets: Boolean (T, B); before step t the marked samples start again from `cell.init_state(B)`, a constant.
        offsets: T dicts name -> constant tensor shaped like the parameter; a missing name means zero.

    Returns:
        Gradient by parameter name, in the parameter's shape and dtype; zeros where no loss depends on a parameter.

    Raises:
        ValueError: a shape, dtype or name does not fit, in an argument or in what the cell or the loss returns.

    Cost:
        Time of one forward and one backward pass; memory grows with T.
    """
    theta = {name: p.requires_grad_() for name, p in trainable(cell).items()}
    h = initial(cell, xs, h0)
    check_schedule(xs, theta, resets, offsets)
    total = torch.zeros((), dtype=h.dtype, device=h.device)
    with torch.enable_grad():
        for t in range(xs.shape[0]):
            h = restarted(cell, h, resets, t)
            y, h = call(cell, shifted(theta, offsets, t), xs[t], h)
            loss = scalar_loss(loss_fn, t, y)
            if loss is not None:
                total = total + loss
    if not total.requires_grad:  # no loss at all, or none that depends on the cell
        return {name: torch.zeros_like(p, requires_grad=False) for name, p in theta.items()}
    gradients = torch.autograd.grad(total, list(theta.values()), materialize_grads=True)
    return dict(zip(theta, gradients, strict=True))
