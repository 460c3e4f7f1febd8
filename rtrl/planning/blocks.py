"""What ``rtrl.BlockRTRL`` costs over a run: block after block, each as ``block_macs`` and ``block_peak`` have it."""

import torch
from torch import Tensor

from rtrl import _rows
from rtrl.planning import block_macs, block_peak
from rtrl.planning.block_bytes import Touched, at_moment, held
from rtrl.planning.block_macs import Extent, Slices
from rtrl.planning.choice import Choice
from rtrl.planning.profile import Profile
from rtrl.planning.routing import Routing
from rtrl.planning.sleep import Sleepers
from rtrl.transition import Pattern

MOST_BLOCKS, MOST_STEPS = 96, 2048
"""So much of a routing cell's run is gone through block by block; the rest costs what the second half of it does."""


def block_rtrl(profile: Profile, steps: int, block: int, window: int, lazy: bool = True) -> Choice:
    """``BlockRTRL(block=..., window=..., lazy=...)``."""
    go = _one_by_one if profile.declares else _alike
    macs, largest, scratch, guessed = go(profile, steps, block, window, lazy)
    macs += profile.forward(1) + profile.forward(steps)
    touched = Touched.of(profile, steps)
    parts = held(profile, touched, steps, block, window, lazy)
    peak = 0
    for closed, m in _moments(steps, block):
        there = at_moment(profile, touched, closed, m, block, window, lazy, during=True)
        peak = max(peak, sum(there.values()) + block_peak.closing(profile, touched, m, largest, scratch, closed))
    return Choice(
        "BlockRTRL",
        True,
        macs,
        steps,
        parts,
        max(peak, sum(parts.values())),
        block=block,
        window=window if touched.awake and lazy else None,
        estimated=guessed or not profile.steady,
    )


def _moments(steps: int, block: int) -> list[tuple[int, int]]:
    """The blocks whose closing may be the height of a run: steps closed before, and steps in it."""
    last = (steps - 1) // block * block
    starts = sorted({0, max(last - block, 0), last})
    return [(start, min(block, steps - start)) for start in starts]


def _alike(profile: Profile, steps: int, block: int, window: int, lazy: bool) -> tuple[int, Extent, int, bool]:
    """A cell that declares nothing: all blocks are alike."""
    extent = block_macs.dense(profile)
    whole, rest = divmod(steps, block)
    macs = 0
    if whole:
        macs += block_macs.closing(profile, block, extent, first=True)
        macs += (whole - 1) * block_macs.closing(profile, block, extent, first=False)
    if rest:
        macs += block_macs.closing(profile, rest, extent, first=not whole)
    sizes = ([block] if whole else []) + ([rest] if rest else [])
    return macs + _checks(profile, [(m, extent) for m in sizes]), extent, 0, False


def _checks(profile: Profile, closed: list[tuple[int, Extent]]) -> int:
    checked: dict[int, int] = {}
    for m, extent in closed:
        checked.update(block_macs.checks(profile, m, extent))
    return sum(checked.values())


def _one_by_one(profile: Profile, steps: int, block: int, window: int, lazy: bool) -> tuple[int, Extent, int, bool]:
    routing = Routing(profile, steps)
    sleepers = Sleepers(routing.groups, profile.batch_size, profile.rows, profile.width, profile.itemsize, window, lazy)
    total = -(-steps // block)
    count = total if routing.given else min(total, MOST_BLOCKS, max(8, MOST_STEPS // block))
    macs, sizes, largest = 0, [], None
    spent = [0]
    for i in range(count):
        start, stop = i * block, min((i + 1) * block, steps)
        extent, pattern, keys = _closed(profile, routing, start, stop)
        macs += block_macs.closing(profile, stop - start, extent, first=i == 0) + sleepers.close(pattern, keys)
        spent.append(macs)
        sizes.append((stop - start, extent))
        if largest is None or (stop - start) * extent.rows * extent.cols >= largest[0]:
            largest = (stop - start) * extent.rows * extent.cols, extent
    if count < total:
        macs += round((steps / block - count) * (spent[-1] - spent[count // 2]) / (count - count // 2))
    assert largest is not None
    return macs + sleepers.sync() + _checks(profile, sizes), largest[1], sleepers.scratch_bytes, not routing.given


def _closed(profile: Profile, routing: Routing, start: int, stop: int) -> tuple[Extent, Pattern, list[Tensor]]:
    """What a block touches."""
    size, n = profile.batch_size, profile.rows
    choice = routing.block(start, stop)

    def flat(index: Tensor | None) -> Tensor | None:
        return None if index is None else index.flatten(0, 1)

    own = None
    if choice.reads is not None and choice.writes is not None:
        own = _rows.members(_rows.union(flat(choice.reads), flat(choice.writes), n))
    by_sample = None if own is None else own.reshape(size, -1)
    nothing = torch.zeros(size, n, dtype=torch.bool)
    written = None if choice.writes is None else choice.writes.reshape(size, -1)
    rows = _rows.members(_rows.union(nothing, written, n))
    cols = None if rows is None else _rows.members(_rows.union(_rows.union(nothing, by_sample, n), rows, n))
    keys, sliced = [], {}
    for place, group in enumerate(routing.groups):
        used = choice.active[group.names[0]]
        pairs = (torch.arange(size)[:, None, None] * group.slices + used).flatten()
        active, uses = pairs.unique(return_counts=True)
        keys.append(active)
        most = int(used.flatten().bincount().max()) if used.numel() else 0
        for name in group.names:
            sliced[name] = Slices(place, used.shape[2], uses.tolist(), most, group.slices)
    extent = Extent(
        rows=n if rows is None else rows.shape[1],
        cols=n if cols is None else cols.shape[1],
        writes=n if choice.writes is None else choice.writes.shape[2],
        reach=n if own is None else own.shape[1],
        all_rows=choice.reads is None and choice.writes is None,
        sliced=sliced,
    )
    return extent, Pattern(rows, cols, n, profile.width, size), keys
