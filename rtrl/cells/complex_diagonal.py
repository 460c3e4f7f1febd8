"""Cells with a complex diagonal recurrence, held as pairs of real numbers: linear recurrent units, trace units."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.cells.row_groups import rows_of
from rtrl.errors import ConfigError


class _ComplexDiagonal(nn.Module):
    """The base of cells whose state (B, hidden, 2) is hidden complex numbers, each multiplied by its own λ.

    Equation:
        ``λ = r·exp(iθ)`` with ``r = exp(−exp(nu_log))`` and ``θ = exp(theta_log)``; at first, r² is uniform in
        ``r_min²`` … ``r_max²`` and θ uniform in 0 … ``max_phase``.
    """

    def __init__(self, d_in: int, hidden: int, r_min: float, r_max: float, max_phase: float) -> None:
        super().__init__()
        self.d_in, self.hidden = validation.integer("d_in", d_in), validation.integer("hidden", hidden)
        low, high = validation.fraction("r_min", r_min), validation.fraction("r_max", r_max)
        if low > high or not high:
            raise ConfigError(f"need r_min ≤ r_max and r_max > 0, got {r_min} and {r_max}")
        phase = validation.positive("max_phase", max_phase)
        eps = torch.finfo(torch.get_default_dtype()).eps
        square, part = (torch.empty(hidden).uniform_(eps, 1 - eps) for _ in range(2))
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(low**2 + square * (high**2 - low**2))))
        self.theta_log = nn.Parameter(torch.log(phase * part))
        self.input = nn.Linear(d_in, 2 * hidden, bias=False)

    def init_state(self, batch_size: int) -> Tensor:
        """Return zeros (batch_size, hidden, 2).

        Raises:
            ConfigError: ``batch_size`` is not a positive integer.
        """
        return self.nu_log.new_zeros(validation.integer("batch_size", batch_size), self.hidden, 2)

    def row_groups(self) -> list[Tensor]:
        """Return one group of ``hidden`` independent rows of two entries; see ``rtrl.cells.row_groups``."""
        return rows_of(self.hidden, 2)

    def _radius(self) -> Tensor:
        return torch.exp(-torch.exp(self.nu_log))

    def _advanced(self, radius: Tensor, gain: Tensor, x: Tensor, h: Tensor) -> Tensor:
        """``λ h + gain·(B x)`` in pairs: λ h is cos-times the pair plus sin-times the pair turned by a right angle."""
        theta = torch.exp(self.theta_log)
        along, across = (radius * torch.cos(theta)).unsqueeze(1), radius * torch.sin(theta)
        across = torch.stack([-across, across], dim=1)
        drive = self.input(x).unflatten(-1, (self.hidden, 2)) * gain.unsqueeze(1)
        return torch.addcmul(torch.addcmul(drive, along, h), across, h.flip(-1))


class LRU(_ComplexDiagonal):
    """Build a linear recurrent unit: a complex diagonal linear recurrence between two linear maps.

    Equation:
        ``h' = λ ⊙ h + exp(γ) ⊙ (B x)`` and ``y = Re(C h') + D x`` with ``λ = exp(−exp(ν) + i exp(θ))``; h, λ, B and C
        are complex. At first ``exp(γ)² = 1 − |λ|²``.

    Args:
        d_in: width of the input.
        hidden: number of complex units; the state is (B, hidden, 2), real and imaginary parts.
        d_out: width of the output; ``d_in`` by default.
        r_min: the least ``|λ|`` at first.
        r_max: the largest ``|λ|`` at first.
        max_phase: the largest angle of λ at first.

    Attributes:
        nu_log: ν, (hidden,).
        theta_log: θ, (hidden,).
        gamma_log: γ, (hidden,).
        input: B, (2·hidden, d_in): row 2i is the real part of row i, row 2i + 1 its imaginary part.
        output: C, (d_out, 2·hidden): column 2i is the real part of column i, column 2i + 1 minus its imaginary part.
        skip: D, (d_out, d_in).

    Raises:
        ConfigError: a size is not a positive integer, a radius is not in 0 … 1, or ``r_min`` exceeds ``r_max``.

    Cost:
        2·hidden·(d_in + d_out) + d_in·d_out multiply-adds per sample.

    Source:
        Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks for Long Sequences", ICML, section 3; Zucchet et
        al. (2023), "Online learning of long-range dependencies", NeurIPS, section 3, where D is a diagonal.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.LRU(3, 5, 2)
        >>> y, h = cell(torch.ones(4, 3), cell.init_state(4))
        >>> y.shape, h.shape
        (torch.Size([4, 2]), torch.Size([4, 5, 2]))
    """

    def __init__(
        self,
        d_in: int,
        hidden: int,
        d_out: int | None = None,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__(d_in, hidden, r_min, r_max, max_phase)
        self.d_out = d_in if d_out is None else validation.integer("d_out", d_out)
        with torch.no_grad():
            self.gamma_log = nn.Parameter(0.5 * torch.log1p(-self._radius().square()))
        self.output = nn.Linear(2 * hidden, self.d_out, bias=False)
        self.skip = nn.Linear(d_in, self.d_out, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step; the output is read from the next state and the input."""
        h = self._advanced(self._radius(), torch.exp(self.gamma_log), x, h)
        return self.output(h.flatten(1)) + self.skip(x), h


class RTU(_ComplexDiagonal):
    """Build recurrent trace units: pairs of numbers that a step turns, shrinks and drives.

    Equation:
        ``a₁ = r cos θ ⊙ h₁ − r sin θ ⊙ h₂ + γ ⊙ W₁ x`` and ``a₂ = r cos θ ⊙ h₂ + r sin θ ⊙ h₁ + γ ⊙ W₂ x`` with
        ``r = exp(−exp(ν))``, ``θ = exp(theta_log)`` and ``γ = √(1 − r²)``. Nonlinear: ``h' = f(a)``, and the output is
        h'. Linear: ``h' = a``, and the output is ``f(h')``. Outputs are (B, 2·hidden), pair after pair.

    Args:
        d_in: width of the input.
        hidden: number of pairs; the state is (B, hidden, 2).
        linear: a linear recurrence, with f at the output alone.
        activation: f, a module that acts entry by entry; ``nn.Tanh()`` by default.
        r_min: the least r at first.
        r_max: the largest r at first.
        max_phase: the largest θ at first.

    Attributes:
        nu_log: ν, (hidden,).
        theta_log: log θ, (hidden,).
        input: W, (2·hidden, d_in): row 2i is row i of W₁, row 2i + 1 is row i of W₂.

    Raises:
        ConfigError: a size is not a positive integer, a radius is not in 0 … 1, ``r_min`` exceeds ``r_max``, or
            ``activation`` is not a module.

    Cost:
        2·hidden·d_in multiply-adds per sample.

    Source:
        Elelimy et al. (2024), "Real-Time Recurrent Learning using Trace Units in Reinforcement Learning", NeurIPS,
        section 3.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.RTU(3, 5, linear=True)
        >>> y, h = cell(torch.ones(4, 3), cell.init_state(4))
        >>> y.shape, h.shape
        (torch.Size([4, 10]), torch.Size([4, 5, 2]))
    """

    def __init__(
        self,
        d_in: int,
        hidden: int,
        *,
        linear: bool = False,
        activation: nn.Module | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__(d_in, hidden, r_min, r_max, max_phase)
        self.linear = bool(linear)
        self.activation: Any = nn.Tanh() if activation is None else activation
        if not isinstance(self.activation, nn.Module):
            raise ConfigError(f"activation must be a torch.nn.Module, got {type(activation).__name__}")

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step; the output has both numbers of every pair."""
        radius = self._radius()
        pair = self._advanced(radius, torch.sqrt(1 - radius.square()), x, h)
        active = self.activation(pair)
        return active.flatten(1), pair if self.linear else active
