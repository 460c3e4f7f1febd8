"""Count the bytes of tensors alive at once, storage by storage: the same on every machine, so that claims about memory
can be checked."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rtrl._utils.renamed_names import renamed_names


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages allocated inside ``with``, and not of those that existed before.

    Memory that an operation allocates and frees internally is not seen, nor the rounding of the allocator.

    Attributes:
        now: bytes of the storages alive at this moment.
        peak: the most bytes alive at once so far.

    Example:
        >>> import torch
        >>> with LiveBytes() as live:
        ...     y = torch.ones(5, 4).mul(2.0).sum()
        >>> live.now, live.peak
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
        if kwargs:
            self.takes(kwargs.values())
        out = func(*args, **kwargs)
        self.makes(out)
        return out

    def takes(self, values: Iterable[Any]) -> None:
        """Note that an operation takes the tensors among ``values``: unless another one made them, they existed."""
        for leaf in _flat(values):
            self._register(leaf, new=False)

    def makes(self, out: Any) -> None:
        """Note that an operation has made ``out``, a tensor or a list of tensors."""
        for leaf in _flat((out,)):
            self._register(leaf, new=True)

    def add(self, n_bytes: int) -> None:
        """Count ``n_bytes`` that were allocated, or freed if it is negative."""
        self.now += n_bytes
        self.peak = max(self.peak, self.now)

    def _register(self, leaf: Tensor, new: bool) -> None:
        try:
            storage = leaf.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a layout without a storage
            return
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.add(size)


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation, in lists and tuples at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _flat(value)


def peak_of(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call has alive at once.

    >>> import torch
    >>> peak_of(lambda: torch.ones(5, 4) + 1.0)
    160
    """
    live = LiveBytes()
    with live:
        call()
    return live.peak


__getattr__ = renamed_names(__name__, {"AliveBytes": "LiveBytes"})
