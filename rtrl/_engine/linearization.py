"""The derivatives of a run of steps, as plain data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rtrl._engine.taps import Tap

_FEW = 16  # pairs of a slice and a token per sample: up to this many, a product for each costs less than a transpose


class OutputJacobian(Protocol):
    """``∂h_next[written]/∂z`` of N samples, for the output z (K, L, O) of a linear map."""

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Vector–Jacobian products ``cotangents @ ∂h_next/∂z``, (N, R, W) → (N, K, L, R, O)."""
        ...

    def largest(self) -> Tensor:
        """The largest absolute value, a scalar tensor; NaN if there is one."""
        ...


@dataclass(frozen=True, slots=True)
class DenseOutputJacobian:
    """An output Jacobian of which every entry is written out.

    Attributes:
        values: (N, W, K, L, O).
    """

    values: Tensor

    def vjp(self, cotangents: Tensor) -> Tensor:
        """See ``OutputJacobian``. Cost: N·R·W·K·L·O multiply-adds."""
        n, w, k, length, o = self.values.shape
        r = cotangents.shape[1]
        if k * length == 1:
            return torch.bmm(cotangents, self.values.reshape(n, w, o)).view(n, 1, 1, r, o)
        if k * length > _FEW:
            product = torch.bmm(cotangents, self.values.reshape(n, w, -1))
            return product.view(n, r, k, length, o).permute(0, 2, 3, 1, 4)
        out = cotangents.new_empty(n, k, length, r, o)
        for i in range(k):
            for j in range(length):
                torch.bmm(cotangents, self.values[:, :, i, j], out=out[:, i, j])
        return out

    def largest(self) -> Tensor:
        """See ``OutputJacobian``."""
        return largest(self.values)


@dataclass(frozen=True, slots=True)
class UnitwiseOutputJacobian:
    """An output Jacobian in which state part s of unit i depends on gate g of unit i alone, as in PyTorch's cells.

    Attributes:
        values: (N, S, G, U), ``∂h_next[s, i]/∂z[g, i]``; the state has S·U entries, z has G·U, K = L = 1.
    """

    values: Tensor

    def vjp(self, cotangents: Tensor) -> Tensor:
        """See ``OutputJacobian``. Cost: N·R·S·G·U multiplications."""
        values = self.values.unsqueeze(1)  # (N, 1, S, G, U)
        n, _, s, g, u = values.shape
        parts = cotangents.reshape(n, -1, s, 1, u)
        product = parts[:, :, 0] * values[:, :, 0]
        for k in range(1, s):
            product.addcmul_(parts[:, :, k], values[:, :, k])
        return product.reshape(n, 1, 1, product.shape[1], g * u)

    def written_out(self) -> DenseOutputJacobian:
        """The same with every entry."""
        n, s, g, u = self.values.shape
        entries = self.values.new_zeros(n, s, u, g, u)
        entries.diagonal(dim1=2, dim2=4).copy_(self.values)
        return DenseOutputJacobian(entries.view(n, s * u, 1, 1, g * u))

    def largest(self) -> Tensor:
        """See ``OutputJacobian``."""
        return largest(self.values)


def largest(values: Tensor) -> Tensor:
    """The largest absolute value, a scalar tensor, without a copy; NaN if there is one, 0 if there are no values."""
    if not values.numel():
        return values.new_zeros(())
    low, high = torch.aminmax(values)
    return torch.maximum(high, -low)


@dataclass(frozen=True, slots=True)
class LinearizedTap:
    """A ``Tap`` with its derivatives, over N = B·m samples.

    Attributes:
        use: the tap.
        output_jacobian: ``∂h_next[written]/∂z``; None if z reaches y alone.
        grad_output: (N, K, L, O), ``∂ℓ/∂z`` through y; None if no loss reaches it.
    """

    use: Tap
    output_jacobian: OutputJacobian | None
    grad_output: Tensor | None

    @property
    def name(self) -> str:
        """The parameter."""
        return self.use.name


@dataclass(frozen=True, slots=True)
class Linearization:
    """m steps of one kind, linearised at their own states and at the present parameters.

    Attributes:
        times: positions of the steps in their block, ascending.
        written: LongTensor (B, m, w), the slots of the state that the steps write; None for all.
        touched: LongTensor (B, m, c), the slots that they read or write; None for all.
        state_jacobian: ``state_jacobian(start, stop)`` gives (B, stop − start, w·slot_size, c·slot_size),
            ``∂h_next[written]/∂h[touched]`` of these of the m steps.
        adjoint: (B, m, c·slot_size), ``∂ℓ/∂h[touched]`` through each step's own y; None if it is zero.
        adjoint_next: (B, m, w·slot_size), ``∂ℓ/∂h_next[written]`` through each step's own y, on top of ``adjoint``;
            None if it is zero.
        taps: the linear uses of parameters.
        active: for each sliced parameter, LongTensor (B, m, k).
        untapped: names of parameters with uses that are not taps and that the next state depends on.
        has_losses: whether a loss was added at any of the steps.
        gradients: gradient through y, summed over steps and samples, of parameters with uses that are not taps.
        untapped_jacobians: cotangents (B, U, m, w·slot_size) → the untapped parameters' weighted immediate Jacobians
            (B, U, *shape), all uses included.
        restarted: Boolean (B, m), the samples that restarted just before a step; None for none. Nothing goes from such
            a step to the state before it: its state Jacobian and its adjoint are zero (``zero_restarted``), and a sweep
            must drop what slots that the step does not write would hand on.
    """

    times: list[int]
    written: Tensor | None
    touched: Tensor | None
    state_jacobian: Callable[[int, int], Tensor]
    adjoint: Tensor | None
    adjoint_next: Tensor | None
    taps: list[LinearizedTap]
    active: Mapping[str, Tensor]
    untapped: list[str]
    has_losses: bool
    gradients: dict[str, Tensor]
    untapped_jacobians: Callable[[Tensor], dict[str, Tensor]]
    restarted: Tensor | None = None


def zero_restarted(values: Tensor, restarted: Tensor | None) -> Tensor:
    """Set what steps hand to the states before them, (B, m, ...), to zero where a sample has just restarted.

    ``restarted`` is Boolean (B, m), None for no restarts. The first state of these samples is a constant. With
    ``J = 0`` and ``δ = 0`` at the step, ``Φ`` of a block is zero for them, and v is what the losses before the restart
    contribute.
    """
    if restarted is None:
        return values
    return values.masked_fill(restarted.reshape(*restarted.shape, *[1] * (values.ndim - 2)), 0.0)


def cut_at_restarts(steps: Linearization, restarted: Tensor | None) -> Linearization:
    """Return linearised steps with nothing going back across the restarts, Boolean (B, m) or None."""
    if restarted is None:
        return steps
    jacobian = steps.state_jacobian
    return replace(
        steps,
        state_jacobian=lambda start, stop: zero_restarted(jacobian(start, stop), restarted[:, start:stop]),
        adjoint=None if steps.adjoint is None else zero_restarted(steps.adjoint, restarted),
        restarted=restarted,
    )
