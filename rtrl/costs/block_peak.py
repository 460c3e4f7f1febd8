"""Bytes that closing a block of ``rtrl.BlockRTRL`` needs on top of what is held: phase by phase, the largest counts.

In the words of ``rtrl.costs.block_macs``, in numbers, for m steps:

    linearising    its graph and its results, measured on the cell; pieces of a long block one after another
    sweep          results + m·B·(R + 1)·W, and the Jacobians written out for it (all m, several times, as a scan)
    influence      responses + m·B·(R + 1)·W + scratch memory of B·(R + 1) rows
    births         responses + m·B·(R + 1)·W + ``left`` of the largest linear map, and its product where it is turned
"""

from rtrl._engine import immediate
from rtrl._engine import reverse_sweep as sweeping
from rtrl._influence import store
from rtrl.costs import block_macs
from rtrl.costs.block_bytes import Touched, influence_of, kept_for_sweeps, reach
from rtrl.costs.block_macs import Extent, birth_rows
from rtrl.costs.linear import Use
from rtrl.costs.profile import Profile


def closing(
    profile: Profile, touched: Touched, steps: int, extent: Extent, moved: tuple[int, int], closed: int, kept_bytes: int
) -> tuple[int, int]:
    """Bytes at the height of closing a block: before the influence of what became active in it is laid out, and after.

    Args:
        steps: m. moved: bytes that leading sleeping slices to the present takes, before and after. closed: the steps
            closed before. kept_bytes: held for sweeps already.
    """
    item, size = profile.itemsize, profile.batch_size
    rows, writes = extent.rows * profile.width + 1, extent.writes * profile.width
    linear = profile.linear
    span = min(steps, block_macs.span(profile, extent, steps))
    kept, pieces = linear.kept(steps), -(-steps // span)
    linearising = linear.kept(max(steps - span, 1)) * (pieces > 1) + linear.peak(span)
    if pieces > 1:
        linearising = max(linearising, 2 * kept)
    swept = reach(profile, steps, rows, writes)
    if kept_for_sweeps(profile, steps):  # it lies there, or in the place of a smaller one
        swept = max(swept - kept_bytes, 0)
    sweep = kept + swept + _sweeping(profile, steps, extent)
    written = 0 if linear.parts is not None else steps * size * writes * extent.reach * profile.width * item
    both = size * rows * extent.cols * profile.width * item
    earned = profile.parameter_bytes
    left_over = max(kept - written, 0) + swept + both + earned
    widest = max((shape.numel() for name, shape in profile.shapes.items() if name not in extent.sliced), default=0)
    scratch = min(max(1, store.BUFFER_NUMBERS // (size * rows)), widest) * size * rows * item
    advance = both + scratch + widest * item if closed else 0
    growing = _growing(profile, touched, closed, steps)
    uses = [use for use in linear.uses if use.response is not None]
    births = max((_birth(profile, steps, extent, use) for use in uses), default=0)
    general = 0
    if any(linear.general):
        names = {use.name for use in uses}
        loose = sum(shape.numel() for name, shape in profile.shapes.items() if name not in names)
        general = 2 * size * rows * loose * item
    before = max(linearising, sweep + earned + general, left_over + general + moved[0])
    return before, left_over + general + max(advance, births, growing, moved[1])


def _growing(profile: Profile, touched: Touched, closed: int, steps: int) -> int:
    """Bytes of an influence that is laid out anew because slices became active, the old one and its zeros beside it."""
    before = {name: influence_of(profile, touched, name, closed) for name in profile.shapes}
    after = {name: influence_of(profile, touched, name, closed + steps) for name in profile.shapes}
    there, most, total = sum(before.values()), 0, sum(after.values())
    for name in profile.shapes:
        if after[name] > before[name]:
            there += after[name] - before[name]
            most = max(most, there + after[name] - total)
    return most


def _sweeping(profile: Profile, steps: int, extent: Extent) -> int:
    size, full, item = profile.batch_size, profile.state_size, profile.itemsize
    row, closed = full + 1, profile.linear.parts is not None
    if not extent.all_rows:
        rows, cols = extent.rows * profile.width + 1, extent.cols * profile.width
        step = size * rows * extent.reach * profile.width
        return (size * rows * cols * 2 + 3 * step) * item
    if not block_macs.scans(profile, steps):
        at_once = max(1, sweeping._CHUNK // (size * full * full))
        jacobians = (
            min(steps, 2 * at_once) * size * full * full if closed else 0
        )  # the old ones go when the new are there
        return (2 * size * row * full + jacobians) * item
    length, pieces = block_macs.scan_pieces(steps)
    padded = length * pieces
    jacobians = padded if closed or padded > steps else 0  # put together anew where identities stand in front
    inside, behind, product = pieces * (length + 1) * row, (pieces + 1) * row, pieces * row
    after = 2 * padded * row + padded * full  # what is behind each step, what that makes, and the factors side by side
    return size * full * (jacobians * full + inside + behind + product + after) * item


def _birth(profile: Profile, steps: int, extent: Extent, use: Use) -> int:
    """Bytes of ``left`` and, where it does not go straight into the store, of what is born."""
    size, rows, writes = profile.batch_size, extent.rows * profile.width, extent.writes * profile.width
    shape, mine = profile.shapes[use.name], extent.sliced.get(use.name)
    every = extent.rows == profile.rows
    if mine is not None:
        outputs = use.outputs if use.indexed or use.transposed else 1
        entry, slice_size = use.length * rows * outputs, shape.numel() // max(mine.count, 1)
        factors = writes * (rows + use.length * outputs)
        most = 0
        for keys, _, longest in immediate._batches(mine.uses, max(1, immediate._CHUNK // max(1, entry))):
            count = keys.stop - keys.start
            born = count * rows * slice_size * (0 if every and not use.transposed else 2 if every else 3)
            most = max(most, count * longest * entry + max(count * longest * factors, born))
        return most * profile.itemsize
    if every and not use.indexed:  # some rows at a time; the old ones go when the new are there
        entry = size * steps * use.length * use.outputs
        span = birth_rows(profile, steps, use, rows)
        born = 2 * size * span * shape.numel() if use.transposed else 0
        return (entry * min(2 * span, rows) + born) * profile.itemsize
    step = size * use.k * use.length * rows * use.outputs
    at_once = min(steps, max(1, immediate._CHUNK // max(1, step)))
    left = at_once * step
    if (
        at_once < steps
    ):  # a piece at a time, with a copy of its suffix products; the old piece goes when the new is there
        copied = step + (size * rows * writes if size > 1 else 0)
        left += max(at_once * (copied - step), min(steps - at_once, at_once) * copied)
    born = size * rows * shape.numel() * (2 if every else 3)
    return (left + born) * profile.itemsize
