"""Checks of values that lie on a device: collected while a block closes, and read by the host all at once.

A host that reads a value waits for the device. So while ``deferring`` is entered, a check of a tensor that the host
cannot read counts as passed and is noted; ``Deferred.passed`` reads all of them in one transfer. Where it says no, the
caller does the same work once more without deferring: then the check that fails says what is wrong.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from rtrl._utils.undo import undone


class Deferred:
    """Checks that count as passed until they are read."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._conditions: list[Tensor] = []

    def passed(self) -> bool:
        """Whether all checks passed; if an entry is NaN or infinite, or a sum of entries overflows, they did not.

        Cost: one transfer from the device.
        """
        parts = [torch.isfinite(torch.stack(sums)).all() for sums in _by_dtype(self._sums)]
        parts += [torch.stack(self._conditions).all()] if self._conditions else []
        self._sums, self._conditions = [], []
        return not parts or read(torch.stack(parts).all())

    def note_finite(self, values: Sequence[Tensor]) -> None:
        """Note that these tensors, real ones, must be finite."""
        self._sums += torch._foreach_norm(list(values), 1)

    def note(self, condition: Tensor) -> None:
        """Note that a Boolean must be true."""
        self._conditions.append(condition)


def _by_dtype(sums: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for total in sums:
        groups.setdefault(total.dtype, []).append(total)
    return list(groups.values())


def on_host(value: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return value.is_cpu


_CURRENT: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


def current(value: Tensor) -> Deferred | None:
    """Where to note a check of this tensor; None if it is to be made now."""
    return None if on_host(value) else _CURRENT.get()


@contextmanager
def deferring(to: Deferred | None) -> Iterator[None]:
    """Note checks of tensors that are not on the CPU, instead of making them; None makes all of them at once."""
    former = _CURRENT.get()

    def put_back() -> None:
        _CURRENT.set(former)

    with undone(put_back):
        _CURRENT.set(to)
        yield


def holds(condition: Tensor) -> bool:
    """Whether a Boolean is true; while checks are deferred, it counts as true and is noted."""
    deferred = current(condition)
    if deferred is None:
        return read(condition)
    deferred.note(condition)
    return True


def read(flag: Tensor) -> bool:
    """Read a Boolean: on a device, the host waits for it."""
    return bool(flag)
