"""Bytes of tensors alive at once, counted storage by storage as they are made and freed: what a claim about memory is
checked against, the same on every machine."""

import weakref
from collections.abc import Callable, Iterable, Iterator
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
        for leaf in _flat(args, kwargs.values()):
            self._meet(leaf, new=False)
        out = func(*args, **kwargs)
        for leaf in _flat((out,)):
            self._meet(leaf, new=True)
        return out

    def _meet(self, leaf: Tensor, new: bool) -> None:
        try:
            storage = leaf.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a layout without a storage of its own
            return
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _flat(*many: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors that an operation takes or gives, which lie in lists and tuples at most."""
    for values in many:
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from _flat(value)


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
