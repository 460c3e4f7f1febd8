"""Cells with complex states, parameters and outputs, none of them holomorphic."""

from typing import Any

import torch
from torch import Tensor, nn

import rtrl


def complex_noise(*shape: int, generator: torch.Generator, scale: float = 0.5) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.complex128, generator=generator)


class ComplexCell(nn.Module):
    """A complex state (B, n) with a bounded modulus that also sees its conjugate; real and complex parameters, and y a
    pair of a real and a complex tensor."""

    def __init__(self, d_in: int = 2, n: int = 2, *, learned: bool = False, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.rate = nn.Parameter(complex_noise(n, generator=g))
        self.mirror = nn.Parameter(complex_noise(n, generator=g))
        self.enter = nn.Parameter(complex_noise(n, d_in, generator=g))
        self.bias = nn.Parameter(torch.randn(n, dtype=torch.float64, generator=g))
        self.read = nn.Linear(2 * n, 2, dtype=torch.float64)
        self.phase = nn.Parameter(complex_noise(n, generator=g))
        self.first = nn.Parameter(complex_noise(n, generator=g)) if learned else None
        with torch.no_grad():
            self.read.weight.copy_(torch.randn(2, 2 * n, dtype=torch.float64, generator=g))
            self.read.bias.copy_(torch.randn(2, dtype=torch.float64, generator=g))

    def init_state(self, batch_size: int) -> Tensor:
        if self.first is not None:
            return self.first.expand(batch_size, -1)
        return torch.full((batch_size, len(self.rate)), 0.2 + 0.1j, dtype=self.rate.dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        z = self.rate * h + self.mirror * h.conj() + x.to(self.enter.dtype) @ self.enter.T + self.bias
        h = z / (1 + z.abs().square())
        return (self.read(torch.view_as_real(h).flatten(1)), h * self.phase), h


class ComplexWeights(nn.Module):
    """A real state (B, n) and complex parameters alone, one of them in slices."""

    def __init__(self, d_in: int = 2, n: int = 3, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(complex_noise(n, n, generator=g))
        self.enter = nn.Parameter(complex_noise(d_in, n, generator=g))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, len(self.weight), dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z = h.to(self.weight.dtype) @ self.weight + x.to(self.enter.dtype) @ self.enter
        h = torch.tanh(z.real * z.imag + z.abs())
        return h, h


class SparseComplex(nn.Module):
    """A complex state (B, 3), of which a step reads and writes the row that x names, with that row's parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.rate, self.enter = (nn.Parameter(complex_noise(3, generator=g, scale=0.7)) for _ in range(2))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 3), 0.3 - 0.4j, dtype=torch.complex128)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        row = (x[:, 1:] > 0).long() + (x[:, 1:] > 1).long()
        z = self.rate[row] * h.gather(1, row).conj() + self.enter[row] * x[:, :1]
        used = rtrl.Sparsity(row, row, {"rate": row, "enter": row})
        return z, h.scatter(1, row, z), used


def complex_loss(t: int, y: Any) -> Tensor | None:
    """A real loss of every tensor of y, with other weights for real and imaginary parts; none at one step."""
    if t == 3:
        return None
    total = torch.zeros((), dtype=torch.float64)
    for leaf in [y] if isinstance(y, Tensor) else y:
        real = (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).flatten(1)
        total = total + (real * torch.linspace(0.5, 2.0, real.shape[1], dtype=real.dtype)).square().sum() + real.sum()
    return total
