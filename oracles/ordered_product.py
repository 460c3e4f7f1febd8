"""The ordered product of (dynamics Jacobian, adjoint) pairs, one factor at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ordered_product(
    elements: Sequence[tuple[Tensor, Tensor]],
    *,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    batch: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Multiply the Jacobians of the steps s … t-1, and take their adjoints back to the state before step s.

    Equation:
        Φ = J_{t-1} … J_s  and  v = Σ_i δ_i J_{i-1} … J_s.

    Args:
        elements: pairs `(J, adjoint)`, earliest step first; J (..., H, H) and adjoint (..., H), all of one shape.
        size: H, needed where `elements` is empty.
        dtype: dtype of the identity where `elements` is empty.
        batch: leading shape of the identity where `elements` is empty.

    Returns:
        `(Φ, v)` of shapes (..., H, H) and (..., H); for no elements the identity (I, 0).

    Raises:
        ValueError: no elements and no `size`, or shapes that do not fit.

    Cost:
        One matrix product (H³) for each element.
    """
    if len(elements) > 0:
        shape = elements[0][0].shape
        if len(shape) < 2 or shape[-1] != shape[-2] or size not in (None, shape[-1]):
            raise ValueError(f"J must be square, of the given size, got shape {tuple(shape)}")
        for i, (jacobian, adjoint) in enumerate(elements):
            if jacobian.shape != shape or adjoint.shape != shape[:-1]:
                raise ValueError(f"element {i} has shapes {tuple(jacobian.shape)} and {tuple(adjoint.shape)}, "
                                 f"expected {tuple(shape)} and {tuple(shape[:-1])}")  # fmt: skip
        like = elements[0][0]
        phi = torch.eye(shape[-1], dtype=like.dtype, device=like.device).expand(shape)
    elif size is not None:
        phi = torch.eye(size, dtype=dtype).expand(*batch, size, size)
    else:
        raise ValueError("no elements: the identity needs a size")
    vector = torch.zeros_like(phi[..., 0])
    for jacobian, adjoint in elements:
        vector = vector + (adjoint.unsqueeze(-2) @ phi).squeeze(-2)  # δ_i times the steps before i
        phi = jacobian @ phi
    return phi.clone(), vector
