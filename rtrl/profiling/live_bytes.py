"""Bytes of tensors alive at once, counted storage by storage as they are made and freed: what a claim about memory is
checked against, the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside ``with``; what was there before is not counted.

    What an operation needs inside itself and frees again is not seen, nor what an allocator adds by rounding up.

    Attributes:
        now, peak: bytes of those alive at this moment, and at most so far.

    >>> import torch
    >>> with LiveBytes() as alive:
    ...     y = torch.ones(5, 4).mul(2.0).sum()
    >>> alive.now, alive.peak
    (4, 160)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as for ``rtrl.profiling.macs.MacCounter``

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.takes(args)
        self.takes(tuple(kwargs.values()))
        out = func(*args, **kwargs)
        self.makes(out)
        return out

    def takes(self, values: Any) -> None:
        """Note that an operation takes the tensors in ``values``, which were there before unless one made them."""
        self._meet(values, new=False)

    def makes(self, values: Any) -> None:
        """Note that an operation has made the tensors in ``values``, tensors or lists and tuples of them."""
        self._meet(values, new=True)

    def _meet(self, values: Any, new: bool) -> None:
        if isinstance(values, Tensor):
            try:
                storage = values.untyped_storage()
            except (NotImplementedError, RuntimeError):  # a layout without a storage of its own
                return
            if storage._cdata not in self._known:
                self._add(storage, new)
        elif isinstance(values, list | tuple):
            for value in values:
                self._meet(value, new)

    def _add(self, storage: Any, new: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call has alive at once, at most.

    >>> import torch
    >>> peak_of(lambda: torch.ones(5, 4) + 1.0)
    160
    """
    alive = LiveBytes()
    with alive:
        call()
    return alive.peak
