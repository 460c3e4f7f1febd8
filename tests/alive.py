"""Bytes of tensors alive at once, counted storage by storage as they are made and freed."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rtrl import _tree


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside ``with``; what was there before is not counted.

    Attributes:
        now, peak: bytes of those alive at this moment, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in _tree.tensors((args, kwargs)):
            self._meet(leaf, 0)
        out = func(*args, **(kwargs or {}))
        for leaf in _tree.tensors(out):
            self._meet(leaf, leaf.untyped_storage().nbytes())
        return out

    def _meet(self, leaf: Tensor, size: int) -> None:
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call has alive at once, at most."""
    with AliveBytes() as alive:
        call()
    return alive.peak
