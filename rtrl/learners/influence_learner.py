"""What the learners that carry an influence forward share; they differ in how it advances alone."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._utils import pytrees
from rtrl.errors import ConfigError
from rtrl.learners.base import Baseline
from rtrl.learners.replayed_step import Step
from rtrl.learners.step_jacobians import linearize


class InfluenceLearner(Baseline):
    """Carries an influence, or an estimate of it, forward: earns ``∂ℓ_t/∂θ + δ_t S_t``, then advances S.

    What is carried is a tuple of tensors with the batch as dimension 0, all zero at the start of a sample.
    """

    def __init__(self, cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> None:
        super().__init__(cell, batch_size, state=state)
        self._size = self._state[0].numel()
        self._n_theta = sum(p.numel() for p in self._parameters.values())
        self._carried = self._first()

    def _first(self) -> tuple[Tensor, ...]:
        return (self._state.new_zeros(self.batch_size, self._size, self._n_theta),)

    @abstractmethod
    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        """What is carried after a step with J (B, H, H) and B (B, H, P)."""

    def _pull(self, adjoint: Tensor) -> Tensor:
        """``Σ_b δ_b S_b`` (P,) for adjoints (B, H)."""
        return torch.einsum("bh,bhp->p", adjoint, self._carried[0])

    def _dense(self) -> Tensor:
        """S (B, H, P)."""
        return self._carried[0]

    @torch.inference_mode(False)
    def influence(self, name: str) -> Tensor:
        """The influence on the present state of one parameter as this learner knows it: (B, H, P), P in the
        parameter's own order. The newest step takes no more losses then.

        Raises:
            ConfigError: no trainable parameter has this name. And whatever ``sync`` raises.
        """
        if name not in self._parameters:
            raise ConfigError(f"no trainable parameter is called {name!r}; there are {', '.join(self._parameters)}")
        self._close()
        return self._by_name(self._dense())[name].clone()

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Split the last dimension, P, by parameter."""
        parts = flat.split([p.numel() for p in self._parameters.values()], dim=-1)
        return dict(zip(self._parameters, parts, strict=True))

    def _work_off(self, step: Step) -> None:
        with torch.no_grad():
            linear = linearize(step)
            gradient = linear.direct + self._pull(linear.adjoint)
            carried = self._advance(linear.dynamics, linear.immediate)
            for value in carried:
                checks.check_finite("the influence", value, step.number)
            if step.owed:
                parts = self._by_name(gradient)
                self._earn({n: part.reshape(self._parameters[n].shape).clone() for n, part in parts.items()})
        self._carried = carried

    def _forget(self, rows: Tensor) -> None:
        self._carried = tuple(
            value.masked_fill(rows.reshape(-1, *[1] * (value.ndim - 1)), 0.0) for value in self._carried
        )

    def _memory(self) -> dict[str, Tensor]:
        return {f"carried {place}": value for place, value in enumerate(self._carried)}

    def _remember(self, memory: dict[str, Tensor]) -> None:
        self._carried = tuple(memory[f"carried {place}"] for place in range(len(self._carried)))

    def _influence_bytes(self) -> int:
        return pytrees.n_bytes(self._carried)
