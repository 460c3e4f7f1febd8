"""Real-time recurrent learning as in the textbook: the whole influence matrix, carried forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from oracles._common import (
    LossFn,
    Offsets,
    call,
    check_mask,
    check_schedule,
    initial,
    restarted,
    scalar_loss,
    shifted,
    trainable,
)

Gradients = dict[str, Tensor]
Influences = list[dict[str, Tensor]]


def _grad(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Derivative of one number by each input, zeros where it does not depend on it; the graph is kept."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(i, requires_grad=False) for i in inputs)
    return torch.autograd.grad(output, inputs, retain_graph=True, materialize_grads=True)


def _jacobians(h_next: Tensor, h: Tensor, theta: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """J_t (B, H, H) and B_t, name -> (B, H, P_name), one row at a time."""
    batch, size = h_next.flatten(1).shape
    dynamics = h.new_zeros(batch, size, size)
    immediate = {name: p.new_zeros(batch, size, p.numel()) for name, p in theta.items()}
    with torch.enable_grad():  # also where the caller has switched autograd off
        entries = h_next.flatten().unbind()
    for b in range(batch):
        for i in range(size):
            by_state, *by_theta = _grad(entries[b * size + i], [h, *theta.values()])
            if any(bool(by_state[other].any()) for other in range(batch) if other != b):
                raise ValueError(f"the next state of sample {b} depends on another sample of the batch")
            dynamics[b, i] = by_state[b].flatten()
            for name, g in zip(theta, by_theta, strict=True):
                immediate[name][b, i] = g.flatten()
    return dynamics, immediate


@overload
def dense_rtrl(
    cell: nn.Module, xs: Tensor, loss_fn: LossFn, h0: Tensor | None = None, *, resets: Tensor | None = None,
    offsets: Offsets | None = None, mask: Mapping[str, Tensor] | None = None, return_influence: Literal[False] = False,
) -> Gradients: ...  # fmt: skip
@overload
def dense_rtrl(
    cell: nn.Module, xs: Tensor, loss_fn: LossFn, h0: Tensor | None = None, *, resets: Tensor | None = None,
    offsets: Offsets | None = None, mask: Mapping[str, Tensor] | None = None, return_influence: Literal[True],
) -> tuple[Gradients, Influences]: ...  # fmt: skip
def dense_rtrl(
    cell: nn.Module,
    xs: Tensor,
    loss_fn: LossFn,
    h0: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    offsets: Offsets | None = None,
    mask: Mapping[str, Tensor] | None = None,
    return_influence: bool = False,
) -> Gradients | tuple[Gradients, Influences]:
    """Compute the gradient of the summed loss by the dense forward recursion of the influence.

    Equation:
        S_{t+1} = J_t S_t + B_t, S_0 = 0;  dL/dθ = Σ_t (∂ℓ_t/∂θ with h_t held fixed + δ_t S_t), δ_t = ∂ℓ_t/∂h_t.
        With a mask M, entry by entry, S_{t+1} = M ∘ (J_t S_t + B_t): not the gradient, but what a masked rule computes.

    Args:
        cell: module with `cell(x, h) -> (y, h_next)` or `(y, h_next, sparsity)`, and `init_state(B)`; the samples
            of a batch must not interact in the next state (in the loss they may).
        xs: inputs (T, B, ...).
        loss_fn: `loss_fn(t, y)` gives the scalar loss of step t, or None.
        h0: constant first state (B, ...); None means `cell.init_state(B)`.
        resets: Boolean (T, B); before step t the marked samples start again from `cell.init_state(B)`, a constant.
        offsets: T dicts name -> constant tensor shaped like the parameter; a missing name means zero.
        mask: Boolean (H, P_name) by parameter name; a missing name means that all is kept.
        return_influence: also hand out the influences.

    Returns:
        Gradient by parameter name; with `return_influence` the pair `(gradients, influences)`, where influences is a
        list of T + 1 dicts name -> (B, H, P_name), H and P_name counting the flattened entries of the state and the
        parameter: influences[t] belongs to the state step t receives (after its resets), influences[T] to the last.

    Raises:
        ValueError: a shape, dtype or name does not fit, in an argument or a returned value, or samples interact in the
            state.

    Cost:
        T·B·H backward passes through one step, T·B·H²·P multiplications, memory B·H·P for every T
        (times T with `return_influence`).
    """
    values = trainable(cell)
    h = initial(cell, xs, h0)
    check_schedule(xs, values, resets, offsets)
    check_mask(mask, values, h)
    batch, size = h.flatten(1).shape
    influence = {name: p.new_zeros(batch, size, p.numel()) for name, p in values.items()}
    gradients = {name: torch.zeros_like(p) for name, p in values.items()}
    influences: Influences = []
    for t in range(xs.shape[0]):
        h = restarted(cell, h, resets, t)
        if resets is not None:  # a state that is a constant has no influence
            influence = {name: s.masked_fill(resets[t].reshape(-1, 1, 1), 0.0) for name, s in influence.items()}
        if return_influence:
            influences.append(influence)
        # A graph of this one step only: its leaves are the state it receives and the parameters it uses.
        h = h.detach().clone().requires_grad_()
        theta = {name: p.detach().clone().requires_grad_() for name, p in shifted(values, offsets, t).items()}
        with torch.enable_grad():
            y, h_next = call(cell, theta, xs[t], h)
            loss = scalar_loss(loss_fn, t, y)
        if loss is not None:
            adjoint, *direct = _grad(loss, [h, *theta.values()])
            for name, g in zip(theta, direct, strict=True):
                through_state = torch.einsum("bi,bip->p", adjoint.flatten(1), influence[name])
                gradients[name] = gradients[name] + g + through_state.reshape(g.shape)
        dynamics, immediate = _jacobians(h_next, h, theta)
        influence = {name: dynamics @ s + immediate[name] for name, s in influence.items()}
        for name, kept in ({} if mask is None else mask).items():
            influence[name] = influence[name].masked_fill(~kept, 0.0)
        h = h_next.detach()
    influences.append(influence)
    return (gradients, influences) if return_influence else gradients
