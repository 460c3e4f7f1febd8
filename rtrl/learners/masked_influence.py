"""Learners whose influence is zero outside a pattern, and is held inside it alone."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import pytrees
from rtrl.errors import ConfigError
from rtrl.learners.influence_learner import InfluenceLearner
from rtrl.learners.state import LearnerState, copy_like


class MaskedInfluenceLearner(InfluenceLearner):
    """A learner that holds the E entries of an influence (B, H, P) in which it may be non-zero, and where they are.

    The pattern of these entries is one for all samples. While a step is processed, matrices are written out in full.
    """

    _places: Tensor  # (E,), ascending: row · P + column; set by _first

    def mask(self, name: str) -> Tensor:
        """Return where one parameter's influence may be non-zero at present.

        Args:
            name: a trainable parameter of the cell.

        Returns:
            Boolean (H, P).

        Raises:
            ConfigError: no trainable parameter has this name.
            RTRLError: the newest step cannot be processed; see ``sync``.
        """
        self.influence(name)
        return self._by_name(self._pattern())[name].clone()

    def _first(self) -> tuple[Tensor, ...]:
        self._places = self._places_of(self._no_pattern())
        return (self._state.new_zeros(self.batch_size, 0),)

    def _no_pattern(self) -> Tensor:
        return torch.zeros(self._size, self._n_theta, dtype=torch.bool, device=self._state.device)

    def _places_of(self, pattern: Tensor) -> Tensor:
        """Where a Boolean (H, P) is True, in four bytes each if they are enough."""
        places = pattern.flatten().nonzero().flatten()
        return places.int() if pattern.numel() < 2**31 else places

    def _pattern(self) -> Tensor:
        """The pattern as Boolean (H, P)."""
        pattern = self._no_pattern()
        pattern.view(-1)[self._places] = True
        return pattern

    def _inside(self, dense: Tensor) -> Tensor:
        """The entries (B, E) of a matrix (B, H, P) inside the pattern."""
        return dense.flatten(1)[:, self._places]

    def _widen(self, pattern: Tensor) -> None:
        """Hold the influence in another pattern (H, P); entries outside of it are dropped."""
        if not torch.equal(pattern, self._pattern()):
            dense = self._dense()
            places = self._places_of(pattern)
            self._places, self._carried = places, (dense.flatten(1)[:, places],)

    @abstractmethod
    def _seen(self, influence: Tensor) -> None:
        """Take note of entries of a first influence (B, H, P) that are non-zero."""

    def _with_first(self, influence: Tensor) -> tuple[Tensor, ...]:
        self._seen(influence)
        return (self._carried[0] + self._inside(influence),)

    def _dense(self) -> Tensor:
        dense = self._state.new_zeros(self.batch_size, self._size * self._n_theta)
        dense[:, self._places] = self._carried[0]
        return dense.view(self.batch_size, self._size, self._n_theta)

    def _pull(self, adjoint: Tensor) -> Tensor:
        rows, columns = self._places // self._n_theta, self._places % self._n_theta
        products = (adjoint[:, rows] * self._carried[0]).sum(dim=0)
        return self._state.new_zeros(self._n_theta).index_add_(0, columns, products)

    def _adopt_columns(self, by_present: Callable[[Tensor], Tensor]) -> None:
        dense, pattern = by_present(self._dense()), by_present(self._pattern())
        self._places = self._places_of(pattern)
        self._carried = (self._inside(dense),)

    def _held_bytes(self) -> dict[str, int]:
        return {**super()._held_bytes(), "pattern": pytrees.n_bytes(self._places)}

    def _buffers(self) -> dict[str, Any]:
        return {**super()._buffers(), "carried": [self._dense()]}

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        whole = self._state.new_zeros(self.batch_size, self._size, self._n_theta)
        (saved,) = loaded.buffers["carried"]
        dense = copy_like("influence", saved, whole)
        places = self._places_of(self._saved_pattern(loaded, dense))
        if int(dense.count_nonzero()) != int(dense.flatten(1)[:, places].count_nonzero()):
            raise ConfigError("the saved influence has entries outside of its pattern")
        common = super(InfluenceLearner, self)._load_buffers(loaded)
        return {**common, "_places": places, "_carried": (dense.flatten(1)[:, places],)}

    def _saved_pattern(self, loaded: LearnerState, dense: Tensor) -> Tensor:
        """The pattern (H, P) of a saved learner with this influence (B, H, P)."""
        return (dense != 0).any(dim=0)


class DrivenEntriesLearner(MaskedInfluenceLearner):
    """A learner whose pattern is that of all entries of the immediate Jacobians, and of a first influence, that were
    seen to be non-zero, in any sample: O(P) entries where a parameter drives few units at once."""

    def _seen(self, influence: Tensor) -> None:
        self._widen(self._pattern() | (influence != 0).any(dim=0))

    def _buffers(self) -> dict[str, Any]:
        return {**super()._buffers(), "pattern": self._pattern()}

    def _saved_pattern(self, loaded: LearnerState, dense: Tensor) -> Tensor:
        return copy_like("pattern", loaded.buffers["pattern"], self._no_pattern()) | super()._saved_pattern(
            loaded, dense
        )

    def _rows(self) -> Tensor:
        """The row of each entry held, (E,)."""
        return self._places // self._n_theta
