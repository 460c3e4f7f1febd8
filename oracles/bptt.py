"""Backpropagation through time: autograd over all steps of the module itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oracles._common import (
    LossFn,
    Offsets,
    call,
    check_no_state_hook,
    check_schedule,
    dense,
    first_state,
    restarted,
    scalar_loss,
)
from oracles._parameters import in_place, through_hooks, trainable

Gradients = dict[str, Tensor]


def bptt(
    cell: nn.Module,
    xs: Tensor,
    loss_fn: LossFn,
    h0: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    offsets: Offsets | None = None,
) -> Gradients:
    """Compute the gradient of the summed loss by unrolled autograd.

    The cell is called as it is, with its own parameters, hooks, parametrizations and contexts in force. Hooks of the
    parameters see the whole gradient once; hooks that run after accumulation do not run, and `.grad` is left alone.
    With offsets, the parameters are changed in their own memory before each step, and put back.

    A gradient by a complex parameter is ∂L/∂a + i ∂L/∂b for a + i b, as PyTorch's own.

    Equation:
        dL/dθ with L = Σ_t ℓ_t(y_t) and y_t, h_{t+1} = cell(x_t, h_t; θ + offsets[t]).

    Args:
        cell: module with `cell(x, h) -> (y, h_next)` or `(y, h_next, sparsity)`, and `init_state(B)`, which may depend
            on the parameters: a learned first state.
        xs: inputs (T, B, ...).
        loss_fn: `loss_fn(t, y)` gives the scalar loss of step t, or None.
        h0: constant first state (B, ...); None means `cell.init_state(B)`, at θ without an offset.
        resets: Boolean (T, B); before step t the marked samples start again from `cell.init_state(B)`, at the
            parameters of step t.
        offsets: T dicts name -> constant tensor shaped like the parameter; a missing name means zero.

    Returns:
        Gradient by parameter name, in the parameter's shape and dtype; zeros where no loss depends on a parameter.

    Raises:
        ValueError: a shape, dtype or name does not fit, in an argument or in what the cell or the loss returns; `h0`
            requires a gradient; with offsets, parameters share memory or the cell puts a hook on the state.

    Cost:
        Time of one forward and one backward pass; memory grows with T.
    """
    theta = trainable(cell)
    with torch.enable_grad():  # also where the caller has switched autograd off
        h = first_state(cell, xs, h0)
        check_schedule(xs, theta, resets, offsets)
        if offsets is not None:
            return through_hooks(theta, _step_by_step(cell, theta, xs, loss_fn, h, resets, offsets))
        total = torch.zeros((), dtype=h.dtype.to_real(), device=h.device)
        for t in range(xs.shape[0]):
            h = restarted(cell, h, resets, t)
            y, h = call(cell, xs[t], h)
            loss = scalar_loss(loss_fn, t, y)
            if loss is not None:
                total = total + loss
    return _sum(theta, _backward([(total, None)], list(theta.values())))


def _backward(seeds: Sequence[tuple[Tensor | None, Tensor | None]], inputs: list[Tensor]) -> Sequence[Tensor | None]:
    """One backward pass from all pairs (output, cotangent) together; None where nothing depends on an input."""
    outputs = [(out, cotangent) for out, cotangent in seeds if out is not None and out.requires_grad]
    if not outputs:
        return [None] * len(inputs)
    return torch.autograd.grad([out for out, _ in outputs], inputs, [c for _, c in outputs], allow_unused=True)


def _sum(theta: Gradients, *parts: Sequence[Tensor | None]) -> Gradients:
    """The sum of the parts, by name."""
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in theta.items()}
    for part in parts:
        for name, g in zip(theta, part, strict=True):
            total[name] = total[name] if g is None else total[name] + dense(g)
    return total


def _step_by_step(
    cell: nn.Module, theta: Gradients, xs: Tensor, loss_fn: LossFn, first: Tensor, resets: Tensor | None,
    offsets: Offsets,
) -> Gradients:  # fmt: skip
    """The same chain rule, one graph for each step: each is made, and later differentiated, with its offsets in force.

    The cotangent of the state that a step receives starts the backward pass of the step before, beside that step's
    loss: `g_t, dθ_t = ∂(ℓ_t + <g_{t+1}, h_{t+1}>) / ∂(h_t, θ)`.
    """
    parameters = list(theta.values())
    graphs: list[tuple[Tensor, Tensor, Tensor | None]] = []
    with in_place(cell, theta) as move:
        h = first
        for t in range(xs.shape[0]):
            move(offsets[t])
            received = h.detach().requires_grad_()
            y, h = call(cell, xs[t], restarted(cell, received, resets, t))
            graphs.append((received, h, scalar_loss(loss_fn, t, y)))
            check_no_state_hook(received)
        cotangent: Tensor | None = None
        parts: list[Sequence[Tensor | None]] = []
        for offset, (received, h_next, loss) in zip(offsets[::-1], graphs[::-1], strict=True):
            move(offset)
            seeds = [(loss, None), (None if cotangent is None else h_next, cotangent)]
            cotangent, *part = _backward(seeds, [received, *parameters])
            parts.append(part)
        move({})
        parts.append(_backward([(None if cotangent is None else first, cotangent)], parameters))
    return _sum(theta, *parts)
