"""The Jacobians of one step, in full, sample by sample and row by row."""

from typing import NamedTuple

import torch
from torch import Tensor

from rtrl._engine import checks
from rtrl.learners.replayed_step import Step


class Linear(NamedTuple):
    """One step, linearised where it was taken. P counts the entries of all parameters, in the cell's own order.

    Args:
        dynamics: the dynamics Jacobian J (B, H, H). immediate: the immediate Jacobian B (B, H, P).
        adjoint: ∂ℓ/∂h (B, H) of the step's losses; direct: ∂ℓ/∂θ (P,) with h held fixed.
    """

    dynamics: Tensor
    immediate: Tensor
    adjoint: Tensor
    direct: Tensor


def linearize(step: Step) -> Linear:
    """The Jacobians of a step and what its losses send back.

    Raises:
        CellError: run again, the cell does not do what it did. NonFiniteError: NaN or infinity in a Jacobian.

    Cost: B·(H + 1) backward passes through one sample's step; B·H·(H + P) numbers.
    """
    theta = list(step.values.trainable.values())
    samples, size, n_theta = len(step.h), step.h[0].numel(), sum(p.numel() for p in theta)
    dynamics, immediate = step.h.new_zeros(samples, size, size), step.h.new_zeros(samples, size, n_theta)
    adjoint, direct = step.h.new_zeros(samples, size), step.h.new_zeros(n_theta)
    for b in range(samples):
        h = step.h[b : b + 1].clone().requires_grad_()
        pairs, h_next = step.again(h, b)
        if pairs:
            ys, gs = zip(*pairs, strict=True)
            by_h, *by_theta = torch.autograd.grad(ys, [h, *theta], gs, retain_graph=True, materialize_grads=True)
            adjoint[b] = by_h.flatten()
            direct += torch.cat([g.flatten() for g in by_theta])
        if not h_next.requires_grad:
            continue
        with torch.enable_grad():
            entries = h_next.flatten().unbind()
        for i, entry in enumerate(entries):
            by_h, *by_theta = torch.autograd.grad(entry, [h, *theta], retain_graph=True, materialize_grads=True)
            dynamics[b, i] = by_h.flatten()
            immediate[b, i] = torch.cat([g.flatten() for g in by_theta])
    for what, value in (("dynamics", dynamics), ("immediate", immediate)):
        checks.check_finite(f"the {what} Jacobian", value, step.number)
    return Linear(dynamics, immediate, adjoint, direct)
