"""A cell with analytic steps beyond PyTorch's own."""

from typing import Any

import torch
from torch import Tensor, nn

from rtrl.cells import AnalyticStep, UnitTap


class TwoMaps(nn.Module):
    """``tanh(x + A h) + ½ sin(B h)``, y of the state before and after; x may be of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

    def init_state(self, batch_size: int) -> Tensor:
        return self.a.weight.new_full((batch_size, 3), 0.3)

    def readout(self, h: Tensor, h_next: Tensor) -> Any:
        return self.before(h), self.after(h_next).square(), self.after(h * h_next)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        h_next = torch.tanh(x.to(h.dtype) + self.a(h)) + 0.5 * torch.sin(self.b(h))
        return self.readout(h, h_next), h_next

    def analytic_step(self, x: Tensor, h: Tensor) -> AnalyticStep:
        with torch.no_grad():
            first, second = torch.tanh(x.to(h.dtype) + self.a(h)), self.b(h)
            h_next = first + 0.5 * torch.sin(second)
            slopes = [s[:, None, None] for s in (1 - first.square(), 0.5 * torch.cos(second))]
        h_next.requires_grad_()
        taps = [
            UnitTap(self.a.weight, self.a.bias, h.detach(), slopes[0], 0),
            UnitTap(self.b.weight, None, h.detach(), slopes[1], 0),
        ]
        return AnalyticStep(self.readout(h, h_next), h_next, taps)
