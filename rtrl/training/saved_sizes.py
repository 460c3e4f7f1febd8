"""The sizes that a saved run asks for, held against the numbers that its file has, before memory is taken for them."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rtrl._utils.real_pairs import real_numbers
from rtrl.errors import ConfigError

LARGEST_OPTION = 10**7
_FREE = ("seed",)  # options that are no sizes
_INFLUENCE = ("rtrl", "snap", "rflo", "diagonal", "layer-local")  # learners that hold all of it from the first step on


def check_options(what: str, options: Any, largest: int) -> None:
    """Refuse options that are not plain values, or integers above ``largest``.

    Args:
        what: whose options they are, in a word.
        options: by name.
        largest: the largest integer.

    Raises:
        ConfigError: they are such.
    """
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ConfigError(f"the options of the saved {what} are not values by name")
    waiting = [(name, value) for name, value in options.items() if name not in _FREE]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, list | tuple):
            waiting += [(name, each) for each in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value) or abs(value) > largest:
                raise ConfigError(f"{name}={value!r} of the saved {what} is larger than the file has numbers for")
        elif value is not None and not isinstance(value, bool | str):
            raise ConfigError(f"{name} of the saved {what} cannot be a {type(value).__name__}")


def check_state(saved: Mapping[str, Any], batch_size: int) -> None:
    """Refuse a saved trainer whose state is not that of a batch of this size.

    Raises:
        ConfigError: it is not.
    """
    state = saved["learner"]["state"]
    if not isinstance(state, Tensor) or state.ndim < 2 or len(state) != batch_size:
        raise ConfigError(f"the saved state is not that of {batch_size} samples")


def check_built(cell: nn.Module, saved: Mapping[str, Any], learner: str) -> None:
    """Refuse a saved trainer that does not have the numbers of a cell, which was made without memory.

    Args:
        cell: as the settings give it.
        saved: the trainer.
        learner: the name of its learner.

    Raises:
        ConfigError: parameters, buffers or the influence have other sizes.
    """
    shapes = {name: tuple(value.shape) for name, value in cell.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in saved["cell"].items() if isinstance(value, Tensor)}
    if shapes != found:
        raise ConfigError("the saved cell has other parameters than its settings give; it is damaged")
    if learner in _INFLUENCE:
        numbers = sum(real_numbers(p) for p in cell.parameters() if p.requires_grad)
        (carried,) = saved["learner"]["buffers"]["carried"]
        if carried.numel() != saved["learner"]["state"].numel() * numbers:
            raise ConfigError("the saved influence does not fit the saved state and parameters; it is damaged")
