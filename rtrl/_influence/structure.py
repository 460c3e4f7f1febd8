"""Which entries of the state depend on which, and which of them each parameter reaches.

The entries of the state are divided into *groups* of rows. The rows of a group are independent: each depends on its own
entries, and on the groups before that feed it. The influence of a parameter is kept on the rows that it reaches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from rtrl.errors import ConfigError


class Everywhere(Enum):
    """The type of ``ALL``."""

    ALL = "all"


ALL = Everywhere.ALL
"""An element of the parameter reaches several rows of the group."""

Orientation = Literal["first", "last", "element"]
"""What makes the channels of a parameter: its first dimension, its last one, or every element by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """The one row of a group that each channel of a parameter reaches.

    Attributes:
        rows: LongTensor (C,), −1 for a channel that reaches none.
        index: the same with 0 for −1.
        present: Boolean (C,), whether a channel reaches a row.
        complete: whether all of them do.
        repeats: (k, each), if the channels are all rows in order, each of them ``each`` times, k times over; else None.
    """

    rows: Tensor
    index: Tensor
    present: Tensor
    complete: bool
    repeats: tuple[int, int] | None

    @classmethod
    def of(cls, rows: Tensor, n: int) -> "RowMap":
        """Return the map of rows (C,) of a group that has n rows."""
        index, present, repeats = rows.clamp(min=0), rows >= 0, None
        each = int((rows == 0).cumprod(dim=0).sum()) if n else 0
        if each and len(rows) % (n * each) == 0:
            count = len(rows) // (n * each)
            in_order = torch.arange(n, device=rows.device).repeat_interleave(each).repeat(count)
            repeats = (count, each) if torch.equal(in_order, rows) else None
        return cls(rows, index, present, bool(present.all()), repeats)

    def to(self, device: torch.device) -> "RowMap":
        """Return the same map on a device."""
        rows, index, present = (value.to(device) for value in (self.rows, self.index, self.present))
        return RowMap(rows, index, present, self.complete, self.repeats)

    def take(self, value: Tensor, dim: int) -> Tensor:
        """Return what belongs to the row of each channel: (…, n, …) → (…, C, …). A channel without one takes row 0."""
        if self.repeats is None:
            return value.index_select(dim, self.index)
        if self.repeats == (1, 1):
            return value
        count, each = self.repeats
        before, after = value.shape[:dim], value.shape[dim + 1 :]
        wide = value.unsqueeze(dim).unsqueeze(dim + 2).expand(*before, count, value.shape[dim], each, *after)
        return wide.flatten(dim, dim + 2)


GroupReach = RowMap | Everywhere | None


def channels(shape: torch.Size, orientation: Orientation) -> tuple[int, int]:
    """Return how many channels a parameter has, and how many elements each of them."""
    count = shape.numel()
    if orientation == "element" or not shape:
        return count, 1
    size = shape[0] if orientation == "first" else shape[-1]
    return size, count // max(size, 1)


def by_channel(value: Tensor, shape: torch.Size, orientation: Orientation) -> Tensor:
    """View or copy (..., *shape) as (..., C, I)."""
    outer = value.shape[: value.ndim - len(shape)]
    size, each = channels(shape, orientation)
    if orientation == "last" and shape:
        return value.reshape(*outer, each, size).transpose(-1, -2)
    return value.reshape(*outer, size, each)


def from_channels(value: Tensor, shape: torch.Size, orientation: Orientation) -> Tensor:
    """View or copy (..., C, I) as (..., *shape)."""
    if orientation == "last":
        value = value.transpose(-1, -2)
    return value.reshape(*value.shape[:-2], *shape)


@dataclass(frozen=True, slots=True, eq=False)
class ParameterReach:
    """Which rows the elements of a parameter reach, group by group.

    Attributes:
        shape: of the parameter.
        orientation: what its channels are; the elements of a channel reach the same rows.
        groups: for each group, the one row that each channel reaches; ``ALL`` if one may reach several; None if none
            reaches any.
    """

    shape: torch.Size
    orientation: Orientation
    groups: tuple[GroupReach, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """(C, I), how many channels there are, and elements in each."""
        return channels(self.shape, self.orientation)


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """The structure of a cell's state and parameters.

    Attributes:
        groups: LongTensors (n, width), the flat entries of the state that make the rows of each group; a group depends
            on itself and on those before it.
        feeds: ``feeds[a][b]``: rows of group a depend on group b, directly or through others; b < a.
        parameters: name → reach.
        untapped: parameters with a linear use of which an output reaches several rows, so that it is not recorded.
    """

    groups: tuple[Tensor, ...]
    feeds: tuple[tuple[bool, ...], ...]
    parameters: Mapping[str, ParameterReach]
    untapped: frozenset[str] = frozenset()
    _order: Tensor | None = field(init=False, repr=False)
    _place: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        order = torch.cat([group.flatten() for group in self.groups])
        in_order = torch.equal(order, torch.arange(len(order), device=order.device))
        object.__setattr__(self, "_order", None if in_order else order)
        object.__setattr__(self, "_place", order.argsort())

    def split(self, value: Tensor) -> list[Tensor]:
        """Return what belongs to the rows of each group: (…, H) → (…, n, w)."""
        in_order = value if self._order is None else value.index_select(-1, self._order)
        parts = in_order.split([group.numel() for group in self.groups], dim=-1)
        return [part.unflatten(-1, tuple(group.shape)) for part, group in zip(parts, self.groups, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what ``split`` was given."""
        in_order = torch.cat([part.flatten(-2) for part in parts], dim=-1) if len(parts) > 1 else parts[0].flatten(-2)
        return in_order if self._order is None else in_order.index_select(-1, self._place)

    def __str__(self) -> str:
        parts = []
        for a, (group, fed) in enumerate(zip(self.groups, self.feeds, strict=True)):
            n, width = group.shape
            text = f"{n} independent rows of {width}" if n > 1 else f"{width} entries that depend on each other"
            below = [str(b) for b in range(a) if fed[b]]
            parts.append(f"group {a}: {text}" + (f", fed by group {', '.join(below)}" if below else ""))
        return "; ".join(parts)

    @property
    def alone(self) -> tuple[int, ...]:
        """The groups that no other group feeds."""
        return tuple(a for a, fed in enumerate(self.feeds) if not any(fed))

    def numbers(self) -> int:
        """Return how many numbers of influence a sample has."""
        total = 0
        for reach in self.parameters.values():
            for group, rows in zip(self.groups, reach.groups, strict=True):
                if rows is not None:
                    total += reach.shape.numel() * (group.numel() if rows is ALL else group.shape[1])
        return total

    def to(self, device: torch.device) -> "Structure":
        """Return the same structure with its index tensors on a device."""
        if self.groups[0].device == device:
            return self

        def moved(rows: GroupReach) -> GroupReach:
            return rows.to(device) if isinstance(rows, RowMap) else rows

        parameters = {
            name: ParameterReach(reach.shape, reach.orientation, tuple(moved(rows) for rows in reach.groups))
            for name, reach in self.parameters.items()
        }
        return replace(self, groups=tuple(group.to(device) for group in self.groups), parameters=parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the structure as tensors, numbers and containers of these."""
        reach = {
            name: [list(each.shape), each.orientation, [_plain(rows) for rows in each.groups]]
            for name, each in self.parameters.items()
        }
        feeds, untapped = [list(fed) for fed in self.feeds], sorted(self.untapped)
        return {"groups": list(self.groups), "feeds": feeds, "parameters": reach, "untapped": untapped}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], numbers: int, shapes: Mapping[str, torch.Size]) -> "Structure":
        """Return the structure that ``state_dict`` described.

        Args:
            saved: what it returned.
            numbers: how many entries the state has.
            shapes: of the parameters, by name.

        Raises:
            ConfigError: it is damaged, or that of another cell.
        """
        groups, feeds = tuple(saved["groups"]), tuple(tuple(bool(b) for b in fed) for fed in saved["feeds"])
        entries = torch.cat([group.flatten() for group in groups]).cpu()
        fits = torch.equal(entries.sort().values, torch.arange(numbers, device="cpu")) and len(feeds) == len(groups)
        fits = fits and all(len(fed) == len(groups) and not any(fed[a:]) for a, fed in enumerate(feeds))
        parameters = {}
        for name, (shape, orientation, rows) in saved["parameters"].items():
            fits = fits and orientation in ("first", "last", "element") and len(rows) == len(groups)
            fits = fits and torch.Size(shape) == shapes.get(name)
            count = channels(torch.Size(shape), orientation)[0]
            reach: list[GroupReach] = []
            for group, row in zip(groups, rows, strict=True):
                if isinstance(row, Tensor):
                    inside = not row.numel() or -1 <= int(row.min()) <= int(row.max()) < group.shape[0]
                    fits = fits and inside and tuple(row.shape) == (count,) and row.dtype == torch.int64
                    reach.append(RowMap.of(row, group.shape[0]))
                else:
                    fits = fits and row in (None, ALL.value)
                    reach.append(ALL if row == ALL.value else None)
            parameters[name] = ParameterReach(torch.Size(shape), orientation, tuple(reach))
        if not fits:
            raise ConfigError("the saved structure is damaged, or that of another cell")
        return cls(groups, feeds, parameters, frozenset(saved["untapped"]))


def _plain(rows: GroupReach) -> Tensor | str | None:
    return rows.rows if isinstance(rows, RowMap) else None if rows is None else rows.value
