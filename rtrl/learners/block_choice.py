"""How ``BlockRTRL(block="auto")`` finds its number of steps: ``rtrl.costs``, built on learners, registers itself."""

from collections.abc import Callable

from torch import Tensor, nn

from rtrl.errors import ConfigError

Chooser = Callable[[nn.Module, int, Tensor | None], int]
"""``choose(cell, batch_size, state)`` → the number of steps of a block; ``state`` is the learner's argument."""

_registered: list[Chooser] = []


def register_block_chooser(choose: Chooser) -> None:
    """Let ``choose`` answer from now on. ``import rtrl`` registers ``rtrl.costs.choose_block``."""
    _registered[:] = [choose]


def chosen_block(cell: nn.Module, batch_size: int, state: Tensor | None) -> int:
    """Return the number of steps that ``block="auto"`` stands for.

    Raises:
        ConfigError: nothing is registered.
    """
    if not _registered:
        raise ConfigError('block="auto" needs rtrl.costs; import rtrl.costs first, or pass a number')
    return _registered[0](cell, batch_size, state)
