"""Hold a pattern of a Jacobian against its backward passes, by weights.

If each input depends on one unit of a head alone, a backward pass from the head with the weights w gives ``w_i`` times
what one with ones gives, at the inputs of unit i. A dependence on another unit shows as a difference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._engine import deferred

_LEVELS = 16  # powers of two from 1 to 2¹⁵, which no usual number overflows by


@dataclass(frozen=True, slots=True)
class ProbeWeights:
    """The weights of one backward pass.

    Attributes:
        values: (units,).
        exact: whether they are powers of two. A product with these rounds nothing, so that the results must agree bit
            for bit, and a dependence shows however small it is.
    """

    values: Tensor
    exact: bool

    def agree(self, weighted: Tensor, plain: Tensor, scale: Tensor | None = None) -> bool:
        """Return whether a pass with these weights gives what a pass with ones gives, times the weights.

        Args:
            weighted: (N, ..., units), the result of the pass with the weights.
            plain: of the same shape, that of the pass with ones.
            scale: the weights of the last dimension, where these are not ``values``.
        """
        expected = plain * (self.values if scale is None else scale)
        if self.exact and deferred.current(plain) is None and torch.equal(weighted, expected):
            return True
        difference = (weighted - expected).abs_()
        if self.exact:  # a product that underflows is rounded
            return deferred.holds((difference <= 2**_LEVELS * torch.finfo(plain.dtype).tiny).all())
        largest = plain.abs().flatten(1).amax(dim=1).reshape(-1, *[1] * (plain.ndim - 1))
        return deferred.holds((difference <= torch.finfo(plain.dtype).eps ** 0.5 * largest).all())


def has_numbers(value: Tensor) -> bool:
    """Return whether a tensor holds numbers that can be looked at; in a dry run it does not, and all are equal."""
    return not torch.equal(value.new_zeros(1), value.new_ones(1))


def probe_weights(units: int, like: Tensor, seed: int) -> list[ProbeWeights]:
    """Draw the weights of the passes that hold a pattern together.

    Powers of two come first, such that any two units differ in one of the passes at least. Several dependences of
    simple ratios could cancel there: real numbers between 1 and 2 come last, for which none do.

    Args:
        units: how many there are.
        like: a tensor of the dtype and device to use.
        seed: of the weights; the random numbers of the user stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randperm(units, generator=generator, device="cpu")
    weights = []
    while True:
        weights.append(ProbeWeights(_sent(2.0 ** (rank % _LEVELS), like), exact=True))
        rank = rank // _LEVELS
        if not bool(rank.any()):
            break
    real = 1 + torch.rand(units, generator=generator, dtype=torch.float64, device="cpu")
    return [*weights, ProbeWeights(_sent(real, like), exact=False)]


def _sent(values: Tensor, like: Tensor) -> Tensor:
    """Values of the CPU in the dtype of ``like`` and on its device, for which the host does not wait."""
    return values.to(like.dtype).to(like.device, non_blocking=True)
