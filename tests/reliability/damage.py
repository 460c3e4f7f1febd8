"""Damage to saved runs: bits, sectors and fields are changed, and each file is refused or loads what was written.

As a program, the long form: ``python tests/reliability/damage.py --each 110``.
"""

import argparse
import copy
import io
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtrl._utils.plain_content import digest, read_content, write_content
from rtrl.errors import RTRLError
from rtrl.training import Trainer
from rtrl.training.run import Settings, load, save

SECTOR = 512
SLOWEST_S = 20  # that a file may take, on a busy machine

RUNS = {
    "dense": Settings("anbn", {}, "block", {"block": 3}, "gru", {"hidden": 2}, batch_size=2, log_every=2),
    "rows": Settings("anbn", {}, "block", {"block": 3}, "elstm", {"hidden": 2}, batch_size=2, log_every=2),
    "single": Settings("anbn", {}, "block", {"block": 1}, "rnn", {"hidden": 2}, "sgd", batch_size=1, log_every=4),
    "mixture": Settings(
        *("anbn", {}, "block", {"block": 2, "window": 3}, "moe"),
        {"d_model": 4, "n_slots": 3, "n_experts": 4, "topk": 1, "read_slots": 1, "write_slots": 1},
        batch_size=2,
        log_every=3,
    ),
    "tbptt": Settings("anbn", {}, "tbptt", {"k": 3}, "rnn", {"hidden": 2}, batch_size=1, log_every=2),
    "snap": Settings("anbn", {}, "snap", {"order": 2}, "rnn", {"hidden": 2}, batch_size=1, log_every=2),
    "uoro": Settings("anbn", {}, "uoro", {}, "rnn", {"hidden": 2}, batch_size=1, log_every=2),
}


class Case(NamedTuple):
    """A damaged file: what was done, and its bytes."""

    what: str
    data: bytes


def written(name: str, steps: int = 7) -> bytes:
    """The file of a run after some steps, with an open block."""
    settings = RUNS[name]
    trainer = settings.build()
    for _ in range(steps):
        trainer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.pt")
        save(path, settings, trainer, {"steps": 99})
        return path.read_bytes()


def content_of(data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = read_content(io.BytesIO(data))
    return content


def as_file(content: dict[str, Any]) -> bytes:
    """The file that somebody makes who can write digests, too."""
    file = io.BytesIO()
    write_content(content, file)
    return file.getvalue()


# ---------------------------------------------------------------------- bytes


def damaged_bytes(data: bytes, draws: random.Random, count: int) -> Iterator[Case]:
    """Files as disks and transfers damage them."""
    for _ in range(count):
        kind, at = (
            draws.choice(["bit", "bit", "bit", "cut", "zeros", "swap", "twice", "more"]),
            draws.randrange(len(data)),
        )
        sector = at // SECTOR * SECTOR
        if kind == "bit":
            changed = bytearray(data)
            changed[at] ^= 1 << draws.randrange(8)
            yield Case(f"bit of byte {at}", bytes(changed))
        elif kind == "cut":
            yield Case(f"cut at {at}", data[:at])
        elif kind == "zeros":
            length = len(data[sector : sector + SECTOR])
            yield Case(f"zeros from {sector}", data[:sector] + bytes(length) + data[sector + length :])
        elif kind == "swap":
            other = draws.randrange(len(data)) // SECTOR * SECTOR
            first, second = sorted((sector, other))
            a, b = data[first : first + SECTOR], data[second : second + SECTOR]
            middle = data[first + SECTOR : second]
            swapped = data if first == second else data[:first] + b + middle + a + data[second + SECTOR :]
            yield Case(f"sectors {first} and {second} swapped", swapped)
        elif kind == "twice":
            yield Case(f"sector {sector} twice", data[:sector] + data[sector : sector + SECTOR] + data[sector:])
        else:
            yield Case(f"{at % 50 + 1} bytes more", data + draws.randbytes(at % 50 + 1))


# ---------------------------------------------------------------------- fields


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all parts of a tree."""
    if path:
        yield path
    if isinstance(tree, dict):
        for key in tree:
            yield from places(tree[key], (*path, key))
    elif isinstance(tree, list | tuple):
        for index in range(len(tree)):
            yield from places(tree[index], (*path, index))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if isinstance(tree, Tensor):
            raise TypeError("a tensor has no parts")
        tree = tree[key]
    return tree


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a place; changed in place but for tuples."""
    if not path:
        return value
    changed = put(tree[path[0]], path[1:], value)
    if isinstance(tree, tuple):
        return tuple(changed if i == path[0] else each for i, each in enumerate(tree))
    tree[path[0]] = changed
    return tree


def _tensors(value: Tensor, draws: random.Random) -> list[Any]:
    """Tensors that somebody could put in the place of one."""
    flat = value.clone().flatten()
    bad = [value.reshape(-1)[:0], value.unsqueeze(0), value.flatten(), None, [], value.tolist(), "text", {}]
    bad += [value.double() if value.dtype != torch.float64 else value.float(), value.to(torch.int32), value.bool()]
    if value.ndim > 1:
        bad += [value.transpose(0, 1), value[:1], torch.cat([value, value])]
    if value.numel():
        for special in (
            [-1, 2**40, -(2**62)] if value.dtype == torch.int64 else [float("nan"), float("inf"), 1e30, -1.0]
        ):
            if value.dtype != torch.bool and value.dtype != torch.uint8:
                changed = flat.clone()
                changed[draws.randrange(len(changed))] = special
                bad.append(changed.view(value.shape))
        bad.append((~flat if value.dtype == torch.bool else flat.flip(0)).view(value.shape))
        bad.append(torch.zeros_like(value))
    return bad


def hostile(value: Any, draws: random.Random) -> list[Any]:
    """Values that somebody could put in the place of one."""
    if isinstance(value, Tensor):
        return _tensors(value, draws)
    anything: list[Any] = [
        None,
        -1,
        0,
        1,
        10**9,
        2**63,
        10**30,
        -0.5,
        float("nan"),
        float("inf"),
        True,
        False,
        "",
        "a:b",
    ]
    anything += [[], {}, [1], {"a": 1}, torch.zeros(0), torch.ones(3), "\0", "\033[31m", [[]] * 3]
    if isinstance(value, dict):
        anything += [{key: each for key, each in value.items() if key != gone} for gone in value]
        anything += [{**value, "more": 1}, list(value.values())]
    elif isinstance(value, list | tuple):
        anything += [
            list(value)[:-1],
            [*value, *value],
            list(reversed(value)),
            [*value, None],
            dict(enumerate(value)),
        ]
    elif isinstance(value, str):
        anything += [value + " ", value.upper(), value * (1000 if len(value) < 100 else 1)]
    elif isinstance(value, int | float):
        anything += [value + 1, -value - 1, float(value), str(value), value * 1000 + 7]
    return anything


def damaged_fields(data: bytes, draws: random.Random, count: int, *, forged: bool) -> Iterator[Case]:
    """Files with a right digest over a field that was changed.

    Args:
        data: the file.
        draws: draws what is changed.
        count: how many files.
        forged: write the learner's own digest again, too.
    """
    content = content_of(data)
    paths = [path for path in places(content) if forged or path[:2] == ("trainer", "learner")]
    by_kind: dict[str, list[tuple[Any, ...]]] = {}
    for path in paths:
        by_kind.setdefault(_kind(at(content, path)), []).append(path)
    made = 0
    while made < count:
        path, changed = draws.choice(paths), copy.deepcopy(content)
        if draws.random() < 0.15:
            other = draws.choice(by_kind[_kind(at(content, path))])
            if path[: len(other)] == other or other[: len(path)] == path:
                continue
            first, second = copy.deepcopy(at(content, path)), copy.deepcopy(at(content, other))
            changed, what = put(put(changed, path, second), other, first), f"{path} and {other} swapped"
        else:
            value = draws.choice(hostile(at(content, path), draws))
            changed, what = put(changed, path, value), f"{path} = {str(value)[:60]}"
        if forged:
            _forge(changed)
        made += 1
        try:
            yield Case(what, as_file(changed))
        except (RTRLError, OverflowError, AttributeError, TypeError):
            made -= 1  # not a thing that a file can hold


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _forge(content: dict[str, Any]) -> None:
    trainer = content.get("trainer")
    learner = trainer.get("learner") if isinstance(trainer, dict) else None
    if isinstance(learner, dict) and "digest" in learner:
        learner["digest"] = digest({name: value for name, value in learner.items() if name != "digest"})


# ---------------------------------------------------------------------- outcomes


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail if what is inside takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def essence(content: dict[str, Any]) -> str:
    """A digest of what a file holds of a run, without the version that wrote it and what is made again."""
    trainer = {**content["trainer"], "learner": {**content["trainer"]["learner"], "digest": None}}
    return digest({"settings": content["settings"], "trainer": trainer, "random": content["random"]})


def outcome(case: Case, path: Path, whole: str) -> str:
    """What becomes of a damaged file.

    Args:
        case: the file.
        path: where it is put.
        whole: the essence of the file that was damaged.

    Returns:
        "refused"; "the same", if it loads what the file that was damaged had; "what it says", if it loads all of
        another content that has a right digest.

    Raises:
        AssertionError: none of these: an error without a name, or a part that was dropped.
    """
    path.write_bytes(case.data)
    try:
        with at_most(SLOWEST_S):
            settings, trainer, notes = load(path)
    except RTRLError as error:
        text = str(error)
        assert "weights_only" not in text and "\033" not in text, text
        return "refused"
    except (Exception, AssertionError) as error:
        raise AssertionError(f"{case.what}: {type(error).__name__}: {error}") from error
    again = path.with_name("again.pt")
    save(again, settings, trainer, notes)
    said, held = essence(content_of(case.data)), essence(content_of(again.read_bytes()))
    assert said == held, f"{case.what}: it loads something else than the file says: {_difference(case.data, again)}"
    if said == whole:
        return "the same"
    _go_on(case, trainer)
    return "what it says"


def _go_on(case: Case, trainer: Trainer) -> None:
    """Take steps; an error must have a name."""
    try:
        with at_most(SLOWEST_S):
            for _ in range(6):
                trainer.step()
    except RTRLError:
        return
    except (Exception, AssertionError) as error:
        raise AssertionError(f"{case.what}: later {type(error).__name__}: {error}") from error


def _difference(data: bytes, again: Path) -> list[tuple[Any, ...]]:
    one, two = content_of(data), content_of(again.read_bytes())
    names = [p for p in places(one) if not isinstance(at(one, p), dict | list | tuple)]

    def same(path: tuple[Any, ...]) -> bool:
        try:
            return digest(at(one, path)) == digest(at(two, path))
        except (KeyError, IndexError, TypeError):
            return False

    return [path for path in names if not same(path) and path[0] != "notes"][:5]


Make = Callable[[bytes, random.Random, int], Iterator[Case]]


def count_outcomes(name: str, make: Make, count: int, seed: int, fail: bool = True) -> Counter[str]:
    """The outcomes of damaged files of a run."""
    data, draws, found = written(name), random.Random(f"{name} {seed}"), Counter[str]()
    whole = essence(content_of(data))
    with tempfile.TemporaryDirectory() as folder:
        for case in make(data, draws, count):
            try:
                found[outcome(case, Path(folder, "run.pt"), whole)] += 1
            except AssertionError as error:
                if fail:
                    raise
                found["WRONG"] += 1
                print(error)
    return found


def unforged(data: bytes, draws: random.Random, count: int) -> Iterator[Case]:
    return damaged_fields(data, draws, count, forged=False)


def forged(data: bytes, draws: random.Random, count: int) -> Iterator[Case]:
    return damaged_fields(data, draws, count, forged=True)


KINDS: dict[str, Make] = {"bytes": damaged_bytes, "fields": unforged, "forged fields": forged}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--each", type=int, default=110, help="files of each kind and run")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    total, started = Counter[str](), time.perf_counter()
    for kind, make in KINDS.items():
        for name in RUNS:
            found = count_outcomes(name, make, chosen.each, chosen.seed, fail=False)
            print(f"{kind:14} {name:8} {dict(found)}", flush=True)
            total += found
    print(f"{sum(total.values())} damaged files: {dict(total)} in {time.perf_counter() - started:.0f} s")
    sys.exit(1 if total["WRONG"] else 0)


if __name__ == "__main__":
    main()
