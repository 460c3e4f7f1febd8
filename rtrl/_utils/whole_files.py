"""Files that are written whole or not at all, by one process at a time."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from rtrl.errors import FileError

try:
    import fcntl
except ImportError:  # not on this system; then nothing keeps another process away
    fcntl = None  # type: ignore[assignment]


def reason(error: OSError) -> str:
    """What the system says of a failed operation, without the path."""
    return error.strerror or str(error) or type(error).__name__


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace_file(path: Path, half: Path, fill: Callable[[BinaryIO], object], *, previous: Path | None = None) -> None:
    """Write a file beside its place, flush it to the disk and rename it: there is always the old one or the new one.

    Args:
        path: the file; it must not be a symbolic link.
        half: what the new file is called until it is whole; what has that name is removed.
        fill: writes the content to a file that is open for writing.
        previous: what the old file is kept as; None drops it.

    Raises:
        OSError: a step failed. The old file is as it was, and nothing else is left.
    """
    aside = half.with_name(half.name + ".previous")
    try:
        half.unlink(missing_ok=True)
        with half.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, half)
            if previous is not None:
                aside.unlink(missing_ok=True)
                _link(path, aside)
                aside.replace(previous)
        half.replace(path)
        flush_folder(path.parent)
    finally:
        for left in (half, aside):
            with suppress(OSError):
                left.unlink(missing_ok=True)


def _link(path: Path, second: Path) -> None:
    """Give a file a second name; a copy where the file system has no such names."""
    try:
        os.link(path, second)
    except OSError:
        shutil.copyfile(path, second)


class LockedFile:
    """A file that no other process writes through this class until it is closed.

    A symbolic link is followed. What killed writers left half done is removed. The lock belongs to the process, so that
    it ends with it, however that ends; where the file system has no locks, there is none.

    Args:
        path: the file, which need not exist.

    Attributes:
        path: as given.
        target: the file itself.

    Raises:
        FileError: another process has locked it, or its folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.target = path, Path(os.path.realpath(path))
        self._half = self._beside(".half")
        self._lock = self._acquired()
        try:
            self._clear_halves()
        except OSError as error:
            self.close()
            raise FileError(f"{path} cannot be written: {reason(error)}") from error

    @property
    def previous(self) -> Path:
        """Where the file is kept that the last write replaced."""
        return self.target.with_name(self.target.name + ".previous")

    def write(self, fill: Callable[[BinaryIO], object]) -> None:
        """Replace the file, see ``replace_file``, and keep the old one as ``previous``.

        Args:
            fill: writes the content to a file that is open for writing.

        Raises:
            FileError: it cannot be written. The old file is as it was.
        """
        try:
            replace_file(self.target, self._half, fill, previous=self.previous)
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {reason(error)}") from error

    def close(self) -> None:
        """Let other processes write the file."""
        number, self._lock = self._lock, None
        if number is not None:
            with suppress(OSError):
                self._lock_path.unlink()  # while it is locked: a process that opens it later makes another one
            with suppress(OSError):
                os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _lock_path(self) -> Path:
        return self._beside(".lock")

    def _beside(self, ending: str) -> Path:
        return self.target.with_name(f".{self.target.name}{ending}")

    def _acquired(self) -> int | None:
        """The number of the locked file."""
        while fcntl is not None:
            try:
                number = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise FileError(f"{self.path} cannot be written: {reason(error)}") from error
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_present(number):
                    return number
            except BlockingIOError:
                os.close(number)
                raise FileError(
                    f"another process is using {self.path}; wait until it has ended, or choose another file"
                ) from None
            except OSError:  # a file system without locks
                os.close(number)
                self._lock_path.unlink(missing_ok=True)
                return None
            os.close(number)  # the process that had it has removed it meanwhile
        return None

    def _is_present(self, number: int) -> bool:
        """Whether an open lock still has its name."""
        try:
            return os.path.samestat(os.fstat(number), self._lock_path.stat())
        except FileNotFoundError:
            return False

    def _clear_halves(self) -> None:
        """Remove what killed writers left; those of rtrl 0.2.0 had the number of their process for a name."""
        prefix = f".{self.target.name}."
        for path in self.target.parent.glob(f"{_escaped(prefix)}*"):
            if path.name.removeprefix(prefix).isdecimal() or path.name.startswith(self._half.name):
                path.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
