"""What is changed for a while is put back, even if an interrupt strikes at the moment of putting it back.

A context manager puts things back when it is left; but Ctrl-C may strike as it is being left. So each such change is
noted here, and the code that catches the interrupt further out calls ``put_back``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident


class _Undo:
    """Does something at most once.

    Args:
        do: what.
        number: how many changes had been noted before.
    """

    __slots__ = ("_do", "number", "thread")

    def __init__(self, do: Callable[[], None], number: int) -> None:
        self._do: Callable[[], None] | None = do
        self.number, self.thread = number, get_ident()

    def run(self) -> None:
        if self._do is not None:
            self._do()
            self._do = None


class Changes:
    """The changes in force in this process.

    Attributes:
        number: how many have been noted so far.
    """

    def __init__(self) -> None:
        self.number = 0
        self._entries: list[_Undo] = []

    @contextmanager
    def undone(self, undo: Callable[[], None]) -> Iterator[None]:
        """Call ``undo`` at the end of the context: once, and no later than ``put_back`` does.

        Args:
            undo: puts back what the body is about to change. It may be cut short and called again.
        """
        noted = _Undo(undo, self.number)
        self.number += 1
        self._entries.append(noted)
        try:
            yield
        finally:
            noted.run()
            if noted in self._entries:
                self._entries.remove(noted)

    def put_back(self, number: int) -> None:
        """Undo this thread's changes since ``number`` of them had been noted, the newest first."""
        for noted in reversed([each for each in self._entries if each.thread == get_ident() and each.number >= number]):
            noted.run()
            self._entries.remove(noted)


CHANGES = Changes()
undone = CHANGES.undone
