"""Biased learners as their papers write them, by hand and for one cell each: the loss reads the new state and meets the
new trace. Each is also wrong in ways that are easy to get wrong. Nothing of ``rtrl`` is used."""

import math
from typing import Any

import torch
from torch import Tensor, nn


class LeakyRNN(nn.Module):
    """``(1 − leak) h + leak tanh(W x + U h)``; y is linear in the new state."""

    def __init__(self, leak: float = 0.4) -> None:
        super().__init__()
        self.leak = leak
        self.inward = nn.Parameter(torch.empty(3, 2))
        self.recurrent = nn.Parameter(torch.empty(3, 3))
        self.readout = nn.Parameter(torch.empty(2, 3))

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.new_full((batch_size, 3), 0.3)

    def seen(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        drive = torch.tanh(x @ self.inward.T + self.seen(h) @ self.recurrent.T)
        h_next = (1 - self.leak) * h + self.leak * drive
        return h_next @ self.readout.T, h_next


class SurrogateRNN(LeakyRNN):
    """The same forward pass; the backward pass stops at the recurrent weights, so that J is ``(1 − leak) I``."""

    def seen(self, h: Tensor) -> Tensor:
        return h.detach()


class RFLO:
    """Murray 2019: ``p ← (1 − leak) p + leak φ'(u) ⊗ h``, with the true feedback weights."""

    def __init__(self, cell: LeakyRNN, batch_size: int) -> None:
        self.cell = cell
        self.h = cell.init_state(batch_size).detach()
        self.traces = {"inward": self.h.new_zeros(batch_size, 3, 2), "recurrent": self.h.new_zeros(batch_size, 3, 3)}
        self.total = {name: torch.zeros_like(p) for name, p in cell.named_parameters()}

    def kept(self, slope: Tensor) -> Tensor:
        """What multiplies the trace of each unit, (B, H)."""
        return torch.full_like(slope, 1 - self.cell.leak)

    def immediate(self, slope: Tensor) -> Tensor:
        return self.cell.leak * slope

    def step(self, x: Tensor) -> Tensor:
        cell = self.cell
        with torch.no_grad():
            drive = torch.tanh(x @ cell.inward.T + self.h @ cell.recurrent.T)
            slope = 1 - drive.square()
            before = {"inward": x, "recurrent": self.h}
            self.old = dict(self.traces)
            for name, trace in self.traces.items():
                new = torch.einsum("bi,bj->bij", self.immediate(slope), before[name])
                self.traces[name] = self.kept(slope).unsqueeze(2) * trace + new
            self.h = (1 - cell.leak) * self.h + cell.leak * drive
            y = self.h @ cell.readout.T
        self.y = y.requires_grad_()
        return self.y

    def met(self) -> dict[str, Tensor]:
        return self.traces

    def sent_back(self, by_y: Tensor) -> Tensor:
        return by_y @ self.cell.readout.detach()

    def backward(self, loss: Tensor) -> None:
        (by_y,) = torch.autograd.grad(loss, self.y)
        by_state = self.sent_back(by_y)
        self.total["readout"] = self.total["readout"] + by_y.T @ self.h
        for name, trace in self.met().items():
            self.total[name] = self.total[name] + torch.einsum("bi,bij->ij", by_state, trace)

    def sync(self) -> None:
        for name, p in self.cell.named_parameters():
            p.grad = self.total[name].clone() if p.grad is None else p.grad + self.total[name]
            self.total[name] = torch.zeros_like(p)


class RFLOWithoutLeak(RFLO):
    def kept(self, slope: Tensor) -> Tensor:
        return torch.ones_like(slope)


class RFLOBehind(RFLO):
    """The loss meets the trace of the step before."""

    def met(self) -> dict[str, Tensor]:
        return self.old


class RFLOSlopeTwice(RFLO):
    def immediate(self, slope: Tensor) -> Tensor:
        return self.cell.leak * slope.square()


class Diagonal(RFLO):
    """The diagonal of the dynamics Jacobian carries the trace (D-RTRL)."""

    def kept(self, slope: Tensor) -> Tensor:
        return 1 - self.cell.leak + self.cell.leak * slope * self.cell.recurrent.detach().diagonal()


class DiagonalOldSlope(Diagonal):
    """The slope of the step before."""

    slope: Any = None

    def kept(self, slope: Tensor) -> Tensor:
        found = super().kept(slope if self.slope is None else self.slope)
        self.slope = slope
        return found


class KeRNL(RFLO):
    """Roth, Kanitscheider and Fiete 2019, with kernels that are not learned: ``e ← exp(−γ) e + φ' ⊗ h``, and the loss
    of unit i reaches unit j by ``β_ij``."""

    gamma = (0.3, 0.7, 1.1)
    beta = ((1.0, 0.2, -0.3), (0.1, 0.9, 0.4), (-0.2, 0.3, 1.1))

    def kept(self, slope: Tensor) -> Tensor:
        return slope.new_tensor([math.exp(-rate) for rate in self.gamma]).expand_as(slope)

    def sent_back(self, by_y: Tensor) -> Tensor:
        return super().sent_back(by_y) @ by_y.new_tensor(self.beta)


class KeRNLTransposed(KeRNL):
    def sent_back(self, by_y: Tensor) -> Tensor:
        return RFLO.sent_back(self, by_y) @ by_y.new_tensor(self.beta).T


class KeRNLRateNotExponent(KeRNL):
    def kept(self, slope: Tensor) -> Tensor:
        return 1 - slope.new_tensor(self.gamma).expand_as(slope)


class _Spike(torch.autograd.Function):
    """A step function with a triangular pseudo-derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (v,) = ctx.saved_tensors
        return grad * pseudo(v)


def pseudo(v: Tensor) -> Tensor:
    return 0.5 * (1 - v.abs() / 2).clamp(min=0)


class AdaptiveSpikes(nn.Module):
    """Spiking units with adaptive thresholds: the state (B, n, 2) holds the voltage v and the adaptation a of each."""

    alpha, rho, beta = 0.8, 0.9, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.empty(2, 2))
        self.recurrent = nn.Parameter(torch.empty(2, 2))
        self.readout = nn.Parameter(torch.empty(2, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.new_tensor([[0.3, 0.1], [-0.2, 0.2]]).repeat(batch_size, 1, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        v, a = h.unbind(dim=2)
        spikes = _Spike.apply(v - self.beta * a)
        v_next = self.alpha * v + x @ self.inward.T + spikes @ self.recurrent.T
        h_next = torch.stack([v_next, self.rho * a + spikes], dim=2)
        return _Spike.apply(h_next[..., 0] - self.beta * h_next[..., 1]) @ self.readout.T, h_next


class EProp:
    """Bellec et al. 2020, symmetric: eligibility vectors of v and a within each unit; spikes sent to others are not
    followed."""

    def __init__(self, cell: AdaptiveSpikes, batch_size: int) -> None:
        self.cell = cell
        self.v, self.a = cell.init_state(batch_size).detach().unbind(dim=2)
        zero = self.v.new_zeros(batch_size, 2, 2)
        self.traces = {"inward": (zero, zero), "recurrent": (zero, zero)}
        self.total = {name: torch.zeros_like(p) for name, p in cell.named_parameters()}

    def adapted(self, of_v: Tensor, of_a: Tensor, psi: Tensor) -> Tensor:
        return psi * of_v + (self.cell.rho - psi * self.cell.beta) * of_a

    def step(self, x: Tensor) -> Tensor:
        cell = self.cell
        with torch.no_grad():
            excess = self.v - cell.beta * self.a
            psi, spikes = pseudo(excess).unsqueeze(2), (excess > 0).to(x)
            for name, before in (("inward", x), ("recurrent", spikes)):
                of_v, of_a = self.traces[name]
                self.traces[name] = cell.alpha * of_v + before.unsqueeze(1), self.adapted(of_v, of_a, psi)
            self.v = cell.alpha * self.v + x @ cell.inward.T + spikes @ cell.recurrent.T
            self.a = cell.rho * self.a + spikes
            self.excess = self.v - cell.beta * self.a
            self.spikes = (self.excess > 0).to(x)
        self.y = (self.spikes @ cell.readout.detach().T).requires_grad_()
        return self.y

    def backward(self, loss: Tensor) -> None:
        (by_y,) = torch.autograd.grad(loss, self.y)
        signal = (by_y @ self.cell.readout.detach()) * pseudo(self.excess)
        self.total["readout"] = self.total["readout"] + by_y.T @ self.spikes
        for name, (of_v, of_a) in self.traces.items():
            eligibility = of_v - self.cell.beta * of_a
            self.total[name] = self.total[name] + torch.einsum("bi,bij->ij", signal, eligibility)

    sync = RFLO.sync


class EPropWithoutAdaptation(EProp):
    def adapted(self, of_v: Tensor, of_a: Tensor, psi: Tensor) -> Tensor:
        return torch.zeros_like(of_a)


class EPropResets(EProp):
    """The adaptation's trace forgets that adaptation changes the spike."""

    def adapted(self, of_v: Tensor, of_a: Tensor, psi: Tensor) -> Tensor:
        return psi * of_v + self.cell.rho * of_a


class SnAp:
    """Menick et al. 2021 for units that see themselves and their neighbour (the cell ``Ring``): the influence is masked
    after the update, and a loss that reads the new state meets the masked one."""

    order = 1

    def __init__(self, cell: Any, batch_size: int) -> None:
        self.cell = cell
        self.h = cell.init_state(batch_size).detach()
        self.theta = [cell.inward, cell.recurrent]
        self.sizes = [p.numel() for p in self.theta]
        self.influence = self.h.new_zeros(batch_size, 4, sum(self.sizes))
        self.total = [torch.zeros_like(p) for p in self.theta]

    def mask(self, name: str) -> Tensor:
        return dict(zip(("inward", "recurrent"), self.masks().split(self.sizes, dim=1), strict=True))[name]

    def masks(self) -> Tensor:
        """The entries that a weight drives at once, and after ``order − 1`` more steps of the ring."""
        units = torch.cat([torch.arange(4).repeat_interleave(p.shape[1]) for p in self.theta])
        distance = (torch.arange(4)[:, None] - units) % 4
        return distance < self.order

    def step(self, x: Tensor) -> Tensor:
        cell = self.cell
        with torch.no_grad():
            weight = cell.recurrent * cell.ring
            after = torch.tanh(x @ cell.inward.T + self.h @ weight.T)
            slope = 1 - after.square()
            eye, size = torch.eye(4).to(x), len(x)
            by_in = torch.einsum("bi,ir,bc->birc", slope, eye, x).reshape(size, 4, -1)
            by_rec = torch.einsum("bi,ir,rc,bc->birc", slope, eye, cell.ring.to(x), self.h).reshape(size, 4, -1)
            self.old = self.influence
            whole = slope.unsqueeze(2) * weight @ self.influence + torch.cat([by_in, by_rec], dim=2)
            self.influence, self.whole = whole * self.masks(), whole
            self.y = torch.cat([self.h, after], dim=1).requires_grad_()
            self.h = after
        return self.y

    def met_by_new(self) -> Tensor:
        return self.influence

    def backward(self, loss: Tensor) -> None:
        (by_y,) = torch.autograd.grad(loss, self.y)
        by_old, by_new = by_y.split(4, dim=1)
        found = torch.einsum("bh,bhp->p", by_old, self.old) + torch.einsum("bh,bhp->p", by_new, self.met_by_new())
        parts = zip(self.theta, found.split(self.sizes), self.total, strict=True)
        self.total = [total + part.reshape(p.shape) for p, part, total in parts]

    def sync(self) -> None:
        for p, total in zip(self.theta, self.total, strict=True):
            p.grad = total.clone() if p.grad is None else p.grad + total
        self.total = [torch.zeros_like(p) for p in self.theta]


class SnApMaskedLater(SnAp):
    """The mask is applied after the loss met the influence: the law ``Masked()``."""

    def met_by_new(self) -> Tensor:
        return self.whole


class SnApMasksWholeUnits(SnAp):
    """Masks one more entry than it says."""

    def step(self, x: Tensor) -> Tensor:
        y = super().step(x)
        self.influence = self.influence * (torch.arange(24) != 8)
        return y
