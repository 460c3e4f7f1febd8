"""A large buffer that is used again in every block."""

from math import prod

import torch
from torch import Tensor

# On a CPU, C libraries give blocks of memory larger than this back to the system at once, and the next one costs a page
# fault for every 4 KiB: at 64 MiB more than what is computed in it. Other devices' allocators keep theirs.
_LEAST_BYTES = 2**25


class ReusableBuffer:
    """Lends the same memory again and again, if it is large enough for that to be worth anything.

    Whoever borrows it is done with it before the next one does.

    Args:
        most_bytes: a larger buffer than this is never kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: Tensor | None = None

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of this shape with anything in it, of the dtype and on the device of ``like``."""
        count = prod(shape)
        wanted = count * like.element_size()
        if not self.keeps(wanted, like.device):
            return like.new_empty(shape)
        if self._kept is None or self._kept.numel() < count or self._kept.dtype != like.dtype:
            self._kept = None  # before the new one is there
            self._kept = torch.empty(count, dtype=like.dtype, device=like.device)
        return self._kept[:count].view(shape)

    def keeps(self, size: int, device: torch.device) -> bool:
        """Whether memory of ``size`` bytes on a device is used again."""
        return device.type == "cpu" and _LEAST_BYTES <= size <= self._most_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return 0 if self._kept is None else self._kept.numel() * self._kept.element_size()
