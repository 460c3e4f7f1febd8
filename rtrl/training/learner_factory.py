"""Learners by name, for the command line and for loops over learners."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rtrl._utils import named_factories
from rtrl.learners import BPTT, RFLO, TBPTT, UORO, DenseRTRL, DiagonalRTRL, LayerLocal, SnAp
from rtrl.learners.block_rtrl import BlockRTRL

MakeLearner = Callable[[nn.Module, int], Any]


def _block(*, block: int = 16, window: int = 64, lazy: bool = True) -> MakeLearner:
    return lambda cell, batch_size: BlockRTRL(cell, batch_size, block=block, window=window, lazy=lazy)


def _bptt() -> MakeLearner:
    return BPTT


def _tbptt(*, k: int = 16, sliding: bool = False) -> MakeLearner:
    return lambda cell, batch_size: TBPTT(cell, batch_size, k, sliding=sliding)


def _rtrl() -> MakeLearner:
    return DenseRTRL


def _snap(*, order: int = 1) -> MakeLearner:
    return lambda cell, batch_size: SnAp(cell, batch_size, order)


def _uoro(*, seed: int = 0) -> MakeLearner:
    return lambda cell, batch_size: UORO(cell, batch_size, generator=torch.Generator().manual_seed(seed))


def _rflo(*, leak: float = 0.1) -> MakeLearner:
    return lambda cell, batch_size: RFLO(cell, batch_size, leak)


def _diagonal() -> MakeLearner:
    return DiagonalRTRL


def _layer_local() -> MakeLearner:
    return LayerLocal


LEARNERS: Mapping[str, Callable[..., MakeLearner]] = {
    "block": _block,
    "bptt": _bptt,
    "tbptt": _tbptt,
    "rtrl": _rtrl,
    "snap": _snap,
    "uoro": _uoro,
    "rflo": _rflo,
    "diagonal": _diagonal,
    "layer-local": _layer_local,
}
"""A function of the options of each learner, by name, which returns ``make(cell, batch_size)``."""


def make_learner(name: str, **options: Any) -> MakeLearner:
    """Return a function ``make(cell, batch_size)`` for the learner of this name.

    ``block`` (block=16, window=64, lazy=True) is ``rtrl.BlockRTRL``; ``bptt``, ``tbptt`` (k=16, sliding=False),
    ``rtrl`` (textbook), ``snap`` (order=1), ``uoro`` (seed=0), ``rflo`` (leak=0.1), ``diagonal`` and
    ``layer-local`` are those of ``rtrl.learners``.

    Args:
        name: of the learner.
        options: of the learner.

    Raises:
        ConfigError: the learner or the option does not exist; the message lists the names. A value out of range is
            refused when the learner is made.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4))
        >>> make_learner("tbptt", k=5)(cell, 2).horizon
        5
    """
    make: MakeLearner = named_factories.make_named("learner", name, LEARNERS, options)
    return make
