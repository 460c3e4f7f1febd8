"""The cell that a plan on the command line is for: one of a few usual kinds, or a user's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rtrl._utils import validation
from rtrl._utils.import_target import load
from rtrl.cells import RecurrentMoE, from_torch
from rtrl.errors import ConfigError

KINDS = ("rnn", "gru", "lstm", "moe")
_TORCH: dict[str, Callable[..., nn.Module]] = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def make(
    kind: str,
    hidden: int,
    inputs: int,
    outputs: int | None = None,
    *,
    slots: int = 8,
    experts: int = 16,
    topk: int = 2,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """One of PyTorch's cells with a linear readout, or a ``RecurrentMoE``.

    Args:
        kind: one of ``KINDS``. hidden: of the cell; of one slot of a mixture. inputs, outputs: of x and y; as many
            outputs as inputs by default. slots, experts, topk: of a mixture, which reads and writes two slots a step.

    Raises:
        ConfigError: there is no such kind, or a size is not positive.

    >>> make("gru", 16, 8).init_state(2).shape
    torch.Size([2, 16])
    """
    outputs = inputs if outputs is None else outputs
    for name, size in (("hidden", hidden), ("inputs", inputs), ("outputs", outputs)):
        validation.integer(name, size)
    with torch.random.fork_rng(devices=[]):  # the weights do not matter, and PyTorch's random numbers stay as they are
        if kind == "moe":
            few = min(2, slots)
            heads = 1 if hidden % 2 else 2
            return RecurrentMoE(inputs, outputs, hidden, slots, experts, topk, heads, few, few, dtype=dtype)
        validation.known("kind", kind, KINDS)
        return from_torch(_TORCH[kind](inputs, hidden, dtype=dtype), nn.Linear(hidden, outputs, dtype=dtype))


def from_target(target: str) -> tuple[nn.Module, list[Any] | None]:
    """The cell that ``package.module:name`` stands for, and the inputs of some steps if it gives any: a module, a
    function without arguments that gives one, or one that gives a pair (cell, inputs).

    Raises:
        ConfigError: it stands for none.
    """
    found = load(target)
    if callable(found) and not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(f"{target} raised {type(error).__name__}: {error}") from error
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module):
        return found[0], list(found[1])
    if not isinstance(found, nn.Module):
        raise ConfigError(f"{target} must give a cell, or a pair (cell, inputs), got {type(found).__name__}")
    return found, None
