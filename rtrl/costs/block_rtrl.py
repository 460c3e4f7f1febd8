"""What ``rtrl.BlockRTRL`` costs over a run: a few blocks of it, measured, and the others like the last of these."""

from dataclasses import dataclass, replace
from itertools import pairwise

from rtrl.costs.others import highest, line, lines
from rtrl.costs.profile import Profile
from rtrl.costs.result import Choice
from rtrl.learners.block_rtrl import BlockRTRL

MOST_STEPS, MOST_ROUTING_BLOCKS = 200, 40
"""A run is measured up to this number of steps, and of a cell that routes, to a third of it and to this number of
blocks; blocks that are too long for it are extrapolated from shorter lengths."""

MOST_GIVEN_STEPS = 512
"""On a stream that the user gave, a run of a cell that routes is measured as a whole up to this number of steps."""

MOST_LENGTH = 64
"""Blocks of a cell that routes are run up to this number of steps, or twice as many, where shorter ones differ."""

FEW_BLOCKS = 16
"""In runs of more blocks, the last one is taken to cost what its share of steps costs in another."""

MANY = 2**16  # a window that no slice is dormant for
_INDEX = 24  # bytes of the three indices of each row of an influence


@dataclass(frozen=True)
class _Blocks:
    """Blocks of one length at the start of a run, and the block that ends it.

    Attributes:
        opening: multiply-adds of the first step.
        blocks: of each full block, with as many steps forward as it has.
        last: of the last block, with the ``sync``.
        held: bytes by part when that is most.
        peaks: the most bytes alive at once, by operation.
        ran: how many steps were run.
    """

    opening: int
    blocks: list[int]
    last: int
    held: dict[str, int]
    peaks: dict[str, int]
    ran: int


def block_rtrl(
    profile: Profile, steps: int, block: int, window: int, lazy: bool = True, most: int | None = None
) -> Choice:
    """Predict ``BlockRTRL(block=..., window=..., lazy=...)``.

    Multiply-adds and bytes of a block are linear in its steps, and those of a run in its blocks. Where ``xs`` covers
    the run, slices become active as they do in it; else all of them do.

    Args:
        profile: of the cell.
        steps: T.
        block: as for the learner; so window and lazy.
        window: as above.
        lazy: as above.
        most: the most steps that are run; ``MOST_STEPS`` by default.
    """
    full, rest = (steps - 1) // block, (steps - 1) % block + 1
    if profile.declares and steps <= min(profile.given, MOST_GIVEN_STEPS):
        most, count = steps, full
    else:
        most = most or (MOST_STEPS // 3 if profile.declares else MOST_STEPS)
        alike = 4 if block == 1 else 2  # the first blocks of one step are held against another way to process them
        count = min(full, MOST_ROUTING_BLOCKS, max(2, most // block - 1)) if profile.declares else min(full, alike)
    longest = 4
    while 2 * longest * (count + 1) <= most:
        longest *= 2
    if profile.declares:
        longest = max(2 * _covering(profile), MOST_LENGTH)
    scaled = count * block + min(rest, block) > most and block > longest
    end = 1 if full > FEW_BLOCKS else rest  # how long the last block is hardly counts in a long run
    if not scaled:
        found = _measured(profile, block, count, end, window, lazy)
    else:
        lengths = longest // 4, longest // 2, longest
        runs = [(m, _measured(profile, m, count, 1 if end == 1 else m, MANY, lazy)) for m in lengths]
        found = _longer(runs, block, end)
    found = _with_tree(found, profile, block, window, lazy)
    macs: float = found.opening + sum(found.blocks) + found.last
    if full > count:
        half = found.blocks[len(found.blocks) // 2 :]
        later = sum(half) / len(half)
        macs += (full - count) * later + (rest - end) * later / block
    beyond = _beyond(profile, steps, found.ran)
    return Choice(
        "BlockRTRL",
        True,
        round(macs),
        steps,
        found.held | {"influence": found.held["influence"] + beyond},
        found.peaks["any"] + beyond,
        block=block,
        window=window if profile.sliced and lazy else None,
        estimated=(profile.declares and steps > max(profile.given, 1)) or not profile.steady,
        extrapolated=scaled,
    )


def _covering(profile: Profile) -> int:
    """The steps, a power of two, in which nearly all rows and slices that the stream uses are touched: blocks that are
    no shorter are alike."""

    def used(length: int) -> int:
        begin = MOST_LENGTH  # choices that were drawn begin with a round that leaves no slice out
        return sum(profile.touched(name, begin + length, begin) for name in (None, *profile.sliced))

    length, every = 4, used(2 * MOST_LENGTH)
    while length < MOST_LENGTH and used(length) < 0.95 * every:
        length *= 2
    return length


def _measured(profile: Profile, block: int, count: int, rest: int, window: int, lazy: bool) -> _Blocks:
    """``count`` blocks and a last one, run. A window that no slice is dormant for is taken to be shorter."""
    ran = count * block + rest
    used = min(window, _longest_dormancy(profile, ran) // block + 2) if profile.sliced and lazy else 1
    run = profile.run(BlockRTRL, ran, block=block, window=used, lazy=lazy, audit="off")
    opened = range(0, ran, block)  # the first steps of blocks
    blocks = [run.macs[second] - run.macs[first] for first, second in pairwise(opened)]
    last = run.macs[-1] - run.macs[opened[-1]]
    return _Blocks(run.macs[0], blocks, last, run.most_held, run.peaks, ran)


def _longest_dormancy(profile: Profile, steps: int) -> int:
    """The most steps in a row that a slice, once active, is dormant in the first steps of the stream."""
    longest = 0
    for name in {id(profile.choice(0).active[name]): name for name in profile.sliced}.values():
        last: dict[tuple[int, int], int] = {}
        for step in range(steps):
            for sample, row in enumerate(profile.choice(step).active[name].tolist()):
                for index in row:
                    longest = max(longest, step - last.get((sample, index), step))
                    last[sample, index] = step
        longest = max([longest, *(steps - step for step in last.values())])
    return longest


def _with_tree(found: _Blocks, profile: Profile, block: int, window: int, lazy: bool) -> _Blocks:
    """With the tree that a learner of this block and window reserves at its first step."""
    if not profile.sliced or not lazy:
        return found
    tree = profile.run(BlockRTRL, 1, block=block, window=window, audit="off").held[0]["tree"]
    peaks = {name: peak + tree - found.held["tree"] for name, peak in found.peaks.items()}
    return replace(found, held=found.held | {"tree": tree}, peaks=peaks)


def _longer(runs: list[tuple[int, _Blocks]], block: int, rest: int) -> _Blocks:
    """Blocks longer than those run, on the lines through the last two of three lengths."""
    _, (m, one), (n, two) = runs

    def at(first: int, second: int, steps: int = block) -> int:
        return line((m, first), (n, second))(steps)

    return _Blocks(
        two.opening,
        [at(*pair) for pair in zip(one.blocks, two.blocks, strict=True)],
        at(one.last, two.last, rest),
        lines((m, one.held), (n, two.held), block),
        {"any": highest([(length, found.peaks) for length, found in runs], block)},
        two.ran,
    )


def _beyond(profile: Profile, steps: int, ran: int) -> int:
    """Bytes of the influence that the run has and the steps that were run do not have."""
    missing, entries = 0, profile.state[0, 0].numel() if profile.by_slot else profile.state_size
    for name, slices in profile.sliced.items():
        rows = profile.touched(name, steps) if steps <= profile.given else profile.batch_size * slices
        row = entries * profile.sizes[name] // slices * profile.itemsize + _INDEX
        missing += row * max(0, rows - profile.touched(name, ran))
    return missing
