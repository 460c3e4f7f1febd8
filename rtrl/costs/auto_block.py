"""``BlockRTRL(block="auto")``: how many steps a block should have."""

import warnings
from dataclasses import replace

from torch import Tensor, nn

from rtrl.cells.protocol import first_state
from rtrl.costs import block_macs, block_peak
from rtrl.costs.block_bytes import Touched, held
from rtrl.costs.block_rtrl import block_rtrl
from rtrl.costs.profile import Profile, profile
from rtrl.errors import ConfigError, PerformanceWarning, RTRLError

ROOM_BYTES = 2**28
"""Closing a block may take as much memory as is held anyway, or this much, whichever is more."""

ENOUGH = 1.5
"""A block is long enough when a step costs no more than so many times what the longest block makes of it."""


def choose_block(cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> int:
    """How many steps a block of ``rtrl.BlockRTRL`` should have: about H.

    The larger a block, the fewer multiply-adds a step: the influence moves once a block, at ``H²·P``, and ``H·P`` a
    step is born. From about H steps on that saves no more than half, while the memory that closing a block needs goes
    on growing. So of the powers of two up to 2·H, and H, the smallest is taken that costs at most ``ENOUGH`` times what
    the largest does, by ``rtrl.plan``'s count; or H, where the cell declares a sparsity or does not say how wide its x
    is. It is halved until closing it takes no more memory than is held between steps, or than ``ROOM_BYTES``.

    Args:
        cell: as for ``rtrl.BlockRTRL``. batch_size: B. state: the first state; ``cell.init_state`` by default.

    Returns:
        A number of steps that depends on the cell's kind and sizes alone, not on its values or the device.

    Raises:
        ConfigError: there is no first state, or no trainable parameter.

    Cost: one sample run for a few steps; nothing of the cell is changed.

    >>> import torch, rtrl
    >>> choose_block(rtrl.cells.from_torch(torch.nn.GRUCell(16, 64)), batch_size=4)
    64
    """
    parameters = [p for p in cell.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the cell has no parameter that requires a gradient")
    if state is None:
        state = first_state(cell, 1)
    full = state[0].numel()
    found = _profiled(cell, state)
    if found is None or found.declares:
        rows = sum(p.shape[0] if p.ndim > 1 else 0 for p in parameters)
        numbers = sum(p.numel() for p in parameters)
        return _within(full, batch_size, state.element_size(), full * numbers, full * (2 * full + rows))
    sizes = [1]
    while sizes[-1] < full:
        sizes.append(2 * sizes[-1])
    sizes = sorted({*sizes, full, 2 * full})
    steps = 64 * sizes[-1]  # long enough for the checks of the first block to weigh nothing
    macs = {m: block_rtrl(found, steps, m, window=1).macs for m in sizes}
    block = min(m for m in sizes if macs[m] <= ENOUGH * macs[sizes[-1]])
    extent, touched = block_macs.dense(found), Touched.of(found, steps)
    while block > 1:
        room = max(batch_size * sum(held(found, touched, steps, block, window=1).values()), ROOM_BYTES)
        if (
            batch_size * max(block_peak.closing(found, touched, block, extent, (0, 0), closed=block, kept_bytes=0))
            <= room
        ):
            break
        block //= 2
    return block


def _profiled(cell: nn.Module, state: Tensor) -> Profile | None:
    """One sample's profile; None for a cell that does not say what it takes, or that cannot be run. The device does not
    count, so that a learner saved on one can be loaded on another."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerformanceWarning)
            return replace(profile(cell, None, 1, state=state[:1]), device="cpu")
    except RTRLError:
        return None


def _within(block: int, batch_size: int, itemsize: int, influence: int, closing: int) -> int:
    """Halve a block until its closing, so many numbers a step and sample, has room beside the influence."""
    room = max(batch_size * influence * itemsize, ROOM_BYTES)
    while block > 1 and batch_size * block * closing * itemsize > room:
        block //= 2
    return block
