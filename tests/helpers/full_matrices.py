"""Transitions as the full matrices that they stand for."""

import torch
from torch import Tensor

from rtrl._influence.transition import Transition


def written_out(item: Transition) -> tuple[Tensor, Tensor]:
    """Φ and v as full matrices, put together entry by entry here, not by the code under test."""
    batch, n, d = item.jacobian.shape[0], item.n, item.width
    phi, v = torch.zeros(batch, n * d, n * d, dtype=torch.float64), torch.zeros(batch, n * d, dtype=torch.float64)
    for b in range(batch):
        rows = range(n) if item.rows is None else item.rows[b].tolist()
        cols = range(n) if item.cols is None else item.cols[b].tolist()
        for i in range(n):
            if i not in list(rows):
                phi[b, i * d : (i + 1) * d, i * d : (i + 1) * d] = torch.eye(d, dtype=torch.float64)
        for j, col in enumerate(cols):
            v[b, col * d : (col + 1) * d] = item.adjoint[b, j * d : (j + 1) * d]
            for i, row in enumerate(rows):
                phi[b, row * d : (row + 1) * d, col * d : (col + 1) * d] = item.jacobian[
                    b, i * d : (i + 1) * d, j * d : (j + 1) * d
                ]
    return phi, v
