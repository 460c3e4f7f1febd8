"""Learning rules for copies of a cell: truncated backpropagation, and influences that leave something out.

They give the gradients of `rtrl.learners` and are faster, because they linearise all steps of a run at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from rtrl.learners.uoro import balance
from rtrl.verification.rivals.copies import CHUNK, Copies, Recorded


class Rule(ABC):
    """A rule that gives the gradients of runs that follow one another.

    Args:
        copies: the cells.
    """

    def __init__(self, copies: Copies) -> None:
        self.copies = copies

    @abstractmethod
    def reset(self) -> None:
        """Forget the past: the next run begins in first states."""

    @abstractmethod
    def gradient(self, run: Recorded, dys: Tensor) -> dict[str, Tensor]:
        """Return the gradient of the losses of a run, and remember the run.

        Args:
            run: the steps, whose first state is the last one of the run before.
            dys: the gradients of the losses at the outputs (T, K, B, d_out).

        Returns:
            name → gradient (K, ...).
        """


class TruncatedRule(Rule):
    """Backpropagation through the last steps alone: `rtrl.learners.TBPTT` with a sliding window.

    Args:
        copies: the cells.
        horizon: the number of steps that a loss reaches back through, its own included.
    """

    def __init__(self, copies: Copies, horizon: int) -> None:
        super().__init__(copies)
        self.horizon = horizon
        self.reset()

    def reset(self) -> None:
        self._xs: list[Tensor] = []
        self._hs: list[Tensor] = []

    def gradient(self, run: Recorded, dys: Tensor) -> dict[str, Tensor]:
        self._xs += run.xs
        self._hs += run.hs
        before = len(self._xs) - len(dys)
        starts: dict[int, list[int]] = {}  # the number of steps of a window → the steps whose losses have it
        for t in dys.flatten(1).any(dim=1).nonzero().flatten().tolist():
            starts.setdefault(min(self.horizon, before + t + 1), []).append(t)
        total = {name: torch.zeros_like(value) for name, value in self.copies.values.items()}
        for length, ts in starts.items():
            # The windows of several losses run side by side, as samples.
            h = torch.cat([self._hs[before + t + 1 - length] for t in ts], dim=1)
            for i in range(length):
                y, h = self.copies.step(torch.cat([self._xs[before + t + 1 - length + i] for t in ts], dim=1), h)
            parts = torch.autograd.grad(
                y, list(self.copies.values.values()), torch.cat([dys[t] for t in ts], dim=1), materialize_grads=True
            )
            for name, part in zip(total, parts, strict=True):
                total[name] += part
        self._xs, self._hs = self._xs[-self.horizon :], self._hs[-self.horizon :]
        return total


class InfluenceRule(Rule):
    """A rule that carries an influence S (K, B, H, P), or an estimate of it, by ``advance``."""

    def __init__(self, copies: Copies) -> None:
        super().__init__(copies)
        self.reset()

    def reset(self) -> None:
        self.carried: tuple[Tensor, ...] = ()

    @abstractmethod
    def advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        """Return what is carried after a step with J (K, B, H, H) and B (K, B, H, P); nothing is carried at first."""

    def pull(self, adjoint: Tensor) -> Tensor:
        """Return ``Σ_b δ_b S_b`` (K, P) for adjoints (K, B, H)."""
        return torch.einsum("kbh,kbhp->kp", adjoint, self.carried[0])

    def gradient(self, run: Recorded, dys: Tensor) -> dict[str, Tensor]:
        adjoint, total = self.copies.direct(run, dys)
        part = max(CHUNK // self.copies.numbers_per_step(run), 1)
        has_loss = adjoint.flatten(1).any(dim=1).tolist()
        for start in range(0, len(dys), part):
            piece = Recorded(run.xs[start : start + part], run.hs[start : start + part], run.ys, run.last)
            for t, (dynamics, immediate) in enumerate(zip(*self.copies.jacobians(piece), strict=True), start):
                if self.carried and has_loss[t]:
                    total = total + self.pull(adjoint[t])
                self.carried = self.advance(dynamics, immediate)
        return self.copies.by_name(total)


class MaskedRule(InfluenceRule):
    """The influence inside a pattern: ``S ← M ∘ (J S + B)``.

    Args:
        copies: the cells.
        pattern: M, Boolean (H, P). None for SnAp-1: the entries that a parameter was seen to drive at once, so far.
    """

    def __init__(self, copies: Copies, pattern: Tensor | None = None) -> None:
        self._given = self._pattern = pattern
        super().__init__(copies)

    def advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        pattern = self._given
        if pattern is None:
            seen = (immediate != 0).any(dim=1, keepdim=True)
            pattern = self._pattern = seen if self._pattern is None else self._pattern | seen
        whole = dynamics @ self.carried[0] + immediate if self.carried else immediate
        return (whole * pattern,)


class LeakingRule(InfluenceRule):
    """RFLO: ``S ← (1 − leak) S + B``.

    Args:
        copies: the cells.
        leak: the leak of a unit, in 0 … 1.
    """

    def __init__(self, copies: Copies, leak: float) -> None:
        self.leak = leak
        super().__init__(copies)

    def advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return ((1 - self.leak) * self.carried[0] + immediate if self.carried else immediate,)


class RankOneRule(InfluenceRule):
    """UORO: a random influence of rank one whose mean is the exact one.

    Args:
        copies: the cells.
        generators: one for each copy.
    """

    def __init__(self, copies: Copies, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        super().__init__(copies)

    def advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        shape = immediate.shape[1:3]
        signs = torch.stack([torch.randint(0, 2, shape, generator=one) for one in self._generators]).to(immediate)
        signs = signs * 2 - 1
        driven = torch.einsum("kbi,kbip->kbp", signs, immediate)
        by_state, by_theta = self.carried or (torch.zeros_like(signs), torch.zeros_like(driven))
        moved = torch.einsum("kbij,kbj->kbi", dynamics, by_state)
        rho_0, rho_1 = _balance(by_theta, moved), _balance(driven, signs)
        return rho_0 * moved + rho_1 * signs, by_theta / rho_0 + driven / rho_1

    def pull(self, adjoint: Tensor) -> Tensor:
        by_state, by_theta = self.carried
        pulled: Tensor = torch.einsum("kbh,kbh,kbp->kp", adjoint, by_state, by_theta)
        return pulled


def _balance(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``balance`` of all samples of all copies, (K, B, 1)."""
    return balance(numerator.flatten(0, 1), denominator.flatten(0, 1)).view(*numerator.shape[:2], 1)


def of_layers(copies: Copies) -> Tensor:
    """Return the pattern (H, P) of RTRL within each layer: of each parameter, the entries of its own layer.

    Args:
        copies: cells with ``layer_entries()``.
    """
    layers = copies.cell.layer_entries()
    size = sum(len(entries) for entries in layers.values())
    parts = []
    for name, value in copies.values.items():
        own = torch.zeros(size, value[0].numel(), dtype=torch.bool)
        for prefix, entries in layers.items():
            if name.startswith(prefix):
                own[entries] = True
        parts.append(own)
    return torch.cat(parts, dim=1)
