"""How a step's next state responds to the output z of a linear map, and what becomes of it at the end of the block.

With the suffix product C of a step, ``left = C ∂h_next/∂z``; the immediate Jacobian carried to the block's end is then
``left ⊗ u``, u the map's input.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FEW = 16  # up to so many (slice, token) pairs a sample, one product each costs less than turning the result round


class Response(Protocol):
    """``∂h_next[writes]/∂z`` of N samples, z of shape (K, L, O) a sample."""

    def left(self, reach: Tensor, at: Tensor | slice) -> Tensor:
        """``reach @ ∂h_next/∂z``.

        Args:
            reach: (E, R, W), suffix products of the samples ``at``.
            at: which of the N samples: LongTensor (E,) or a slice.

        Returns:
            (E, K, L, R, O).
        """
        ...

    def largest(self) -> Tensor:
        """The largest absolute value, a scalar tensor; NaN if there is one."""
        ...


@dataclass(frozen=True, slots=True)
class DenseOutputJacobian:
    """Every entry written out.

    Attributes:
        values: (W, N, K, L, O).
    """

    values: Tensor

    def left(self, reach: Tensor, at: Tensor | slice) -> Tensor:
        """See ``Response``. Cost: E·R·W·K·L·O multiply-adds."""
        return products(reach, self.values[:, at])

    def largest(self) -> Tensor:
        """See ``Response``."""
        return largest(self.values)


@dataclass(frozen=True, slots=True)
class UnitwiseOutputJacobian:
    """Unit by unit: state part s of unit i responds to gate g of unit i alone, as in PyTorch's recurrent cells.

    Attributes:
        values: (N, S, G, U): ``∂h_next[s, i]/∂z[g, i]``; the state has S·U entries, z has G·U, K = L = 1.
    """

    values: Tensor

    def left(self, reach: Tensor, at: Tensor | slice) -> Tensor:
        """See ``Response``. Cost: E·R·S·G·U multiplications."""
        values = self.values[at].unsqueeze(1)  # (E, 1, S, G, U)
        e, _, s, g, u = values.shape
        parts = reach.reshape(e, -1, s, 1, u)
        left = parts[:, :, 0] * values[:, :, 0]
        for k in range(1, s):
            left.addcmul_(parts[:, :, k], values[:, :, k])
        return left.reshape(e, 1, 1, left.shape[1], g * u)

    def largest(self) -> Tensor:
        """See ``Response``."""
        return largest(self.values)


def largest(values: Tensor) -> Tensor:
    """The largest absolute value, a scalar tensor without a copy; NaN if there is one, 0 of nothing."""
    if not values.numel():
        return values.new_zeros(())
    low, high = torch.aminmax(values)
    return torch.maximum(high, -low)


def products(reach: Tensor, values: Tensor) -> Tensor:
    """``out[e, k, l] = reach[e] @ values[:, e, k, l]``, (E, K, L, R, O), of reach (E, R, W), values (W, E, K, L, O)."""
    w, e, k, length, o = values.shape
    r = reach.shape[1]
    if k * length == 1:
        return torch.bmm(reach, values.reshape(w, e, o).transpose(0, 1)).view(e, 1, 1, r, o)
    if k * length > _FEW:
        left = torch.bmm(reach, values.reshape(w, e, -1).transpose(0, 1))
        return left.view(e, r, k, length, o).permute(0, 2, 3, 1, 4)
    out = reach.new_empty(e, k, length, r, o)
    for i in range(k):
        for j in range(length):
            torch.bmm(reach, values[:, :, i, j].transpose(0, 1), out=out[:, i, j])
    return out
