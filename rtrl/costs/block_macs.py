"""Multiply-adds of closing one block of ``rtrl.BlockRTRL``, but for what its sleeping slices cost.

Of a block of m steps of one kind, B samples, with u rows of the state written in it (width entries each), c rows
touched, w rows written and e touched by one step, ``R = u·width``, ``W = w·width``, ``E = e·width``, ``C = c·width``,
everything beside the forward passes:

    linearising    m·L                                       measured, see ``rtrl.costs.linear``
    sweep          m·B·(R + 1)·W·E                           products of Jacobians, the adjoint as one more row
    gradient       m·B·W·K·L·O a linear map,  m·B·L·O·I a weight
    births         m·B·R·W·K·L·O a linear map,  m·B·R·L·O·I a weight (I = 1 for a bias); of slices, N·R·W·L·O and
                   N·R·L·O·I, N the slices used by a sample at a step, padded to equally many a slice
    influence      B·(R + 1)·C·p a parameter of p entries    from the second block on: ``Φ S``, and ``v S`` earned

Where a cell knows its derivatives unit by unit, the first W·K·L·O are G·U, those of the gradient nothing, and writing
the Jacobians out costs ``m·B·S·U²`` for each part of the state that meets a linear map. Small dense states take the
sweep as a scan, in about twice as many multiply-adds and fewer launches.

This module follows ``linearizer``, ``sweep``, ``block`` and ``birth`` line by line; the tests hold it against what
``rtrl.profiling.macs.MacCounter`` counts there. Exact for blocks of one kind of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rtrl._engine import immediate
from rtrl._engine import reverse_sweep as sweeping
from rtrl.costs.linear import Use
from rtrl.costs.profile import Profile


@dataclass(frozen=True)
class Slices:
    """How often the slices of a parameter are used in a block.

    Attributes:
        group: which parameters are used alike. width: how many of them a sample uses at a step.
        uses: of each (sample, slice) that is active, in order of its key; most: of a slice by all samples together.
        count: how many slices the parameter has.
    """

    group: int
    width: int
    uses: list[int]
    most: int
    count: int


@dataclass(frozen=True)
class Extent:
    """What a block and each of its steps touch, as numbers of rows of the state.

    Attributes:
        rows, cols: u and c, of the block. writes, reach: w and e, of a step. all_rows: whether nothing is declared.
        sliced: parameters kept slice by slice, and how they are used.
    """

    rows: int
    cols: int
    writes: int
    reach: int
    all_rows: bool
    sliced: Mapping[str, Slices]


def dense(profile: Profile) -> Extent:
    """Of a cell that declares nothing."""
    return Extent(profile.rows, profile.rows, profile.rows, profile.rows, True, {})


def closing(profile: Profile, steps: int, extent: Extent, first: bool) -> int:
    """Multiply-adds of closing a block, but for its forward passes and for what slices cost that slept.

    Args:
        steps: m. first: no block has closed before.
    """
    macs = steps * profile.linear.macs + sweep(profile, steps, extent)
    macs += gradient(profile, steps, extent) + births(profile, steps, extent) + general(profile, steps, extent)
    if not first:
        both = (extent.rows * profile.width + 1) * extent.cols * profile.width
        whole = sum(shape.numel() for name, shape in profile.shapes.items() if name not in extent.sliced)
        macs += profile.batch_size * both * whole
    return macs


def span(profile: Profile, extent: Extent, steps: int) -> int:
    """How many of m steps are linearised at a time: all of them."""
    return steps


def checks(profile: Profile, steps: int, extent: Extent) -> dict[int, int]:
    """Multiply-adds of the checks before a block is closed, by the number of steps of each piece it is linearised in:
    each number is checked once a learner."""
    most = span(profile, extent, steps)
    whole, rest = divmod(steps, most)
    pieces = ([most] if whole else []) + ([rest] if rest else [])
    return {piece: profile.linear.first(profile.batch_size, piece) for piece in pieces}


def sweep(profile: Profile, steps: int, extent: Extent) -> int:
    """Suffix products and adjoints."""
    size, full = profile.batch_size, profile.state_size
    rows = extent.rows * profile.width + 1
    if not extent.all_rows:
        return steps * size * rows * extent.writes * extent.reach * profile.width**2
    if not scans(profile, steps):
        at_once = max(1, sweeping._CHUNK // (size * full * full))
        chunks = [at_once] * (steps // at_once) + ([steps % at_once] if steps % at_once else [])
        return steps * size * rows * full * full + sum(_written(profile, chunk) for chunk in chunks)
    length, pieces = scan_pieces(steps)
    products = length * size * pieces + pieces * size + size * pieces * length
    early = steps * size * full * full if profile.linear.after else 0
    return products * rows * full * full + early + _written(profile, steps)


def scans(profile: Profile, steps: int) -> bool:
    """Whether a dense sweep is taken as a scan."""
    limit = sweeping._LAUNCH_MACS.get(profile.device, sweeping._LAUNCH_MACS_ELSEWHERE)
    return steps > 3 and profile.batch_size * profile.state_size**3 <= limit


def scan_pieces(steps: int) -> tuple[int, int]:
    """The length of the pieces of a scan, and their number."""
    length = max(2, int(steps**0.5))
    return length, -(-steps // length)


def _written(profile: Profile, steps: int) -> int:
    """Writing out Jacobians that are known analytically: an outer product for the first gate of each part."""
    parts, samples = profile.linear.parts, profile.batch_size * steps
    if parts is None or samples * parts == 1:  # a product of equal sizes is none
        return 0
    units = profile.state_size // parts
    return profile.linear.own * samples * parts * units * units if units > 1 else 0


def _left(profile: Profile, use: Use, samples: int, rows: int, extent: Extent) -> int:
    """``rows`` rows of weights on the next state, pulled back to the output of a linear map."""
    if use.gates is None:
        return samples * rows * extent.writes * profile.width * use.k * use.length * use.outputs
    # an outer product where both factors are smaller: rows by units, and gates by units
    return samples * rows * use.outputs if use.gates > 1 and rows > 1 else 0


def gradient(profile: Profile, steps: int, extent: Extent) -> int:
    """What the losses earn inside the block, in parameters that are met in linear maps."""
    samples, macs = steps * profile.batch_size, 0
    done: set[tuple[int | None, int | None]] = set()
    for use in profile.linear.uses:
        key = (use.response, use.earned)
        if use.response is not None and key not in done:
            macs += _left(profile, use, samples, 1, extent)
        done.add(key)
        if use.response is None and use.earned is None:
            continue
        entries = samples * use.k if use.indexed else samples
        mine = extent.sliced.get(use.name)
        if use.indexed and mine is not None:
            entries = mine.count * mine.most  # a product a slice, padded to the most used one
        macs += entries * use.length * use.outputs * use.inputs
    return macs


def births(profile: Profile, steps: int, extent: Extent) -> int:
    """What is born."""
    samples, rows, macs = steps * profile.batch_size, extent.rows * profile.width, 0
    done: set[tuple[int, int | None]] = set()
    for use in profile.linear.uses:
        if use.response is None or not rows * use.length:
            continue
        mine = extent.sliced.get(use.name)
        if mine is not None:
            outputs = use.outputs if use.indexed or use.transposed else 1
            entries = padded(mine, use.length * rows * outputs)
            if (use.response, mine.group) not in done:
                macs += entries * rows * extent.writes * profile.width * use.length * outputs
            done.add((use.response, mine.group))
            inputs = 1 if use.transposed and not use.indexed else max(use.inputs, 1)
            macs += entries * use.length * rows * outputs * inputs
            continue
        if (use.response, None) not in done:
            span = birth_rows(profile, steps, use, rows) if extent.rows == profile.rows and not use.indexed else rows
            macs += rows // span * _left(profile, use, samples, span, extent)
            macs += _left(profile, use, samples, rows % span, extent)
        done.add((use.response, None))
        entries, inputs = (samples * use.k, use.inputs) if use.indexed else (samples, max(use.inputs, 1))
        macs += entries * use.length * rows * use.outputs * inputs
    return macs


def birth_rows(profile: Profile, steps: int, use: Use, rows: int) -> int:
    """How many entries of the state are born into at a time, where all of them are and no slices are picked."""
    numbers = profile.batch_size * steps * use.length * use.outputs
    return min(rows, max(immediate._LEAST_ROWS, immediate._ROWS_CHUNK // max(1, numbers)))


def padded(slices: Slices, numbers: int) -> int:
    """Entries of the products that slices are born by, so many numbers of ``left`` each, padding included."""
    batches = immediate._batches(slices.uses, max(1, immediate._CHUNK // max(1, numbers)))
    return sum((keys.stop - keys.start) * longest for keys, _, longest in batches)


def general(profile: Profile, steps: int, extent: Extent) -> int:
    """Parameters that no tap covers: a forward pass, and a row of weights for each row of the state and the losses."""
    forward, row = profile.linear.general
    return steps * (forward + (extent.rows * profile.width + 1) * row)
