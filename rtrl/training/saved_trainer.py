"""What is checked of a saved trainer before any of it is used, and its rows as a tensor."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rtrl.errors import ConfigError
from rtrl.training.curve import Row, Tally


def rows_to_plain(rows: Sequence[Row]) -> Tensor:
    """Return rows as numbers (n, 4), NaN for None."""
    numbers = [
        [row.step, *(math.nan if value is None else value for value in (row.loss, row.score)), row.bytes_held]
        for row in rows
    ]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(-1, 4)


def rows_from_plain(saved: Any, steps: int, log_every: int, most: int) -> list[Row]:
    """Return the rows that ``rows_to_plain`` was given.

    Args:
        saved: what it returned.
        steps: the number of steps of the run.
        log_every: the number of steps of a row.
        most: the largest number of rows.

    Raises:
        ConfigError: they are not the newest rows of such a run.
    """
    if not isinstance(saved, Tensor) or saved.dtype != torch.float64 or saved.ndim != 2 or saved.shape[1] != 4:
        raise ConfigError("the rows of the saved trainer are damaged: they must be numbers (n, 4)")
    complete = steps // log_every
    count = min(complete, most)
    expected = (torch.arange(count, dtype=torch.float64, device="cpu") + (complete - count + 1)) * log_every
    if len(saved) != count or not torch.equal(saved[:, 0], expected) or not bool(saved[:, [0, 3]].isfinite().all()):
        raise ConfigError(f"the rows of the saved trainer are not the newest of {steps} steps")
    rows = []
    for step, loss, score, held in saved.tolist():
        loss, score = (None if math.isnan(value) else value for value in (loss, score))
        rows.append(Row(int(step), loss, score, int(held)))
    return rows


def tally_from_plain(saved: Any) -> Tally:
    """Return the sums of a row that is not complete.

    Raises:
        ConfigError: they are not two finite numbers and a count.
    """
    if type(saved) is list and [type(value) for value in saved] == [float, float, int]:
        loss, score, n_targets = saved
        if math.isfinite(loss) and math.isfinite(score) and n_targets >= 0:
            return Tally(loss, score, n_targets)
    raise ConfigError(f"the sums of the saved trainer must be two finite numbers and a count, got {saved!r}")


def count_of(saved: Mapping[str, Any], name: str, most: int | None = None) -> int:
    """Return a count of a saved trainer.

    Raises:
        ConfigError: it is not a count, or is above ``most``.
    """
    value = saved[name]
    if type(value) is not int or value < 0 or (most is not None and value > most):
        raise ConfigError(f"{name!r} of the saved trainer must be a count, got {value!r}")
    return value


def check_cell_values(saved: Mapping[str, Any], cell: nn.Module) -> None:
    """Refuse values of a cell's parameters and buffers that differ in name, shape or dtype from those it has.

    Raises:
        ConfigError: they do.
    """
    present = cell.state_dict()
    if not isinstance(saved, Mapping) or saved.keys() != present.keys():
        raise ConfigError("the saved cell has other parameters or buffers than this one: it is damaged, or of another")
    for name, value in present.items():
        check_like(f"{name!r} of the saved cell", saved[name], value)


def check_like(what: str, value: Any, like: Any) -> None:
    """Refuse a saved value that is not of the kind of the present one.

    Raises:
        ConfigError: one is a tensor and the other is not, or they differ in shape or dtype.
    """
    if not isinstance(like, Tensor):
        if type(value) is not type(like):
            raise ConfigError(f"{what} must be of type {type(like).__name__}, got {type(value).__name__}")
    elif not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{what} must be {tuple(like.shape)} {like.dtype}, got {found}")


def check_optimizer(saved: Any, optimizer: Optimizer) -> None:
    """Refuse the saved state of an optimizer with other groups, or with numbers that do not fit the parameters.

    Raises:
        ConfigError: it has these.
    """
    present = optimizer.state_dict()
    if not isinstance(saved, Mapping) or saved.keys() != present.keys():
        raise ConfigError("the saved optimizer is damaged")
    groups, own = saved["param_groups"], present["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise ConfigError("the saved optimizer has other groups of parameters")
    for found, expected in zip(groups, own, strict=True):
        if found.keys() != expected.keys() or found["params"] != expected["params"]:
            raise ConfigError("the saved optimizer has other groups of parameters, or is of another version of PyTorch")
        for name, value in found.items():
            if not _is_setting(value, expected[name]):
                raise ConfigError(f"{name!r} of the saved optimizer cannot be {value!r}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not saved["state"].keys() <= set(range(len(parameters))):
        raise ConfigError("the saved optimizer has numbers of parameters that there are not")
    for index, numbers in saved["state"].items():
        for name, value in numbers.items():
            _check_number(name, value, parameters[index])


def _is_setting(value: Any, like: Any) -> bool:
    """Whether a value may stand for another as a setting of a group: a finite number for a number, else one type."""
    if isinstance(like, bool) or not isinstance(like, int | float):
        if isinstance(like, tuple):
            return isinstance(value, tuple | list) and len(value) == len(like) and all(map(_is_setting, value, like))
        return type(value) is type(like)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(name: str, value: Any, parameter: Tensor) -> None:
    if value is None and name == "momentum_buffer":  # of SGD without momentum
        return
    if isinstance(value, Tensor):
        fits = value.ndim == 0 or value.shape == parameter.shape
        kind = value.is_floating_point() and value >= 0 if value.ndim == 0 else value.dtype == parameter.dtype
        if fits and kind and bool(value.isfinite().all()):
            return
    raise ConfigError(f"{name!r} of the saved optimizer does not fit a parameter of shape {tuple(parameter.shape)}")
