"""Derivatives from forward passes alone: central differences and the complex step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor, nn

from oracles._common import LossFn, Offsets, call, check_schedule, initial, restarted, scalar_loss, shifted, trainable
from oracles._ridders import EPS, ridders

Method = Literal["central", "complex"]
_COMPLEX_STEP = 1e-30


def _complex(value: Tensor) -> Tensor:
    return value.detach().to(torch.complex128) if value.is_floating_point() else value


@torch.no_grad()
def _total(
    cell: nn.Module, theta: Mapping[str, Tensor], xs: Tensor, loss_fn: LossFn, h: Tensor, resets: Tensor | None,
    offsets: Offsets | None,
) -> complex:  # fmt: skip
    """L = Σ_t ℓ_t at the parameters θ, forward only; all in complex numbers where θ is complex."""
    fixed: dict[str, Tensor] = {}
    imaginary = any(p.is_complex() for p in theta.values())
    if imaginary:
        xs, h = _complex(xs), _complex(h)
        fixed = {n: _complex(p) for n, p in [*cell.named_parameters(), *cell.named_buffers()] if n not in theta}
    total = 0j
    for t in range(xs.shape[0]):
        h = restarted(cell, h, resets, t)
        y, h = call(cell, {**fixed, **shifted(theta, offsets, t)}, xs[t], h)
        loss = scalar_loss(loss_fn, t, y)
        if imaginary and not (h.is_complex() and (loss is None or loss.is_complex())):
            raise ValueError(f"at step {t} the cell or the loss dropped the imaginary part: no complex step")
        if loss is not None:
            total += complex(loss.item())
    return total


def directional_difference(
    cell: nn.Module,
    xs: Tensor,
    loss_fn: LossFn,
    direction: Mapping[str, Tensor],
    h0: Tensor | None = None,
    *,
    method: Method = "central",
    resets: Tensor | None = None,
    offsets: Offsets | None = None,
    step: float = 1e-2,
) -> tuple[float, float]:
    """Compute the derivative of the summed loss along one direction of parameter space, and an estimate of its error.

    Equation:
        d/dε L(θ + ε·direction) at ε = 0; "complex": Im L(θ + i·1e-30·direction) / 1e-30.

    Args:
        cell: as in `oracles.bptt`, in float64; a pure function.
        xs: inputs (T, B, ...).
        loss_fn: as in `oracles.bptt`; a pure function.
        direction: name -> tensor shaped like the parameter; a missing name means zero.
        h0: constant first state (B, ...); None means `cell.init_state(B)`.
        resets: Boolean (T, B), as in `oracles.bptt`.
        offsets: T dicts name -> constant tensor, as in `oracles.bptt`.
        method: "central", or "complex" where cell and loss are analytic and run on complex numbers (no abs, no top-k).
        step: largest move of θ, in Euclidean norm, that "central" tries; it tries ten halvings of it at most.

    Returns:
        `(value, error_estimate)`; the complex step's error is rounding alone, estimated as 64 eps |value|.

    Raises:
        ValueError: as in `oracles.bptt`; something not float64; a direction that is zero or does not fit; an unknown
            method; an imaginary part dropped by the cell or the loss.

    Cost:
        Up to 20 forward passes over all T steps ("central"), or one in complex numbers.
    """
    theta = trainable(cell)
    h = initial(cell, xs, h0)
    check_schedule(xs, theta, resets, offsets)
    if any(v.is_floating_point() and v.dtype != torch.float64 for v in [xs, h, *theta.values()]):
        raise ValueError("finite differences need float64 parameters, inputs and state")
    if method not in ("central", "complex") or not step > 0:
        raise ValueError(f"method must be 'central' or 'complex' and step positive, got {method!r} and {step}")
    for name, d in direction.items():
        if name not in theta or d.shape != theta[name].shape:
            raise ValueError(f"direction {name!r} does not fit a trainable parameter of the cell")
    norm = math.sqrt(sum(float(d.detach().double().square().sum()) for d in direction.values()))
    if not 0 < norm < math.inf:
        raise ValueError("the direction must be finite and not zero")

    def along(epsilon: complex) -> complex:
        moved = {n: p + epsilon * direction[n].detach() if n in direction else p for n, p in theta.items()}
        return _total(cell, moved, xs, loss_fn, h, resets, offsets)

    if method == "central":
        return ridders(lambda epsilon: along(epsilon).real, step / norm)
    theta = {name: p.to(torch.complex128) for name, p in theta.items()}
    value = along(1j * _COMPLEX_STEP).imag / _COMPLEX_STEP
    return value, 64 * EPS * abs(value)


@overload
def finite_difference(
    cell: nn.Module, xs: Tensor, loss_fn: LossFn, h0: Tensor | None = None, *, method: Method = "central",
    resets: Tensor | None = None, offsets: Offsets | None = None, return_error: Literal[False] = False,
) -> dict[str, Tensor]: ...  # fmt: skip
@overload
def finite_difference(
    cell: nn.Module, xs: Tensor, loss_fn: LossFn, h0: Tensor | None = None, *, method: Method = "central",
    resets: Tensor | None = None, offsets: Offsets | None = None, return_error: Literal[True],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...  # fmt: skip
def finite_difference(
    cell: nn.Module,
    xs: Tensor,
    loss_fn: LossFn,
    h0: Tensor | None = None,
    *,
    method: Method = "central",
    resets: Tensor | None = None,
    offsets: Offsets | None = None,
    return_error: bool = False,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the gradient of the summed loss, one parameter entry after the other, by forward passes alone.

    Equation:
        (dL/dθ)_k = d/dε L(θ + ε e_k) at ε = 0, e_k the k-th unit vector.

    Args:
        cell: as in `oracles.bptt`, in float64; a pure function.
        xs: inputs (T, B, ...).
        loss_fn: as in `oracles.bptt`; a pure function.
        h0: constant first state (B, ...); None means `cell.init_state(B)`.
        method: as in `oracles.directional_difference`.
        resets: Boolean (T, B), as in `oracles.bptt`.
        offsets: T dicts name -> constant tensor, as in `oracles.bptt`.
        return_error: also hand out the error estimates.

    Returns:
        Gradient by parameter name; with `return_error` the pair of it and the error estimates, in the same shapes.

    Raises:
        ValueError: as `oracles.directional_difference`.

    Cost:
        P times `oracles.directional_difference`.
    """
    gradients, errors = trainable(cell), trainable(cell)
    for name, p in trainable(cell).items():
        for k in range(p.numel()):
            unit = torch.zeros_like(p)
            unit.view(-1)[k] = 1.0
            value, error = directional_difference(
                cell, xs, loss_fn, {name: unit}, h0, method=method, resets=resets, offsets=offsets
            )
            gradients[name].view(-1)[k], errors[name].view(-1)[k] = value, error
    return (gradients, errors) if return_error else gradients
