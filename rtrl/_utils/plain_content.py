"""Tensors, numbers and containers of these: their digest, and files of them that carry it."""

import hashlib
import pickletools
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from rtrl.errors import ConfigError, FileError

_MARK = b"rtrl sha256 "
_TRAILER = len(_MARK) + hashlib.sha256().digest_size
_CHUNK = 2**20
_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}  # and the storages of torch
_NAMING = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID")


def digest(tree: Any) -> str:
    """Return 32 hexadecimal digits that depend on every bit of a tree: containers, keys, numbers, texts and tensors.

    Lists and tuples count as equal, so do the devices of tensors, and the order of keys. Objects of other kinds count
    by their type alone.
    """
    total = hashlib.sha256()
    _add(total, tree)
    return total.hexdigest()[:32]


def _add(total: Any, tree: Any) -> None:
    if isinstance(tree, Tensor):
        value = tree.detach()
        total.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.cpu().contiguous().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(tree, Mapping):
        total.update(f"mapping {len(tree)};".encode())
        for key in sorted(tree, key=repr):
            _add(total, key)
            _add(total, tree[key])
    elif isinstance(tree, str | bytes):
        data = tree.encode("utf-8", "surrogatepass") if isinstance(tree, str) else tree
        total.update(f"{'text' if isinstance(tree, str) else 'bytes'} {len(data)};".encode() + data)
    elif tree is None or isinstance(tree, bool | int):
        total.update(f"{type(tree).__name__} {tree};".encode())
    elif isinstance(tree, float):
        total.update(b"float " + struct.pack("<d", tree))
    elif isinstance(tree, Sequence):
        total.update(f"sequence {len(tree)};".encode())
        for value in tree:
            _add(total, value)
    else:
        total.update(f"object {type(tree).__qualname__};".encode())


def check_plain(tree: Any, what: str) -> None:
    """Refuse a tree with anything in it that a file could not give back.

    Raises:
        ConfigError: there is an object that is neither a tensor, a number, a text nor a container of these.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            check_plain(key, what)
            check_plain(value, f"{what}[{key!r}]")
    elif type(tree) in (list, tuple):
        for index, value in enumerate(tree):
            check_plain(value, f"{what}[{index}]")
    elif type(tree) is not Tensor and type(tree) not in (str, int, float, bool, type(None)):
        raise ConfigError(
            f"{what} is a {type(tree).__name__}, which cannot be saved; only tensors, numbers, texts, and lists, "
            "tuples and dicts of these can"
        )


class _Hashing:
    """A file that adds what is written to it to a digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.total = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.total.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_content(content: Mapping[str, Any], file: BinaryIO) -> None:
    """Write content as ``torch.save`` does, with a SHA-256 of the file as the comment of the archive.

    ``torch.load(..., weights_only=True)`` reads the file, too.

    Args:
        content: plain values and tensors, see ``check_plain``.
        file: open for writing, empty.

    Raises:
        OSError: it cannot be written.
        ConfigError: the content is not plain.
    """
    check_plain(content, "content")
    hashing = _Hashing(file)
    torch.save(dict(content), cast(BinaryIO, hashing))
    file.seek(-2, 1)  # the length of the comment, zero so far
    file.write(_TRAILER.to_bytes(2, "little") + _MARK + hashing.total.digest())


def read_content(file: BinaryIO, *, with_digest: bool = True) -> Any:
    """Read what ``write_content`` wrote, after the digest has been checked. No code that the file names is run.

    Args:
        file: open for reading.
        with_digest: False takes a file of ``torch.save``, which has none.

    Raises:
        FileError: the file is damaged, is not of this kind, or holds more than plain values and tensors.

    Cost:
        Two passes over the file; at most its size in memory, besides the objects that are no tensors.
    """
    size = _check_digest(file) if with_digest else file.seek(0, 2)
    try:
        _check_archive(file, size)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        _check_size(content, size)
    except FileError:
        raise
    except Exception as error:  # what a malformed archive raises depends on how it is malformed
        raise FileError(f"it cannot be read: {type(error).__name__}") from error
    return content


def _check_digest(file: BinaryIO) -> int:
    """Return the size of a file whose digest is right.

    Raises:
        FileError: it is not, or there is none.
    """
    size = file.seek(0, 2)
    start = size - _TRAILER
    file.seek(max(start - 2, 0))
    length, mark, expected = file.read(2), file.read(len(_MARK)), file.read()
    if start < 2 or mark != _MARK:
        raise FileError("it has no digest at its end: it is cut off, or of another kind")
    total = hashlib.sha256()
    file.seek(0)
    left = start - 2
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise FileError("it became shorter while it was read")
        total.update(chunk)
        left -= len(chunk)
    total.update(b"\0\0")
    if total.digest() != expected or length != _TRAILER.to_bytes(2, "little"):
        raise FileError("it was changed after it was written: its digest is not that of its content")
    return size


def _check_archive(file: BinaryIO, size: int) -> None:
    """Refuse an archive that takes more memory than it has bytes, or names anything but tensors and containers.

    Raises:
        FileError: it does.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
        if compressed or sum(part.file_size for part in parts) > size:
            raise FileError("its parts are larger than the file")
        pickles = [part for part in parts if part.filename.endswith(".pkl")]
        if [part.filename.partition("/")[2] for part in pickles] != ["data.pkl"]:
            raise FileError("it is not an archive of one saved object")
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if operation.name in _NAMING and not _is_known(str(argument)):
                raise FileError(
                    f"it names {str(argument)[:80]!r}, which could run code; files of this kind hold tensors, numbers "
                    "and containers of these alone. Nothing of it was loaded"
                )


def _check_size(content: Any, size: int) -> None:
    """Refuse content that is larger than the file it is from: with parts that are used many times over.

    Raises:
        FileError: it is.
    """
    waiting, parts, n_bytes = [content], 0, 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if isinstance(part, Tensor):
            n_bytes += part.numel() * part.element_size()
        elif isinstance(part, Mapping):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            waiting += part
        if max(parts, n_bytes) > size:
            raise FileError("its content is larger than the file")


def _is_known(name: str) -> bool:
    return name in _GLOBALS or (name.startswith("torch ") and name.endswith("Storage") and name[6:].isidentifier())
