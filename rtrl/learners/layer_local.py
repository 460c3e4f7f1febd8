"""Real-time recurrent learning within each layer alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils.real_pairs import real_numbers
from rtrl.errors import ConfigError
from rtrl.learners.masked_influence import MaskedInfluenceLearner
from rtrl.learners.state import LearnerState

Layers = Mapping[str, Sequence[int] | Tensor]


class LayerLocal(MaskedInfluenceLearner):
    """RTRL in which the influence of a layer's parameters stays with the state of that layer.

    Within one step, losses reach all layers below, as in backpropagation. What is dropped is that the state of a layer
    remembers the layers below.

    Equation:
        ``S_k ← J_kk S_k + B_k`` for the parameters and the state of layer k, with the blocks ``J_kk`` of the dynamics
        Jacobian; ``dL/dθ_k ≈ Σ_t ( ∂ℓ_t/∂θ_k + δ_t,k S_k )``, where ∂ℓ_t/∂θ_k and δ_t,k go through the whole step.

    Law:
        The masked recursion ``S ← M ∘ (J S + B)``, where M keeps, of each parameter, the state entries of its own
        layer. Exact for one layer, and for the topmost layer with a state.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with P trainable numbers.
        batch_size: B.
        layers: the beginning of the names of a layer's parameters → the flat entries of a sample's state that are that
            layer's. A parameter of no layer has no influence. By default what ``cell.layer_entries()`` returns, as
            ``rtrl.Stack`` and layers made by ``rtrl.from_torch`` have it; a cell without it is one layer.
        state: the first state (B, n, ...) with H entries per sample; ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: ``layers`` names no parameter, or entries that the state has not; a size is not a positive integer,
            or the cell has no trainable parameter or no first state.

    Cost:
        ``B·H²·P`` multiply-adds and ``B·(H + 1)`` backward passes per step, because this reference multiplies the full
        matrices. Held: ``B·Σ_k H_k·P_k`` numbers and their places. The method itself needs no more than the blocks.

    Source:
        Zucchet et al. (2023), "Online learning of long-range dependencies", NeurIPS, section 3.2: several layers.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import LayerLocal
        >>> cell = rtrl.Stack([rtrl.cells.LRU(3, 4), rtrl.cells.LRU(3, 2), torch.nn.Linear(3, 1)])
        >>> learner = LayerLocal(cell, batch_size=2)
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
        >>> int(learner.mask("layers.0.nu_log").any(dim=1).sum())  # of 8 + 4 entries, those of the lower layer
        8
    """

    def __init__(
        self, cell: nn.Module, batch_size: int, *, layers: Layers | None = None, state: Tensor | None = None
    ) -> None:
        self._layers = layers
        super().__init__(cell, batch_size, state=state)

    def _first(self) -> tuple[Tensor, ...]:
        self._places = self._places_of(self._layer_pattern())
        return (self._state.new_zeros(self.batch_size, len(self._places)),)

    def _layer_pattern(self) -> Tensor:
        """The pattern (H, P) of the layers."""
        declared: Any = getattr(self.cell, "layer_entries", None)
        layers: Layers = (
            self._layers if self._layers is not None else declared() if declared else {"": range(self._size)}
        )
        entries = {prefix: [int(entry) for entry in of_layer] for prefix, of_layer in layers.items()}
        unknown = [p for p in entries if not any(name.startswith(p) for name in self._guard.named)]
        if unknown and self._layers is not None:
            raise ConfigError(f"layers: no parameter's name begins with {unknown[0]!r}")
        for prefix, of_layer in entries.items():
            if strange := [entry for entry in of_layer if not 0 <= entry < self._size]:
                raise ConfigError(f"layers[{prefix!r}] must lie in 0 … {self._size - 1}, got {strange[0]}")
        parts = []
        for name, parameter in self._parameters.items():
            own = torch.zeros(self._size, real_numbers(parameter), dtype=torch.bool, device=self._state.device)
            for prefix in entries:
                if name.startswith(prefix):
                    own[entries[prefix]] = True
            parts.append(own)
        return torch.cat(parts, dim=1)

    def _seen(self, influence: Tensor) -> None:
        return  # the pattern stays

    def _adopt_columns(self, by_present: Any) -> None:
        dense = by_present(self._dense())
        self._places = self._places_of(self._layer_pattern())
        self._carried = (self._inside(dense),)

    def _saved_pattern(self, loaded: LearnerState, dense: Tensor) -> Tensor:
        pattern = self._layer_pattern()
        if bool(((dense != 0).any(dim=0) & ~pattern).any()):
            raise ConfigError("the saved learner has other layers than this one")
        return pattern

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return (self._inside(dynamics @ self._dense() + immediate),)
