"""Analytic derivatives of a step, for cells that supply them: much cheaper than autograd.

A cell whose units interact only in linear maps, ``h' = f(W₁u₁ + b₁, W₂u₂ + b₂, …, h)`` with f unit by unit, may have a
method ``analytic_step(x, h) -> AnalyticStep | None``; None means not for this call. It is compared with autograd at a
perturbed point, once for each kind of block, and refused if it disagrees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(slots=True, eq=False)  # frozen ones take several times as long to make, at every step
class UnitTap:
    """Describe a linear map ``z = W u + b`` whose output acts on the state unit by unit.

    Attributes:
        weight: (G·U, I), the parameter itself.
        bias: (G·U,), the parameter itself, or None.
        inputs: (N, I), u.
        response: (N, S, G, U): ``∂h'[s, i]/∂z[g, i]``; other units do not interact.
        part: which part s' of the state u is (then I = U), or None if u does not depend on the state.
    """

    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    response: Tensor
    part: int | None = None


@dataclass(slots=True, eq=False)
class AnalyticStep:
    """Hold one step of N samples and its derivatives, over a state of S parts of U units (a state (N, U) has S = 1).

    Equation:
        ``∂h'[s, i]/∂h[s', j] = direct[s, s', i] δ_ij + Σ_taps Σ_g response[s, g, i] W[g·U + i, j]``, the sum over the
        taps of part s'.

    Attributes:
        y: the output of the cell, computed with a graph from ``h_next`` (and from h, if that requires grad).
        h_next: (N, U) or (N, S, U), a leaf that requires grad.
        taps: the linear maps of the step itself; those of a readout are found automatically.
        direct: (N, S, S', U), how units of the state act on themselves outside all taps; None if they do not.
    """

    y: Any
    h_next: Tensor
    taps: Sequence[UnitTap]
    direct: Tensor | None = None


@runtime_checkable
class HasAnalyticStep(Protocol):
    """A cell that supplies its derivatives."""

    def analytic_step(self, x: Any, h: Tensor) -> AnalyticStep | None:
        """The step from h, with its derivatives."""
        ...
