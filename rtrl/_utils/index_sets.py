"""Index sets of rows, one per sample: unions, positions, gathers and scatters along dimension 1.

``None`` stands for all rows.
"""

from typing import overload

import torch
from torch import Tensor


@overload
def select_samples(values: Tensor, sample: Tensor | None) -> Tensor: ...
@overload
def select_samples(values: None, sample: Tensor | None) -> None: ...
def select_samples(values: Tensor | None, sample: Tensor | None) -> Tensor | None:
    """``values[sample]`` where both are given."""
    return values if values is None or sample is None else values[sample]


def _wide(index: Tensor, values: Tensor) -> Tensor:
    return index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])


def gather(values: Tensor, index: Tensor | None) -> Tensor:
    """``out[b, j] = values[b, index[b, j]]`` for values (B, n, ...)."""
    return values if index is None else values.gather(1, _wide(index, values))


def scatter(values: Tensor, index: Tensor | None, source: Tensor) -> Tensor:
    """A copy of ``values`` with ``out[b, index[b, j]] = source[b, j]``."""
    return source if index is None else values.scatter(1, _wide(index, values), source)


def scatter_add(values: Tensor, index: Tensor | None, source: Tensor) -> Tensor:
    """A copy of ``values`` with ``out[b, index[b, j]] += source[b, j]``."""
    return values + source if index is None else values.scatter_add(1, _wide(index, values), source)


def zero(values: Tensor, index: Tensor | None) -> Tensor:
    """A copy of ``values`` with the rows ``index`` set to zero."""
    return torch.zeros_like(values) if index is None else values.scatter(1, _wide(index, values), 0.0)


def mask(index: Tensor, n: int) -> Tensor:
    """The Boolean (B, n) form of an index set."""
    return torch.zeros(index.shape[0], n, dtype=torch.bool, device=index.device).scatter(1, index, True)


def union(a: Tensor | None, b: Tensor | None, n: int) -> Tensor | None:
    """The union of two index sets, or of a mask and an index set, as a mask; None if either is all rows."""
    if a is None or b is None:
        return None
    return (a if a.dtype == torch.bool else mask(a, n)) | (b if b.dtype == torch.bool else mask(b, n))


def mask_to_indices(mask: Tensor | None) -> Tensor | None:
    """The index set (B, k) of a mask, k the largest count over the samples; None if that is every row.

    Samples with fewer rows are filled up with rows outside the mask, so that no index occurs twice.
    """
    if mask is None or mask.shape[0] == 0:
        return None
    k = int(mask.sum(dim=1).max())  # one synchronisation with the device
    if k == mask.shape[1]:
        return None
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :k]


def positions(index: Tensor, n: int) -> Tensor:
    """The position of each of the n rows in an index set: (B, n); 0 for rows that are not in it."""
    places = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return torch.zeros(index.shape[0], n, dtype=torch.int64, device=index.device).scatter(1, index, places)


@overload
def flat(index: Tensor, n: int, size: int) -> Tensor: ...
@overload
def flat(index: None, n: int, size: int) -> None: ...
def flat(index: Tensor | None, n: int, size: int) -> Tensor | None:
    """An index set (B, k) of rows of (B, n, ...) as one (B·k,) of rows of (B·n, ...)."""
    if index is None:
        return None
    return (torch.arange(size, device=index.device)[:, None] * n + index).flatten()
