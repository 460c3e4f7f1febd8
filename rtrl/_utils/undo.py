"""What is changed for a while is put back, even if an interrupt strikes at the moment of putting it back.

A context manager puts things back when it is left; but Ctrl-C may strike as it is being left. So each such change is
noted here, and the code that catches the interrupt further out calls ``put_back``.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Undo:
    """Does something at most once."""

    __slots__ = ("_do",)

    def __init__(self, do: Callable[[], None]) -> None:
        self._do: Callable[[], None] | None = do

    def run(self) -> None:
        if self._do is not None:
            self._do()
            self._do = None


class _Noted(threading.local):
    def __init__(self) -> None:
        self.entries: list[_Undo] = []


_NOTED = _Noted()


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo`` at the end of the context: once, and no later than ``put_back`` does.

    Args:
        undo: puts back what the body is about to change. It may be cut short and called again.
    """
    noted = _Undo(undo)
    _NOTED.entries.append(noted)
    try:
        yield
    finally:
        noted.run()
        if noted in _NOTED.entries:
            _NOTED.entries.remove(noted)


def noted() -> int:
    """Return how many changes are in force in this thread."""
    return len(_NOTED.entries)


def put_back(count: int) -> None:
    """Undo the newest changes in this thread, so that ``count`` are left."""
    while len(_NOTED.entries) > count:
        _NOTED.entries[-1].run()
        _NOTED.entries.pop()
