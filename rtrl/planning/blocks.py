"""What ``rtrl.BlockRTRL`` costs over a run."""

from rtrl.planning import block_macs
from rtrl.planning.block_bytes import Touched, held
from rtrl.planning.block_macs import Extent
from rtrl.planning.choice import Choice
from rtrl.planning.profile import Profile


def block_rtrl(profile: Profile, steps: int, block: int, window: int, lazy: bool = True) -> Choice:
    """``BlockRTRL(block=..., window=...)``."""
    touched = Touched.of(profile, steps)
    extent = Extent(profile.rows, profile.rows, profile.rows, profile.rows, True)
    macs = profile.forward(1) + profile.forward(steps)
    whole, rest = divmod(steps, block)
    checked = {}
    for i, m in enumerate([*[block] * whole, *([rest] if rest else [])]):
        macs += block_macs.closing(profile, m, extent, list(touched.awake), i == 0)
        checked.update(block_macs.checks(profile, m, extent))
    macs += sum(checked.values())
    parts = held(profile, touched, steps, block, window, lazy)
    return Choice("BlockRTRL", True, macs, steps, parts, 0, block=block, window=window)
