"""``BlockRTRL(block="auto")``: how many steps a block should have."""

import copy
import warnings

from torch import Tensor, nn

from rtrl.cells.protocol import first_state
from rtrl.costs.block_rtrl import block_rtrl
from rtrl.costs.profile import Profile
from rtrl.errors import ConfigError, PerformanceWarning, RTRLError

ROOM_BYTES = 2**28
"""Closing a block may take as much memory as is held anyway, or this much, whichever is more."""

ENOUGH = 1.5
"""A block is long enough when a step costs at most this many times what a step of the longest block costs."""

SHORT = 24
"""How many steps are run for each length of a block; longer ones are extrapolated."""


def choose_block(cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> int:
    """Choose how many steps a block of ``rtrl.BlockRTRL`` has: about H.

    The longer a block, the fewer multiply-adds per step: the influence moves once per block, at ``H²·P``. From about H
    steps on that saves no more than half, while the memory that closing a block needs goes on growing. So of the powers
    of two up to 2·H, and H, the smallest is chosen that costs at most one and a half times what the largest does, as
    measured on short blocks of one sample; or H, where the cell declares a sparsity or does not say how wide its x is.
    It is halved until closing it takes no more memory than is held between steps, or than 256 MiB.

    Args:
        cell: as for ``rtrl.BlockRTRL``.
        batch_size: B.
        state: the first state; ``cell.init_state`` by default.

    Returns:
        A number of steps that depends on the kind and the sizes of the cell alone, not on its values or its device.

    Raises:
        ConfigError: there is no first state, or no trainable parameter.

    Cost:
        Some blocks of at most 8 steps of one sample, without numbers; nothing of the cell is changed.

    Example:
        >>> import torch, rtrl
        >>> choose_block(rtrl.cells.from_torch(torch.nn.GRUCell(16, 64)), batch_size=4)
        64
    """
    parameters = [p for p in cell.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the cell has no parameter that requires a gradient")
    if state is None:
        state = first_state(cell, 1)
    full = int(state[0].numel())
    profile = _profiled(cell, state)
    if profile is None or profile.declares:
        rows = sum(p.shape[0] if p.ndim > 1 else 0 for p in parameters)
        influence = full * sum(p.numel() for p in parameters)
        return _within(full, batch_size, state.element_size(), influence, full * (2 * full + rows))
    sizes = sorted({*(2**i for i in range((2 * full).bit_length())), full, 2 * full})
    steps = 64 * sizes[-1]  # long enough for the checks of the first block to weigh nothing
    choices = {m: block_rtrl(profile, steps, m, window=1, most=SHORT) for m in sizes}
    block = min(m for m in sizes if choices[m].macs <= ENOUGH * choices[sizes[-1]].macs)
    while block > 1:
        choice = block_rtrl(profile, steps, block, window=1, most=SHORT)
        if batch_size * (choice.peak_bytes - choice.held_bytes) <= max(batch_size * choice.held_bytes, ROOM_BYTES):
            break
        block //= 2
    return int(block)


def _profiled(cell: nn.Module, state: Tensor) -> Profile | None:
    """One sample's profile on the CPU; None for a cell that does not say what it takes, or that cannot be run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerformanceWarning)
            return Profile(copy.deepcopy(cell).cpu(), None, 1, state=state[:1].cpu())
    except (RTRLError, RuntimeError):
        return None


def _within(block: int, batch_size: int, itemsize: int, influence: int, closing: int) -> int:
    """Halve a block until what closing it takes, numbers for a step and sample, has room beside the influence."""
    room = max(batch_size * influence * itemsize, ROOM_BYTES)
    while block > 1 and batch_size * block * closing * itemsize > room:
        block //= 2
    return block
