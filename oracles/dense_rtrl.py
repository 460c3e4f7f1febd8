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
    check_no_state_hook,
    check_schedule,
    dense,
    first_state,
    pairs,
    restarted,
    scalar_loss,
)
from oracles._parameters import in_place, through_hooks, trainable

Gradients = dict[str, Tensor]
Influences = list[dict[str, Tensor]]

_LINEAR = 1e-2  # relative; a backward pass may round, also to half precision, but clipping shows at once
_SCALES = (2.0**-20, 2.0**20)


def _grad(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor | None = None) -> list[Tensor]:
    """Derivative of an output by each input, zeros where it does not depend on it; the graph is kept."""
    if not output.requires_grad:
        return [torch.zeros_like(i, requires_grad=False) for i in inputs]
    found = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, materialize_grads=True)
    return [dense(g) for g in found]


def _jacobian(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The derivative of a real output (B, ...) by each input, (B, H, size of the input), one row at a time."""
    batch, size = output.flatten(1).shape
    found = [output.new_zeros(batch, size, pairs(i).numel(), requires_grad=False) for i in inputs]
    for b in range(batch):
        for i, entry in enumerate(output[b].flatten().unbind()):
            for matrix, row in zip(found, _grad(entry, inputs), strict=True):
                matrix[b, i] = pairs(row).flatten()
    return found


def _dynamics(by_state: Tensor) -> Tensor:
    """J_t (B, H, H), the blocks on the diagonal of (B, H, B·H); ValueError if anything else is not zero."""
    batch, size = by_state.shape[:2]
    blocks = by_state.reshape(batch, size, batch, size).transpose(1, 2)
    apart = torch.eye(batch, dtype=torch.bool, device=by_state.device)
    if bool(blocks[~apart].any()):
        b = int((blocks.flatten(2).any(2) & ~apart).nonzero()[0, 0])
        raise ValueError(f"the next state of sample {b} depends on another sample of the batch")
    return blocks[apart]


def _check_linear(output: Tensor, inputs: Sequence[Tensor], jacobian: Sequence[Tensor]) -> None:
    """ValueError if a backward pass from a random cotangent, small or large, is not its product with the Jacobian."""
    rows = torch.cat(list(jacobian), dim=2).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(rows), generator=generator, dtype=torch.float64).to(rows)
    for scale in _SCALES:
        cotangent = scale * direction
        found = torch.cat([pairs(g).flatten() for g in _grad(output, inputs, cotangent.reshape(output.shape))])
        size = cotangent.abs() @ rows.abs()
        rounding = torch.finfo(rows.dtype).eps ** 0.5 * size.max()  # an entry may be zero but for rounding
        if bool(((found - cotangent @ rows).abs() > _LINEAR * size + rounding).any()):
            raise ValueError(
                "the backward pass of the cell is not linear in the gradient that it receives (a hook or a function "
                "that clips it, for example), so that no Jacobian expresses it; use oracles.bptt"
            )


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

    The cell is called as it is, with its own parameters, one step at a time. With offsets, the parameters are changed
    in their own memory before each step, and put back. Hooks of the parameters see the whole gradient once, at the end;
    the influence is without them.

    Equation:
        S_{t+1} = J_t S_t + B_t, S_0 = ∂h_0/∂θ;  dL/dθ = Σ_t (∂ℓ_t/∂θ with h_t held fixed + δ_t S_t), δ_t = ∂ℓ_t/∂h_t.
        With a mask M, entry by entry, S_{t+1} = M ∘ (J_t S_t + B_t) and S_0 = M ∘ ∂h_0/∂θ: not the gradient, but what
        a masked rule computes.

    Args:
        cell: module with `cell(x, h) -> (y, h_next)` or `(y, h_next, sparsity)`, and `init_state(B)`; the samples
            of a batch must not interact in the next state (in the loss they may). The first state may depend on the
            parameters.
        xs: inputs (T, B, ...).
        loss_fn: `loss_fn(t, y)` gives the scalar loss of step t, or None.
        h0: constant first state (B, ...); None means `cell.init_state(B)`, at θ without an offset.
        resets: Boolean (T, B); before step t the marked samples start again from `cell.init_state(B)`, at the
            parameters of step t: their influence becomes its derivative.
        offsets: T dicts name -> constant tensor shaped like the parameter; a missing name means zero.
        mask: Boolean (H, P_name) by parameter name; a missing name means that all is kept.
        return_influence: also hand out the influences.

    Returns:
        Gradient by parameter name; with `return_influence` the pair `(gradients, influences)`, where influences is a
        list of T + 1 dicts name -> (B, H, P_name), H and P_name counting the flattened entries of the state and the
        parameter, real and imaginary parts of complex ones in turns: influences[t] belongs to the state step t receives
        (after its resets), influences[T] to the last.

    Raises:
        ValueError: a shape, dtype or name does not fit, in an argument or a returned value; `h0` requires a gradient;
            samples interact in the state; the backward pass of the cell is not linear, or the cell puts a hook on the
            state; with offsets, parameters share memory.

    Cost:
        T·(B·H + 3) backward passes through one step, T·B·H²·P multiplications, memory B·H·P for every T
        (times T with `return_influence`).
    """
    theta = trainable(cell)
    parameters = list(theta.values())

    def masked(influence: Gradients) -> Gradients:
        kept = {} if mask is None else mask
        return {name: s.masked_fill(~kept[name], 0.0) if name in kept else s for name, s in influence.items()}

    with torch.enable_grad(), in_place(cell, theta, offsets is not None) as move:
        h = first_state(cell, xs, h0)
        check_schedule(xs, theta, resets, offsets)
        check_mask(mask, theta, h)
        influence = masked(dict(zip(theta, _jacobian(pairs(h), parameters), strict=True)))
        gradients = {name: torch.zeros_like(p, requires_grad=False) for name, p in theta.items()}
        influences: Influences = []
        for t in range(xs.shape[0]):
            move({} if offsets is None else offsets[t])
            if resets is not None and bool(resets[t].any()):
                fresh = restarted(cell, h, resets, t)
                restart = zip(
                    influence.items(), _jacobian(pairs(fresh), parameters), strict=True
                )  # zero for a constant
                again = resets[t].reshape(-1, 1, 1)
                influence = masked({name: torch.where(again, first, s) for (name, s), first in restart})
                h = fresh
            if return_influence:
                influences.append(influence)
            # A graph of this one step only: its leaves are the state it receives and the parameters.
            h = h.detach().clone().requires_grad_()
            y, h_next = call(cell, xs[t], h)
            loss = scalar_loss(loss_fn, t, y)
            check_no_state_hook(h)
            if loss is not None:
                adjoint, *direct = _grad(loss, [h, *parameters])
                for name, g in zip(theta, direct, strict=True):
                    through_state = torch.einsum("bi,bip->p", pairs(adjoint).flatten(1), influence[name])
                    total = pairs(gradients[name] + g) + through_state.reshape(pairs(g).shape)
                    gradients[name] = torch.view_as_complex(total) if g.is_complex() else total
            by_state, *immediate = jacobian = _jacobian(pairs(h_next), [h, *parameters])
            dynamics = _dynamics(by_state)
            _check_linear(pairs(h_next), [h, *parameters], jacobian)
            terms = zip(influence.items(), immediate, strict=True)
            influence = masked({name: dynamics @ s + direct_part for (name, s), direct_part in terms})
            h = h_next.detach()
        influences.append(influence)
    gradients = through_hooks(theta, gradients)
    return (gradients, influences) if return_influence else gradients
