"""A large buffer that is used again in every block."""

from math import prod

import torch
from torch import Tensor

# On a CPU, C libraries return blocks of memory larger than this to the system at once, and the next one costs a page
# fault for every 4 KiB: at 64 MiB, more than what is computed in it. Other devices' allocators keep theirs.
_LEAST_BYTES = 2**25


class ReusableBuffer:
    """Lends the same memory again and again, if it is large enough for that to save time.

    A borrower must be done with it before the next one borrows it.

    Args:
        most_bytes: a larger buffer than this is never kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: Tensor | None = None

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, of the dtype and on the device of ``like``."""
        count = prod(shape)
        n_bytes = count * like.element_size()
        if like.device.type != "cpu" or not _LEAST_BYTES <= n_bytes <= self._most_bytes:
            return like.new_empty(shape)
        if self._kept is None or self._kept.numel() < count or self._kept.dtype != like.dtype:
            self._kept = None  # freed before the new one is allocated
            self._kept = torch.empty(count, dtype=like.dtype, device=like.device)
        return self._kept[:count].view(shape)

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return 0 if self._kept is None else self._kept.numel() * self._kept.element_size()
