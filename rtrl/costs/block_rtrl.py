"""What ``rtrl.BlockRTRL`` costs over a run: a few blocks of it really run, extrapolated.

Measured on the real learner: the first blocks of m steps and the last one, a loss at each step, the whole run if it has
no more blocks. The blocks between cost what the last full ones do, and hold and need as much.

Blocks that are too long or too expensive to be run are extrapolated from two shorter lengths: their multiply-adds and
bytes are linear in m, but for what moving influences takes, which ``rtrl.costs.moves`` counts. What parameters that are
too large add is computed from their sizes: p entries that take Δ multiply-adds in a step's backward pass add
``(H + 1)·Δ`` to a step, ``B·(H + 1)·H·p`` to a block and ``B·H·p`` numbers; of slices, those that are moved and held.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from rtrl.costs.moves import Moves, longest_dormancy, touched
from rtrl.costs.others import forward_macs, large_macs, largest, line, lines
from rtrl.costs.profile import Profile
from rtrl.costs.result import Choice
from rtrl.learners.block_rtrl import BlockRTRL

MOST_STEPS, MOST_ROUTING_STEPS = 320, 128
"""Blocks are run up to this number of steps in all (of a cell that routes, to the second); longer ones are
extrapolated."""

MOST_MACS = 2**32
"""Blocks are run up to about this number of multiply-adds, and one block alone up to four times as many."""

SHORT = 8
"""Steps of the longer blocks that ``choose_block`` runs."""

FEW_BLOCKS = 16
"""In runs of more blocks it does not count that the last one is of another length."""

COUNTED_BLOCKS, COUNTED_STEPS = 64, 512
"""Of a cell that routes, rows and slices are counted up to this number of blocks, or of steps."""


@dataclass(frozen=True)
class _Blocks:
    """Blocks of one length at the start of a run, and the block that ends it.

    Attributes:
        opening: multiply-adds of the first step.
        macs: multiply-adds of each block, with as many steps forward as it has; the last one with the ``sync``.
        held: bytes by part when that is most: before a block has closed, later, and after the ``sync``.
        peaks: bytes at the peak until the first block has closed, later, and while the last one closes.
        ran: how many steps were really run.
    """

    opening: int
    macs: list[float]
    held: list[dict[str, int]]
    peaks: list[int]
    ran: int


def block_rtrl(
    profile: Profile, steps: int, block: int, window: int, lazy: bool = True, shorter: bool = False
) -> Choice:
    """``BlockRTRL(block=..., window=..., lazy=...)``.

    Where ``xs`` covers the run, slices become active as they do in it; else all of them do, and the stream that is
    known is repeated. ``shorter``: blocks of more than 8 steps are extrapolated, however cheap.
    """
    full, rest = (steps - 1) // block, (steps - 1) % block + 1
    few = _few(profile, block)
    count, most = min(full, few), MOST_ROUTING_STEPS if profile.declares else 4 * SHORT if shorter else MOST_STEPS
    whole = count == full or not profile.declares
    if whole and not profile.frozen and _affordable(profile, count * block + rest, count, most):
        found = _measured(profile, block, count, rest, window, lazy)
    elif full:
        found = _extrapolated(profile, block, full, rest, window, lazy, most)
    else:  # as the first of several blocks of its length
        found = _extrapolated(profile, steps, 2, steps, window, lazy, most)
        found = replace(
            found, macs=[found.macs[0] - forward_macs(profile)], held=found.held[::2], peaks=found.peaks[:1]
        )
    *blocks, last = found.macs
    macs = found.opening + sum(blocks) + last
    if full > len(blocks):
        half = blocks[len(blocks) // 2 :]
        macs += (full - len(blocks)) * sum(half) / len(half)
    influence, growth = _beyond(profile, steps, found.ran)
    peak = max(found.peaks) + influence + growth
    if len(found.macs) == 1 and profile.frozen:  # the influence comes after the sweep, and the graph before it
        peak = max(found.peaks[0], sum(found.held[0].values()) + influence + growth + profile.suffix_bytes(steps))
    held = [parts | {"influence": parts["influence"] + influence * (i > 0)} for i, parts in enumerate(found.held)]
    return Choice(
        "BlockRTRL",
        True,
        round(macs),
        steps,
        largest(held),
        peak,
        block=block,
        window=window if profile.sliced and lazy else None,
        estimated=(profile.declares and steps > max(profile.given, 1)) or not profile.steady,
        computed=bool(profile.frozen),
    )


def _few(profile: Profile, block: int) -> int:
    """How many full blocks are run: of a cell that routes more, as they differ, and fewer where most is computed."""
    blocks, steps = (2, 12) if profile.frozen else (6, 20)
    return max(blocks, -(-steps // block)) if profile.declares else 2


def _affordable(profile: Profile, steps: int, moves: int, most: int, macs: int = MOST_MACS) -> bool:
    """Whether to run this number of steps in blocks after which influences are moved this number of times."""
    known = profile.parameter_size - sum(profile.sizes[name] for name in profile.frozen)
    influence = profile.batch_size * profile.state_size * known
    return (
        steps <= most and steps * (profile.sweep_macs + 2 * influence) + moves * profile.state_size * influence <= macs
    )


def _measured(profile: Profile, block: int, count: int, rest: int, window: int, lazy: bool) -> _Blocks:
    """``count`` blocks and a last one, really run; a window that no slice is dormant for is taken to be shorter."""
    ran = count * block + rest
    within = min(window, _spanned(profile, ran, block))
    options = {"block": block, "window": within if profile.sliced and lazy else 1, "lazy": lazy}
    run = profile.run(BlockRTRL, ran, part=True, replay=True, **options)
    opened = range(0, ran, block)[: count + 1]  # the first steps of blocks
    macs: list[float] = [run.macs[b] - run.macs[a] for a, b in pairwise(opened)]
    macs.append(run.macs[-1] - run.macs[opened[-1]])
    closed = opened[1] if count else ran
    held = [run.held[:closed], run.held[closed:-1], run.held[-1:]]
    peaks = [run.peaks[: closed + 1], run.peaks[closed + 1 : opened[-1] + 1], run.peaks[opened[-1] + 1 :]]
    found = _Blocks(run.macs[0], macs, [largest(h) for h in held if h], [max(p) for p in peaks if p], ran)
    return _with_tree(found, profile, block, window, lazy) if within < window else found


def _spanned(profile: Profile, steps: int, block: int) -> int:
    """A window that no slice is dormant for in the first steps of the stream."""
    return -(-longest_dormancy(profile, steps) // block) + 2


def _with_tree(found: _Blocks, profile: Profile, block: int, window: int, lazy: bool) -> _Blocks:
    """With the tree that a learner of this block and window reserves at its first step."""
    if not profile.sliced or not lazy:
        return found
    tree = profile.tree_bytes(block, window)
    more = tree - found.held[0]["tree"]
    held = [parts | {"tree": tree} for parts in found.held]
    return replace(found, held=held, peaks=[peak + more for peak in found.peaks])


def _extrapolated(profile: Profile, block: int, full: int, rest: int, window: int, lazy: bool, most: int) -> _Blocks:
    """Blocks that are too long, too many or of parameters too large: from some that are run, of all other
    parameters."""
    lengths = _lengths(profile, block, rest, most)
    another = rest != block and full <= FEW_BLOCKS  # the last block is checked as one of another length
    ends = [rest if m == block else m - another for m in lengths]
    covered = full * block + rest <= profile.given
    runs, bases = [], []
    for m, end in zip(lengths, ends, strict=True):
        run, base = _without_moves(profile, m, end, window if covered else None, lazy)
        runs.append(run)
        bases.append(base)
    found, base = runs[-1], bases[-1]
    if lengths[-1] != block:
        found, base = _longer(profile, block, rest, lengths, ends, runs, bases)
        if profile.declares or most > 4 * SHORT:
            found = replace(found, peaks=[found.peaks[0], _late_peak(profile, block, most)])
    found = _with_tree(found, profile, block, window, lazy)
    count = max(4, min(COUNTED_BLOCKS, COUNTED_STEPS // block)) if profile.declares else 2
    moves = Moves(profile, profile.sizes, [block] * min(full, count) + [rest], window, lazy)
    macs, (more, backward) = list[float](), large_macs(profile)
    immediate = profile.immediate_macs()
    checks = max(0.0, base[0] - base[1]) * more / max(backward, 1)
    for i, (moved, rows) in enumerate(zip(moves.macs, moves.rows, strict=True)):
        last = i == len(moves.macs) - 1
        macs.append(base[2 if last else min(i, 1)] + moved)
        macs[-1] += (rest if last else block) * (rows * immediate + more) + checks * (i == 0)
    size = sum(profile.sizes[name] for name in profile.frozen) * profile.itemsize
    held = [parts | {"gradient": parts["gradient"] + size * (parts["gradient"] > 0)} for parts in found.held]
    if not profile.declares:
        held[1:] = [parts | {"scratch": profile.kept_buffer(block)} for parts in held[1:]]
    return replace(found, macs=macs, held=held, peaks=[peak + size for peak in found.peaks])


def _lengths(profile: Profile, block: int, rest: int, most: int) -> list[int]:
    """The lengths of the blocks that are run in place of ``block``: itself; or two shorter ones, of a cell that routes
    one, by which every row and slice is touched."""
    if _affordable(profile, _few(profile, block) * block + rest, 0, most):
        return [block]
    longest = 4
    while 2 * longest < block and _affordable(profile, 8 * longest, 0, most):
        longest *= 2
    return [longest] if profile.declares else [longest // 2, longest]


def _without_moves(
    profile: Profile, block: int, rest: int, window: int | None, lazy: bool
) -> tuple[_Blocks, list[float]]:
    """Some blocks that are run, and what the first, a later and the last one takes without moving influences; without a
    window, those of any window stand for all."""
    few = _few(profile, block)
    count = min(few, max(2 if profile.frozen else 3, MOST_ROUTING_STEPS // block)) if profile.declares else few
    within = window or _spanned(profile, count * block + rest, block)
    run = _measured(profile, block, count, rest, within, lazy)
    known = [name for name in profile.sizes if name not in profile.frozen]
    moves = Moves(profile, known, [block] * count + [rest], within, lazy)
    first, *later, last = (total - moved for total, moved in zip(run.macs, moves.macs, strict=True))
    half = later[len(later) // 2 :]
    return run, [first, sum(half) / len(half), last]


def _longer(
    profile: Profile,
    block: int,
    rest: int,
    lengths: list[int],
    ends: list[int],
    runs: list[_Blocks],
    bases: list[list[float]],
) -> tuple[_Blocks, list[float]]:
    """Longer blocks than those run: of two lengths, the lines through them; of one, by which every row and slice is
    touched, in proportion."""
    run = runs[-1]
    if profile.declares:
        base = [total * block / lengths[0] for total in bases[0][:2]] + [bases[0][2] * rest / ends[0]]
        held = [parts | {"block": parts["block"] * block // lengths[0]} for parts in run.held]
        return replace(run, held=held), base
    (one, two), places = runs, [lengths, lengths, ends]
    base = [line((x[0], a), (x[1], b))(at) for x, a, b, at in zip(places, *bases, (block, block, rest), strict=True)]
    held = [lines((lengths[0], a), (lengths[1], b), block) for a, b in zip(one.held, two.held, strict=True)]
    peaks = [line((lengths[0], a), (lengths[1], b))(block) for a, b in zip(one.peaks, two.peaks, strict=True)]
    return replace(run, held=held, peaks=peaks), base


def _late_peak(profile: Profile, block: int, most: int) -> int:
    """Bytes at the peak of closing a block when all influences are there: of one that follows a few steps, or from two
    shorter ones."""
    before = max((-(-profile.slices[n] // profile.choice(0).active[n].shape[1]) for n in profile.sliced), default=1)
    before = min(before, 32)

    def peak(m: int) -> int:
        options = {"block": max(m, before), "window": 4}
        return profile.run(BlockRTRL, before + m, part=True, replay=True, sync_after=before, **options).peaks[-1]

    def fits(m: int) -> bool:
        many = 4 * most if not profile.declares else most // 4 if profile.frozen else most
        return _affordable(profile, m, 1, many, 4 * MOST_MACS)

    if fits(block):
        return peak(block)
    longest = 4
    while 2 * longest < block and fits(3 * longest):
        longest *= 2
    return line((longest // 2, peak(longest // 2)), (longest, peak(longest)))(block)


def _beyond(profile: Profile, steps: int, ran: int) -> tuple[int, int]:
    """Bytes of the influence that the steps run do not have, but the steps of the run do; and what is there besides
    while the largest of its parts is allocated."""
    missing = total = most = 0
    for name, size in profile.sizes.items():
        rows = measured = profile.batch_size
        if name in profile.sliced:
            size //= profile.slices[name]
            every, measured = rows * profile.slices[name], len(touched(profile, name, ran))
            rows = len(touched(profile, name, steps)) if steps <= profile.given else every
        missing += size * max(0, rows - measured * (name not in profile.frozen))
        total += size * rows
        most = max(most, total + size * rows)
    scale = profile.state_size * profile.itemsize
    return missing * scale, (most - total) * scale * bool(profile.frozen)
