"""What ``rtrl.BlockRTRL`` costs over a run: block after block, each as ``block_macs`` and ``block_peak`` have it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtrl._influence.transition import Pattern
from rtrl._utils import index_sets
from rtrl.costs import block_macs, block_peak
from rtrl.costs.block_bytes import Touched, at_moment, held
from rtrl.costs.block_macs import Extent, Slices
from rtrl.costs.dormant import Sleepers
from rtrl.costs.profile import Profile
from rtrl.costs.result import Choice
from rtrl.costs.routing import Routing

MOST_BLOCKS, MOST_STEPS = 96, 2048
"""So much of a routing cell's run is gone through block by block; the rest costs what the second half of it does."""


@dataclass(frozen=True)
class _Closing:
    """A block that closes: the steps closed before, those in it, what it touches, and the bytes that leading sleeping
    slices to the present takes, before there is room for its births and after."""

    closed: int
    steps: int
    extent: Extent
    moved: tuple[int, int] = (0, 0)


def block_rtrl(profile: Profile, steps: int, block: int, window: int, lazy: bool = True) -> Choice:
    """``BlockRTRL(block=..., window=..., lazy=...)``."""
    go = _one_by_one if profile.declares else _alike
    macs, closings, guessed = go(profile, steps, block, window, lazy)
    macs += profile.forward(1) + profile.forward(steps)
    touched = Touched.of(profile, steps)
    parts = held(profile, touched, steps, block, window, lazy)
    peak = sum(parts.values())
    for one in closings:
        moments = [
            at_moment(profile, touched, one.closed, one.steps, block, window, lazy, laid_out)
            for laid_out in (False, True)
        ]
        kept = moments[0]["scratch"]
        phases = block_peak.closing(profile, touched, one.steps, one.extent, one.moved, one.closed, kept)
        peak = max(peak, *(sum(there.values()) + needed for there, needed in zip(moments, phases, strict=True)))
    return Choice(
        "BlockRTRL",
        True,
        macs,
        steps,
        parts,
        peak,
        block=block,
        window=window if touched.awake and lazy else None,
        estimated=guessed or not profile.steady,
    )


def _moments(steps: int, block: int) -> list[tuple[int, int]]:
    """The blocks whose closing may be the height of a run of blocks that are alike: steps closed before, and steps in
    it."""
    last = (steps - 1) // block * block
    starts = sorted({0, max(last - block, 0), last})
    return [(start, min(block, steps - start)) for start in starts]


def _alike(profile: Profile, steps: int, block: int, window: int, lazy: bool) -> tuple[int, list[_Closing], bool]:
    """A cell that declares nothing: all blocks are alike."""
    extent = block_macs.dense(profile)
    whole, rest = divmod(steps, block)
    macs = 0
    if whole:
        macs += block_macs.closing(profile, block, extent, first=True)
        macs += (whole - 1) * block_macs.closing(profile, block, extent, first=False)
    if rest:
        macs += block_macs.closing(profile, rest, extent, first=not whole)
    closings = [_Closing(closed, m, extent) for closed, m in _moments(steps, block)]
    return macs + _checks(profile, closings), closings, False


def _checks(profile: Profile, closings: list[_Closing]) -> int:
    checked: dict[int, int] = {}
    for one in closings:
        checked.update(block_macs.checks(profile, one.steps, one.extent))
    return sum(checked.values())


def _one_by_one(profile: Profile, steps: int, block: int, window: int, lazy: bool) -> tuple[int, list[_Closing], bool]:
    """A cell whose steps touch less than all: block after block."""
    routing = Routing(profile, steps)
    sleepers = Sleepers(routing.groups, profile.batch_size, profile.rows, profile.width, profile.itemsize, window, lazy)
    total = -(-steps // block)
    count = total if routing.given else min(total, MOST_BLOCKS, max(8, MOST_STEPS // block))
    macs, closings, spent = 0, list[_Closing](), [0]
    for i in range(count):
        start, stop = i * block, min((i + 1) * block, steps)
        extent, pattern, keys = _closed(profile, routing, start, stop)
        moved = sleepers.close(pattern, keys)
        macs += block_macs.closing(profile, stop - start, extent, first=i == 0) + moved.macs
        spent.append(macs)
        closings.append(_Closing(start, stop - start, extent, (moved.before, moved.after)))
    if count < total:
        macs += round((steps / block - count) * (spent[-1] - spent[count // 2]) / (count - count // 2))
        # The end of the run: as the largest of the blocks gone through, with all of the influence there.
        closings += [replace(one, closed=steps - one.steps) for one in closings[count // 2 :]]
    return macs + sleepers.sync() + _checks(profile, closings), closings, not routing.given


def _closed(profile: Profile, routing: Routing, start: int, stop: int) -> tuple[Extent, Pattern, list[Tensor]]:
    """What a block touches."""
    size, n = profile.batch_size, profile.rows
    choice = routing.block(start, stop)

    def flat(index: Tensor | None) -> Tensor | None:
        return None if index is None else index.flatten(0, 1)

    own = None
    if choice.reads is not None and choice.writes is not None:
        own = index_sets.mask_to_indices(index_sets.union(flat(choice.reads), flat(choice.writes), n))
    by_sample = None if own is None else own.reshape(size, -1)
    nothing = torch.zeros(size, n, dtype=torch.bool)
    written = None if choice.writes is None else choice.writes.reshape(size, -1)
    rows = index_sets.mask_to_indices(index_sets.union(nothing, written, n))
    cols = (
        None
        if rows is None
        else index_sets.mask_to_indices(index_sets.union(index_sets.union(nothing, by_sample, n), rows, n))
    )
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
