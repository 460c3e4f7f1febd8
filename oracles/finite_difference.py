"""Derivatives from forward passes alone: central differences and the complex step."""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor, nn

from oracles._common import LossFn, Offsets, call, check_schedule, first_state, restarted, scalar_loss
from oracles._parameters import complex_numbers, in_place, through_hooks, trainable
from oracles._ridders import EPS, ridders

Method = Literal["central", "complex"]
Direction = Mapping[str, Tensor]
_COMPLEX_STEP = 1e-30
_STEP = 1e-2


class _Passes:
    """L along a direction of parameter space, by forward passes of the cell with its parameters changed in place."""

    def __init__(
        self, cell: nn.Module, xs: Tensor, loss_fn: LossFn, h0: Tensor | None, method: Method, resets: Tensor | None,
        offsets: Offsets | None,
    ) -> None:  # fmt: skip
        self.theta = trainable(cell)
        h = first_state(cell, xs, h0)
        values = [xs, h, *self.theta.values()]
        check_schedule(xs, self.theta, resets, offsets)
        if any(v.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64) for v in values):
            raise ValueError("finite differences need float64 or complex128 parameters, inputs and state")
        if method == "complex" and any(v.is_complex() for v in values):
            raise ValueError("the complex step needs a real cell; use method='central'")
        if method not in ("central", "complex"):
            raise ValueError(f"method must be 'central' or 'complex', got {method!r}")
        self.cell, self.xs, self.loss_fn, self.h0 = cell, xs.detach(), loss_fn, h0
        self.resets, self.offsets, self.complex = resets, offsets, method == "complex"
        base = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.theta.items()}
        first, second = (self.total(base, 0.0) for _ in range(2))
        if first == first and not cmath.isclose(first, second):  # a loss that is not a number is the caller's to see
            raise ValueError(
                f"two passes at the same parameters gave the losses {first} and {second}: the cell or the loss draws "
                "random numbers or keeps a memory, and finite differences need pure functions"
            )

    def total(self, direction: Direction, epsilon: complex) -> complex:
        """L = Σ_t ℓ_t at the parameters θ + ε·direction, and the offsets of each step."""
        change = {name: epsilon * d.detach() for name, d in direction.items()}
        moving = complex_numbers(self.cell) if self.complex else in_place(self.cell, self.theta)
        total = 0j
        # With autograd on, for cells that take a gradient in their forward; no graph outlives its step.
        with torch.enable_grad(), moving as move:
            move(change)
            h = self.cell.init_state(self.xs.shape[1]) if self.h0 is None else self.h0  # type: ignore[operator]
            for t in range(self.xs.shape[0]):
                if self.offsets is not None:
                    move(_sum(change, self.offsets[t]))
                h = restarted(self.cell, self._number(h), self.resets, t)
                y, h = call(self.cell, self._number(self.xs[t]), h.detach())
                loss = scalar_loss(self.loss_fn, t, y)
                if self.complex and not (h.is_complex() and (loss is None or loss.is_complex())):
                    raise ValueError(f"at step {t} the cell or the loss dropped the imaginary part: no complex step")
                if loss is not None:
                    total += complex(loss.item())
        return total

    def derivative(self, direction: Direction, step: float) -> tuple[float, float]:
        """The derivative along a direction, and an estimate of its error."""
        norm = math.sqrt(sum(float(d.detach().abs().double().square().sum()) for d in direction.values()))
        if not 0 < norm < math.inf:
            raise ValueError("the direction must be finite and not zero")
        if not self.complex:
            return ridders(lambda epsilon: self.total(direction, epsilon).real, step / norm)
        value = self.total(direction, 1j * _COMPLEX_STEP).imag / _COMPLEX_STEP
        return value, 64 * EPS * abs(value)

    def _number(self, value: Tensor) -> Tensor:
        """The value, complex where the passes are."""
        return value.to(torch.complex128) if self.complex and value.is_floating_point() else value


def _sum(a: Direction, b: Direction) -> dict[str, Tensor]:
    return {**a, **{name: a[name] + v.detach() if name in a else v.detach() for name, v in b.items()}}


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
    step: float = _STEP,
) -> tuple[float, float]:
    """Compute the derivative of the summed loss along one direction of parameter space, and an estimate of its error.

    The cell is called as it is, with its parameters changed in their own memory, and put back. Forward passes see the
    function alone: hooks and backward passes that change a gradient have no effect.

    Equation:
        d/dε L(θ + ε·direction) at ε = 0; "complex": Im L(θ + i·1e-30·direction) / 1e-30.

    Args:
        cell: as in `oracles.bptt`, in float64; a pure function.
        xs: inputs (T, B, ...).
        loss_fn: as in `oracles.bptt`; a pure function.
        direction: name -> tensor shaped like the parameter; a missing name means zero.
        h0: constant first state (B, ...); None means `cell.init_state(B)`, as in `oracles.bptt`.
        resets: Boolean (T, B), as in `oracles.bptt`.
        offsets: T dicts name -> constant tensor, as in `oracles.bptt`.
        method: "central", or "complex" where cell and loss are analytic and run on complex numbers (no abs, no top-k).
        step: largest move of θ, in Euclidean norm, that "central" tries; it tries ten halvings of it at most.

    Returns:
        `(value, error_estimate)`; the complex step's error is rounding alone, estimated as 64 eps |value|.

    Raises:
        ValueError: as in `oracles.bptt`; something not float64 or complex128; a complex step of a complex cell; a
            direction that is zero or does not fit; an unknown method; an imaginary part dropped by the cell or the
            loss; two passes at the same parameters that differ; parameters that share memory.

    Cost:
        Up to 22 forward passes over all T steps ("central"), or three in complex numbers.
    """
    passes = _Passes(cell, xs, loss_fn, h0, method, resets, offsets)
    if not step > 0:
        raise ValueError(f"step must be a positive number, got {step}")
    for name, d in direction.items():
        if name not in passes.theta or d.shape != passes.theta[name].shape:
            raise ValueError(f"direction {name!r} does not fit a trainable parameter of the cell")
    return passes.derivative(direction, step)


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

    As `oracles.directional_difference`; but hooks of the parameters see the whole gradient once, at the end.

    Equation:
        (dL/dθ)_k = d/dε L(θ + ε e_k) at ε = 0, e_k the k-th unit vector; of a complex parameter, that plus i times the
        same for i e_k.

    Args:
        cell: as in `oracles.bptt`, in float64; a pure function.
        xs: inputs (T, B, ...).
        loss_fn: as in `oracles.bptt`; a pure function.
        h0: constant first state (B, ...); None means `cell.init_state(B)`, as in `oracles.bptt`.
        method: as in `oracles.directional_difference`.
        resets: Boolean (T, B), as in `oracles.bptt`.
        offsets: T dicts name -> constant tensor, as in `oracles.bptt`.
        return_error: also hand out the error estimates.

    Returns:
        Gradient by parameter name; with `return_error` the pair of it and the error estimates, in the same shapes.

    Raises:
        ValueError: as `oracles.directional_difference`.

    Cost:
        P times `oracles.directional_difference`, twice that for a complex parameter.
    """
    passes = _Passes(cell, xs, loss_fn, h0, method, resets, offsets)
    gradients, errors = (
        {name: torch.zeros_like(p, requires_grad=False) for name, p in passes.theta.items()} for _ in range(2)
    )
    for name, p in passes.theta.items():
        for k in range(p.numel()):
            for one in (1.0, 1j) if p.is_complex() else (1.0,):
                unit = torch.zeros_like(p, requires_grad=False)
                unit.view(-1)[k] = one  # type: ignore[assignment]
                value, error = passes.derivative({name: unit}, _STEP)
                gradients[name].view(-1)[k] += unit.view(-1)[k] * value
                errors[name].view(-1)[k] += unit.view(-1)[k] * error
    gradients = through_hooks(passes.theta, gradients)
    return (gradients, errors) if return_error else gradients
