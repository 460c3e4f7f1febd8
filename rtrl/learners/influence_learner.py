"""Learners that carry an influence forward by the full Jacobians of each step, and textbook RTRL, the plainest one."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.newest_step import pull_back
from rtrl._engine.recorded import RecordedStep
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import as_like, as_real, real_numbers
from rtrl.learners.exclusive import exclusive
from rtrl.learners.replayed_step import ReplayedStep, ReplayingLearner
from rtrl.learners.state import LearnerState, copy_like


class StepJacobians(NamedTuple):
    """One step, linearised where it was taken. P counts the entries of all parameters, in the cell's own order, complex
    ones as pairs.

    Attributes:
        dynamics: the dynamics Jacobian J (B, H, H).
        immediate: the immediate Jacobian B (B, H, P).
        adjoint: ∂ℓ/∂h (B, H) of the step's losses.
        direct: ∂ℓ/∂θ (P,) with h held fixed.
    """

    dynamics: Tensor
    immediate: Tensor
    adjoint: Tensor
    direct: Tensor


def step_jacobians(step: ReplayedStep) -> StepJacobians:
    """Return the Jacobians of a step in full, sample by sample and row by row, and the gradients of its losses.

    Raises:
        CellError: run again, the cell does something else than it did.
        NonFiniteError: NaN or infinity in a Jacobian.

    Cost:
        B·(H + 1) backward passes through the step of one sample; B·H·(H + P) numbers.
    """
    theta = list(step.snapshot.trainable.values())
    samples, size, n_theta = len(step.h), step.h[0].numel(), sum(map(real_numbers, theta))
    dynamics, immediate = step.h.new_zeros(samples, size, size), step.h.new_zeros(samples, size, n_theta)
    adjoint, direct = step.h.new_zeros(samples, size), step.h.new_zeros(n_theta)
    with step.snapshot.applied():
        for b in range(samples):
            h = step.h[b : b + 1].clone().requires_grad_()
            pairs, h_next = step.rerun(h, b)
            if pairs:
                ys, gs = zip(*pairs, strict=True)
                by_h, *by_theta = torch.autograd.grad(ys, [h, *theta], gs, retain_graph=True, materialize_grads=True)
                adjoint[b] = by_h.flatten()
                direct += torch.cat([as_real(g).flatten() for g in by_theta])
            if not h_next.requires_grad:
                continue
            with torch.enable_grad():
                entries = h_next.flatten().unbind()
            for i, entry in enumerate(entries):
                by_h, *by_theta = torch.autograd.grad(entry, [h, *theta], retain_graph=True, materialize_grads=True)
                dynamics[b, i] = by_h.flatten()
                immediate[b, i] = torch.cat([as_real(g).flatten() for g in by_theta])
    for what, value in (("dynamics", dynamics), ("immediate", immediate)):
        checks.check_finite(f"the {what} Jacobian", value, step.number)
    return StepJacobians(dynamics, immediate, adjoint, direct)


class InfluenceLearner(ReplayingLearner):
    """A learner that carries an influence S, or an estimate of it: it adds ``∂ℓ_t/∂θ + δ_t S_t`` to the gradient, then
    advances S.

    What it carries is a tuple of tensors with the batch as dimension 0. At the start of a sample all are zero, but for
    the influence of parameters that the first state depends on.
    """

    def __init__(self, cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> None:
        super().__init__(cell, batch_size, state=state)
        self._size = self._state[0].numel()
        self._n_theta = sum(map(real_numbers, self._parameters.values()))
        self._carried = self._first()

    @exclusive
    @torch.inference_mode(False)
    def influence(self, name: str) -> Tensor:
        """Return the influence of one parameter on the present state, as this learner estimates it.

        The newest step accepts no more losses then.

        Args:
            name: a trainable parameter of the cell.

        Returns:
            (B, H, P), P in the parameter's own order.

        Raises:
            ConfigError: no trainable parameter has this name.
            RTRLError: the newest step cannot be processed; see ``sync``.
        """
        self._close_for(name)
        self._take_first_influence()
        return self._by_name(self._dense())[name].clone()

    def _first(self) -> tuple[Tensor, ...]:
        """Return what is carried at the first step."""
        return (self._state.new_zeros(self.batch_size, self._size, self._n_theta),)

    def _begin_block(self, step: RecordedStep) -> None:
        super()._begin_block(step)
        self._take_first_influence()

    def _take_first_influence(self) -> None:
        """Carry the influence of learned first states."""
        if self._first_influence:
            sizes = {name: real_numbers(p) for name, p in self._parameters.items()}
            zeros = self._state.new_zeros(self.batch_size, self._size, 1)
            first = [self._first_influence.get(n, zeros.expand(-1, -1, size)) for n, size in sizes.items()]
            carried = self._with_first(torch.cat(first, dim=2))
            self._carried, self._first_influence = carried, {}

    def _with_first(self, influence: Tensor) -> tuple[Tensor, ...]:
        """Return what is carried once samples that have just restarted have this influence (B, H, P), zero for the
        others."""
        return (self._carried[0] + influence,)

    @abstractmethod
    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        """Return what is carried after a step with J (B, H, H) and B (B, H, P)."""

    def _pull(self, adjoint: Tensor) -> Tensor:
        """Return ``Σ_b δ_b S_b`` (P,) for adjoints (B, H)."""
        return torch.einsum("bh,bhp->p", adjoint, self._carried[0])

    def _dense(self) -> Tensor:
        """Return S (B, H, P)."""
        return self._carried[0]

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Split the last dimension, P, by parameter."""
        parts = flat.split([real_numbers(p) for p in self._parameters.values()], dim=-1)
        return dict(zip(self._parameters, parts, strict=True))

    def _adopt(self, before: Mapping[str, int]) -> None:
        super()._adopt(before)

        def by_present(value: Tensor) -> Tensor:
            """Keep the columns (..., P) of parameters that are trainable still; those of others are zero."""
            old = dict(zip(before, value.split(list(before.values()), dim=-1), strict=True))
            zeros = {n: value.new_zeros(*value.shape[:-1], real_numbers(p)) for n, p in self._parameters.items()}
            return torch.cat([old.get(name, zeros[name]) for name in zeros], dim=-1)

        self._adopt_columns(by_present)
        self._n_theta = sum(map(real_numbers, self._parameters.values()))

    def _adopt_columns(self, by_present: Callable[[Tensor], Tensor]) -> None:
        """Change all that is kept by parameter, (..., P); ``_n_theta`` is still the former P."""
        self._carried = (*self._carried[:-1], by_present(self._carried[-1]))

    def _process_step(self, step: ReplayedStep) -> None:
        jacobians = step_jacobians(step)
        gradient = jacobians.direct + self._pull(jacobians.adjoint)
        carried = self._advance(jacobians.dynamics, jacobians.immediate)
        for value in carried:
            checks.check_finite("the influence", value, step.number)
        pending = self._pending_grads
        if step.has_pending_loss:
            parts = self._by_name(gradient)
            pending = self._with_pending({n: as_like(p, self._parameters[n]).clone() for n, p in parts.items()})
        self._change()
        self._carried, self._pending_grads = carried, pending

    def _pull_losses(self, cotangents: Sequence[Tensor], per_sample: bool) -> dict[str, Tensor]:
        step = self._replayed(self._open_steps[-1])
        with step.snapshot.applied():
            pulled = pull_back(self.cell, self._parameters, [step], step.h_next, cotangents, self._takes_replay)
        through_state = self._by_name(torch.stack([self._pull(adjoint) for adjoint in pulled.state]))
        return {name: value + through_state[name].view_as(value) for name, value in pulled.parameters.items()}

    def _clear(self, samples: Tensor, discard: bool) -> None:
        super()._clear(samples, discard)
        self._carried = tuple(
            value.masked_fill(samples.reshape(-1, *[1] * (value.ndim - 1)), 0.0) for value in self._carried
        )

    def _start_clean(self) -> None:
        super()._start_clean()
        self._n_theta = sum(map(real_numbers, self._parameters.values()))
        self._carried = self._first()

    def _held_bytes(self) -> dict[str, int]:
        return {**super()._held_bytes(), "influence": pytrees.n_bytes(self._carried)}

    def _buffers(self) -> dict[str, Any]:
        return {**super()._buffers(), "carried": [value.clone() for value in self._carried]}

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        pairs = zip(loaded.buffers["carried"], self._carried, strict=True)
        carried = tuple(copy_like("influence", value, present) for value, present in pairs)
        return {**super()._load_buffers(loaded), "_carried": carried}


class DenseRTRL(InfluenceLearner):
    """Real-time recurrent learning as in the textbook: carry the whole influence, by the whole Jacobians.

    Equation:
        ``S_{t+1} = J_t S_t + B_t``, ``S_0 = ∂h_0/∂θ``; ``dL/dθ = Σ_t ( ∂ℓ_t/∂θ + δ_t S_t )``.

    Law:
        Exact for every stream and any losses, resets and deliveries.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with P trainable numbers.
        batch_size: B.
        state: the first state (B, n, ...) with H entries per sample; ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost:
        ``B·H²·P`` multiply-adds and ``B·(H + 1)`` backward passes per step; ``B·H·P`` numbers held.

    Source:
        Williams and Zipser (1989), Neural Computation 1(2), the recursion for p_ij^k.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import DenseRTRL
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4))
        >>> learner = DenseRTRL(cell, batch_size=2)
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
        >>> learner.influence("cell.weight_hh").shape
        torch.Size([2, 4, 48])
    """

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return (dynamics @ self._carried[0] + immediate,)
