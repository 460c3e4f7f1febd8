"""What ``rtrl.BlockRTRL`` holds between two steps, part by part, as its ``retained_bytes`` counts it."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rtrl._engine import buffers
from rtrl.cells.protocol import Sparsity
from rtrl.costs.profile import Profile

_INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Touched:
    """What a cell's steps touch, as far as memory is laid out by it.

    Attributes:
        reads, writes: rows of the state that a step declares; all of them if it declares none.
        awake: for each parameter kept slice by slice, the steps at which its (sample, slice) pairs first are active,
            ascending; all in step 0 where that is not known.
    """

    reads: int
    writes: int
    awake: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, profile: Profile, steps: int) -> "Touched":
        """From the stream that was profiled if it is as long as the run; else every slice is taken to be active."""
        first, stream = profile.choices[0], profile.choices[:steps]
        reads, writes = (profile.rows if t is None else t.shape[1] for t in (first.reads, first.writes))
        awake: dict[str, Sequence[int]] = {}
        for name in profile.shapes:
            if name in first.active:
                pairs = profile.batch_size * profile.shapes[name][0]
                known = len(stream) == steps and all(name in choice.active for choice in stream)
                awake[name] = _first_use(stream, name) if known else [0] * pairs
        return cls(reads, writes, awake)

    def rows(self, name: str, steps: int) -> int | None:
        """How many pairs of a parameter have been active after so many steps; None if it is not kept in slices."""
        return bisect_left(self.awake[name], steps) if name in self.awake else None


def _first_use(stream: Sequence[Sparsity], name: str) -> list[int]:
    first: dict[tuple[int, int], int] = {}
    for step, choice in enumerate(stream):
        for sample, row in enumerate(choice.active[name].tolist()):
            for index in row:
                first.setdefault((sample, index), step)
    return sorted(first.values())


def held(profile: Profile, touched: Touched, steps: int, block: int, window: int, lazy: bool = True) -> dict[str, int]:
    """What is held when it is most, over ``steps`` steps with a loss at each and a ``sync`` at the end.

    Equation, for a long run: ``influence + tree + block·(x + h + choices + 2·y) + gradient + h`` with
    ``influence = Σ_θ rows·H·p`` numbers and some bookkeeping, rows = B for a whole parameter, p its size; for one in
    slices, the pairs (sample, slice) that were ever active, p the size of a slice.
    """

    closed = (steps - 1) // block * block  # before the last step
    moments = [(closed, steps - closed), (steps, 0)]  # at the end, and after the sync
    if closed:
        moments.append((closed - block, block))
    parts = [at_moment(profile, touched, *moment, block, window, lazy) for moment in moments]
    return max(parts, key=lambda held: sum(held.values()))


def at_moment(
    profile: Profile,
    touched: Touched,
    closed: int,
    open_steps: int,
    block: int,
    window: int,
    lazy: bool,
    laid_out: bool = False,
) -> dict[str, int]:
    """What is held after so many steps whose blocks have closed and so many that are open; ``laid_out``: while the open
    ones close, once there is room for their influence."""
    kept = profile.x_bytes + profile.state_bytes + profile.choice_bytes + 2 * profile.output_bytes
    return {
        "influence": influence(profile, touched, closed + open_steps if laid_out else closed),
        "tree": tree(profile, touched, block, window, lazy),
        "block": open_steps * kept,
        "gradient": profile.parameter_bytes if closed and open_steps else 0,
        "state": profile.state_bytes,
        "scratch": max(kept_for_sweeps(profile, m) for m in {min(closed, block), closed % block}),
    }


def influence(profile: Profile, touched: Touched, closed: int) -> int:
    """Bytes of the influence once the blocks of so many steps have closed."""
    return sum(influence_of(profile, touched, name, closed) for name in profile.shapes)


def influence_of(profile: Profile, touched: Touched, name: str, closed: int) -> int:
    """The same of one parameter."""
    shape, pairs = profile.shapes[name], touched.rows(name, closed)
    slices = 1 if pairs is None else shape[0]
    rows = (profile.batch_size if closed else 0) if pairs is None else pairs
    row = profile.state_size * (shape.numel() // max(slices, 1)) * profile.itemsize
    return rows * (row + 3 * _INDEX) + profile.batch_size * slices * _INDEX


def reach(profile: Profile, steps: int, rows: int, writes: int) -> int:
    """Bytes of what the sweep through m steps leaves behind: u·width + 1 rows (``rows``) by w·width entries
    (``writes``) a step and sample."""
    return steps * profile.batch_size * rows * writes * profile.itemsize


def kept_for_sweeps(profile: Profile, steps: int) -> int:
    """Bytes of the same that are kept for the next block, as ``buffers`` keeps them: of dense steps, on a CPU."""
    full = profile.state_size
    if profile.device != "cpu" or profile.choices[0].writes is not None:
        return 0
    size = reach(profile, steps, full + 1, full)
    most = profile.parameter_size * profile.batch_size * full * profile.itemsize
    return size if buffers._LEAST_BYTES <= size <= most else 0


def tree(profile: Profile, touched: Touched, block: int, window: int, lazy: bool = True) -> int:
    """Bytes of the tree: reserved at the first step, for as much as its nodes can ever hold; one leaf if nothing can
    sleep."""
    rows = min(profile.rows, block * touched.writes)
    cols = min(profile.rows, block * (touched.reads + touched.writes))
    width, total = profile.width, 0
    for span in _spans(window if lazy and touched.awake else 1):
        u, c = min(profile.rows, span * rows), min(profile.rows, span * cols)
        total += profile.batch_size * ((u * width + 1) * c * width * profile.itemsize + (u + c) * _INDEX)
    return total


def _spans(capacity: int) -> Iterator[int]:
    """How many blocks each node of the tree covers."""
    stack = [capacity]
    while stack:
        span = stack.pop()
        yield span
        if span > 1:
            stack += [span // 2, span - span // 2]
