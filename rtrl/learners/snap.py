"""The sparse n-step approximation of the influence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.learners.influence_learner import InfluenceLearner
from rtrl.learners.state import LearnerState, copy_like

_PATTERNS = ("_reaches", "_drives", "_mask")


class SnAp(InfluenceLearner):
    """The influence, kept only where a parameter reaches the state within n steps (SnAp-n).

    Equation:
        ``S_{t+1} = M_n ∘ (J_t S_t + B_t)`` with the mask ``M_n = [ (|J| + I)^{n−1} |B| > 0 ]``, where ``|J|`` and
        ``|B|`` say which entries of the Jacobians can be non-zero.

    The pattern is that of every entry seen to be non-zero so far, in any sample: it only grows, and within few steps
    of a dense cell it is the structural one. So no random point has to be tried, and cells that route are covered. What
    a learned first state depends on counts as driven at once: its influence ``∂h₀/∂θ`` is kept whole.

    Law:
        Zero outside the mask; exact if ``order ≥ H``, or if ``order`` is at least the number of steps. For a dense
        cell, exact from order 2 on; order 1 keeps, of each parameter, the entries that it drives at once.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with P trainable numbers.
        batch_size: B.
        order: n, from 1 on.
        state: the first state (B, n, ...) with H entries per sample; ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost:
        ``B·H²·P`` multiply-adds per step, because this reference multiplies the full matrices before it masks them;
        ``B·H·P`` numbers and a mask of ``H·P`` bytes held. The method itself needs only the masked entries.

    Source:
        Menick et al. (2020), "A Practical Sparse Approximation for Real Time Recurrent Learning", section 3.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import SnAp
        >>> learner = SnAp(rtrl.cells.from_torch(torch.nn.RNNCell(3, 4)), batch_size=2, order=1)
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
        >>> int(learner.mask("cell.weight_hh").sum())  # of 4 × 16 entries, those of the weight's own row
        16
    """

    def __init__(self, cell: nn.Module, batch_size: int, order: int = 1, *, state: Tensor | None = None) -> None:
        self.order = validation.integer("order", order)
        super().__init__(cell, batch_size, state=state)
        shape = self._size, self._n_theta
        self._reaches = torch.zeros(self._size, self._size, dtype=torch.bool, device=self._state.device)
        self._drives = torch.zeros(shape, dtype=torch.bool, device=self._state.device)
        self._mask = torch.zeros_like(self._drives)

    def mask(self, name: str) -> Tensor:
        """Return the present mask of one parameter's influence.

        Args:
            name: a trainable parameter of the cell.

        Returns:
            Boolean (H, P).

        Raises:
            ConfigError: no trainable parameter has this name.
            RTRLError: the newest step cannot be processed; see ``sync``.
        """
        self.influence(name)
        return self._by_name(self._mask)[name].clone()

    def _buffers(self) -> dict[str, Any]:
        return {**super()._buffers(), **{name: getattr(self, name).clone() for name in _PATTERNS}}

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        patterns = {name: copy_like(name, loaded.buffers[name], getattr(self, name)) for name in _PATTERNS}
        return {**super()._load_buffers(loaded), **patterns}

    def _arguments(self) -> dict[str, Any]:
        return {"order": self.order}

    def _with_first(self, influence: Tensor) -> tuple[Tensor, ...]:
        self._widen(self._reaches, self._drives | (influence != 0).any(dim=0))
        return super()._with_first(influence)

    def _adopt_columns(self, by_present: Callable[[Tensor], Tensor]) -> None:
        super()._adopt_columns(by_present)
        self._drives, self._mask = by_present(self._drives), by_present(self._mask)

    def _widen(self, reaches: Tensor, drives: Tensor) -> None:
        if not torch.equal(reaches, self._reaches) or not torch.equal(drives, self._drives):
            self._reaches, self._drives, self._mask = reaches, drives, within(reaches, drives, self.order)

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        self._widen(self._reaches | (dynamics != 0).any(dim=0), self._drives | (immediate != 0).any(dim=0))
        return ((dynamics @ self._carried[0] + immediate) * self._mask,)


def within(reaches: Tensor, drives: Tensor, order: int) -> Tensor:
    """Return ``[ (J + I)^{order−1} B > 0 ]`` for Boolean patterns J (H, H) and B (H, P)."""
    hop, mask = reaches.float(), drives
    for _ in range(order - 1):
        wider = mask | (hop @ mask.float() > 0)
        if torch.equal(wider, mask):
            break
        mask = wider
    return mask
