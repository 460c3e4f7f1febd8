"""Unbiased online recurrent optimization: a random influence of rank one whose mean is the exact one."""

from typing import Any

import torch
from torch import Tensor, nn

from rtrl.errors import ConfigError
from rtrl.learners.influence_learner import InfluenceLearner
from rtrl.learners.replayed_step import ReplayedStep
from rtrl.learners.state import LearnerState


class UORO(InfluenceLearner):
    """A rank-one estimate of the influence for each sample, drawn so that its mean is the influence.

    Equation:
        ``S̃_t = s̃_t ⊗ θ̃_t`` with ``s̃_{t+1} = ρ₀ J_t s̃_t + ρ₁ ν_t`` and
        ``θ̃_{t+1} = θ̃_t / ρ₀ + νᵀ_t B_t / ρ₁``, where the entries of ν are ±1 with equal chance,
        ``ρ₀ = √(‖θ̃_t‖ / ‖J_t s̃_t‖)`` and ``ρ₁ = √(‖νᵀ_t B_t‖ / ‖ν_t‖)`` balance the norms. A term that is zero is left
        out (its ρ is 1); an ε is not needed. A learned first state starts as ``s̃_0 = ρ₁ ν``,
        ``θ̃_0 = νᵀ ∂h₀/∂θ / ρ₁``.

    Law:
        Unbiased, ``E S̃_t = S_t`` and so is each gradient, as long as parameters do not depend on the draws. The
        variance grows with H and with how far the past reaches.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with P trainable numbers.
        batch_size: B; each sample has draws of its own.
        generator: a CPU generator for ν; PyTorch's global one by default.
        state: the first state (B, n, ...) with H entries per sample; ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, the generator is not a generator on the CPU, or the cell has no
            trainable parameter or no first state.

    Cost:
        ``B·(H + P)`` numbers held between steps. This reference takes ``J s̃`` and ``νᵀB`` from the full Jacobians:
        ``B·H·(H + P)`` multiply-adds and ``B·(H + 1)`` backward passes per step; the method itself needs one
        forward-mode and one backward pass.

    Source:
        Tallec and Ollivier (2017), "Unbiased Online Recurrent Optimization", algorithm 1.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import UORO
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4))
        >>> learner = UORO(cell, batch_size=2, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
        >>> torch.linalg.matrix_rank(learner.influence("cell.weight_hh")).tolist()
        [1, 1]
    """

    def __init__(
        self,
        cell: nn.Module,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        state: Tensor | None = None,
    ) -> None:
        if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != "cpu"):
            raise ConfigError(f"generator must be a torch.Generator on the CPU, got {generator!r}")
        self._generator = generator
        super().__init__(cell, batch_size, state=state)

    def _first(self) -> tuple[Tensor, ...]:
        new = self._state.new_zeros
        return new(self.batch_size, self._size), new(self.batch_size, self._n_theta)

    def _arguments(self) -> dict[str, Any]:
        return {"generator": self._generator is not None}

    @property
    def _rng_state(self) -> Tensor | None:
        """The state of the learner's generator, if it has one."""
        return None if self._generator is None else self._generator.get_state()

    @_rng_state.setter
    def _rng_state(self, state: Tensor | None) -> None:
        if self._generator is not None and state is not None:
            self._generator.set_state(state)

    def _buffers(self) -> dict[str, Any]:
        return {**super()._buffers(), "rng_state": self._rng_state}

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        rng_state = loaded.buffers["rng_state"]
        rng_state = rng_state.cpu() if isinstance(rng_state, Tensor) else rng_state
        if rng_state is not None:
            torch.Generator().set_state(rng_state)  # raises an error if it is not the state of a generator
        return {**super()._load_buffers(loaded), "_rng_state": rng_state}

    def _with_first(self, influence: Tensor) -> tuple[Tensor, ...]:
        by_state, by_theta = self._carried  # zero for the samples that have restarted
        signs = self._signs()
        weighted = torch.einsum("bi,bip->bp", signs, influence)
        rho = balance(weighted, signs)
        restarted = influence.flatten(1).count_nonzero(dim=1)[:, None] > 0
        return by_state + torch.where(restarted, rho * signs, 0.0), by_theta + weighted / rho

    def _process_step(self, step: ReplayedStep) -> None:
        before = self._drawn_from()
        try:
            super()._process_step(step)
        except BaseException:
            self._draw_again_from(before)
            raise

    def _drawn_from(self) -> Tensor:
        """The state of the generator that is drawn from."""
        return torch.get_rng_state() if self._generator is None else self._generator.get_state()

    def _draw_again_from(self, state: Tensor) -> None:
        """Let the next draws be those that followed a state."""
        if self._generator is None:
            torch.set_rng_state(state)
        else:
            self._generator.set_state(state)

    def _signs(self) -> Tensor:
        by_state = self._carried[0]
        device = "cpu" if self._generator is None else self._generator.device
        return torch.randint(0, 2, by_state.shape, generator=self._generator, device=device).to(by_state) * 2 - 1

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        by_state, by_theta = self._carried
        moved = torch.einsum("bij,bj->bi", dynamics, by_state)
        signs = self._signs()
        immediate_sum = torch.einsum("bi,bip->bp", signs, immediate)
        rho_0, rho_1 = balance(by_theta, moved), balance(immediate_sum, signs)
        return rho_0 * moved + rho_1 * signs, by_theta / rho_0 + immediate_sum / rho_1

    def _pull(self, adjoint: Tensor) -> Tensor:
        by_state, by_theta = self._carried
        return (adjoint * by_state).sum(dim=1) @ by_theta

    def _dense(self) -> Tensor:
        by_state, by_theta = self._carried
        return by_state.unsqueeze(2) * by_theta.unsqueeze(1)


def balance(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return ``√(‖numerator‖ / ‖denominator‖)`` row by row, (B, 1); 1 where either is zero."""
    above, below = (value.norm(dim=1, keepdim=True) for value in (numerator, denominator))
    return torch.where((above > 0) & (below > 0), above / below.where(below > 0, 1.0), 1.0).sqrt()
