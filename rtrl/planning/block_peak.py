"""Bytes that closing a block of ``rtrl.BlockRTRL`` needs on top of what is held: phase by phase, the largest counts.

In the words of ``rtrl.planning.block_macs``, in numbers, for m steps:

    linearising    its graph and its results, measured on the cell; pieces of a long block one after another
    sweep          results + m·B·(R + 1)·W, and the Jacobians that are written out for it (all m, several times, as a scan)
    influence      responses + m·B·(R + 1)·W + scratch memory of B·(R + 1) rows
    births         responses + m·B·(R + 1)·W + ``left`` of the largest linear map, and the product where it has to be turned
"""

from rtrl import birth, influence
from rtrl import sweep as sweeping
from rtrl.planning import block_macs
from rtrl.planning.block_macs import Extent
from rtrl.planning.linear import Use
from rtrl.planning.profile import Profile


def closing(profile: Profile, steps: int, extent: Extent, sliced: dict[str, int], first: bool) -> int:
    """Bytes at the height of closing a block.

    Args:
        steps: m. sliced: parameters kept slice by slice, and the rows of them active in the block. first: no block has
            closed before.
    """
    item, size = profile.itemsize, profile.batch_size
    rows, writes = extent.rows * profile.width + 1, extent.writes * profile.width
    linear = profile.linear
    span = min(steps, block_macs.span(profile, extent))
    kept, pieces = linear.kept(steps), -(-steps // span)
    linearising = linear.kept(max(steps - span, 1)) * (pieces > 1) + linear.peak(span)
    if pieces > 1:
        linearising = max(linearising, 2 * kept)
    reach = steps * size * rows * writes * item
    sweep = kept + reach + _sweeping(profile, steps, extent)
    written = 0 if linear.parts is not None else steps * size * writes * extent.reach * profile.width * item
    both = size * rows * extent.cols * profile.width * item
    earned = profile.parameter_bytes
    left_over = max(kept - written, 0) + reach + both + earned
    widest = max((shape.numel() for name, shape in profile.shapes.items() if name not in sliced), default=0)
    scratch = min(max(1, influence._SCRATCH // (size * rows)), widest) * size * rows * item
    advance = 0 if first else both + scratch + widest * item
    uses = [use for use in linear.uses if use.response is not None]
    births = max((_birth(profile, steps, extent, use, sliced) for use in uses), default=0)
    general = 0
    if any(linear.general):
        names = {use.name for use in uses}
        loose = sum(shape.numel() for name, shape in profile.shapes.items() if name not in names)
        general = 2 * size * rows * loose * item
    return max(linearising, sweep + earned + general, left_over + general + max(advance, births))


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


def _birth(profile: Profile, steps: int, extent: Extent, use: Use, sliced: dict[str, int]) -> int:
    """Bytes of ``left`` and, where it does not go straight into the store, of what is born."""
    size, item, rows = profile.batch_size, profile.itemsize, extent.rows * profile.width
    step = size * use.k * use.length * rows * use.outputs
    at_once = min(steps, max(1, birth._CHUNK // max(1, step)))
    left = at_once * step
    if (
        at_once < steps
    ):  # a piece at a time, with a copy of its suffix products; the old piece goes when the new is there
        copied = step + (size * rows * extent.writes * profile.width if size > 1 else 0)
        left += max(at_once * (copied - step), min(steps - at_once, at_once) * copied)
    shape = profile.shapes[use.name]
    count = sliced.get(use.name, size)
    born = count * rows * (shape.numel() // (shape[0] if use.name in sliced else 1))
    straight = extent.all_rows and not use.transposed and (use.name in sliced or not use.indexed)
    turned = 0 if straight else 2 * born if extent.all_rows else 3 * born
    return (left + turned) * item
