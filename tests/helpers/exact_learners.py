"""Learners whose gradients are exact on short streams, by name: ``make(cell, batch_size)``."""

import functools
from collections.abc import Callable
from typing import Any

import rtrl
from rtrl.learners import BPTT, TBPTT, DenseRTRL, SnAp

Make = Callable[..., Any]
EXACT: dict[str, Make] = {
    "block-1": functools.partial(rtrl.BlockRTRL, block=1, window=3),
    "block-3": functools.partial(rtrl.BlockRTRL, block=3, window=2),
    "eager": functools.partial(rtrl.BlockRTRL, block=2, lazy=False),
    "bptt": BPTT,
    "dense": DenseRTRL,
    "tbptt": functools.partial(TBPTT, horizon=99),
    "snap": functools.partial(SnAp, order=99),
}
