"""The sparse n-step approximation of the influence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import pytrees, validation
from rtrl.learners.masked_influence import MaskedInfluenceLearner
from rtrl.learners.state import LearnerState, copy_like


class SnAp(MaskedInfluenceLearner):
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
        ``B·H²·P`` multiply-adds per step, because this reference multiplies the full matrices before it masks them.
        Held: the B numbers of each masked entry, and its place; O(P) with order 1, where each parameter drives few
        units at once.

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

    def _first(self) -> tuple[Tensor, ...]:
        first = super()._first()
        self._reaches = self._places.new_zeros(*[0 if self.order == 1 else self._size] * 2, dtype=torch.bool)
        self._drives = self._places  # where a parameter drives the state at once; with order 1 the mask itself
        return first

    def _driven(self) -> Tensor:
        """Boolean (H, P): the entries that a parameter was seen to drive at once."""
        driven = self._no_pattern()
        driven.view(-1)[self._drives] = True
        return driven

    def _seen(self, influence: Tensor) -> None:
        self._note(self._reaches, self._driven() | (influence != 0).any(dim=0))

    def _note(self, reaches: Tensor, driven: Tensor) -> None:
        if not torch.equal(reaches, self._reaches) or not torch.equal(driven, self._driven()):
            drives = self._places_of(driven)
            self._widen(within(reaches, driven, self.order))
            self._reaches, self._drives = reaches, drives
        if self.order == 1:
            self._drives = self._places  # not twice

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        reaches = self._reaches if self.order == 1 else self._reaches | (dynamics != 0).any(dim=0)
        self._note(reaches, self._driven() | (immediate != 0).any(dim=0))
        return (self._inside(dynamics @ self._dense() + immediate),)

    def _adopt_columns(self, by_present: Callable[[Tensor], Tensor]) -> None:
        driven = by_present(self._driven())
        super()._adopt_columns(by_present)
        self._drives = self._places if self.order == 1 else self._places_of(driven)

    def _held_bytes(self) -> dict[str, int]:
        held = super()._held_bytes()
        more = 0 if self.order == 1 else pytrees.n_bytes([self._drives, self._reaches])
        return {**held, "pattern": held["pattern"] + more}

    def _arguments(self) -> dict[str, Any]:
        return {"order": self.order}

    def _buffers(self) -> dict[str, Any]:
        patterns = {"_drives": self._driven(), "_mask": self._pattern()}
        return {**super()._buffers(), **patterns, "_reaches": self._reaches.clone()}

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        buffers = super()._load_buffers(loaded)
        if self.order == 1:
            return {**buffers, "_drives": buffers["_places"]}
        reaches = copy_like("_reaches", loaded.buffers["_reaches"], self._reaches)
        driven = copy_like("_drives", loaded.buffers["_drives"], self._no_pattern())
        return {**buffers, "_reaches": reaches, "_drives": self._places_of(driven)}

    def _saved_pattern(self, loaded: LearnerState, dense: Tensor) -> Tensor:
        return copy_like("_mask", loaded.buffers["_mask"], self._no_pattern())


def within(reaches: Tensor, drives: Tensor, order: int) -> Tensor:
    """Return ``[ (J + I)^{order−1} B > 0 ]`` for Boolean patterns J (H, H) and B (H, P)."""
    hop, mask = reaches.float(), drives
    for _ in range(order - 1):
        wider = mask | (hop @ mask.float() > 0)
        if torch.equal(wider, mask):
            break
        mask = wider
    return mask
