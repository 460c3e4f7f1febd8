"""What is checked of saved influences and of a saved history before memory is taken for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rtrl._influence.segment_tree import CircularSegmentTree
from rtrl.cells.protocol import check_indices
from rtrl.errors import ConfigError

LARGEST_COUNT = 2**62
"""Of steps and blocks, so that they and their sums are exact in every tensor."""


def count(what: str, value: Any, most: int = LARGEST_COUNT, least: int = 0) -> int:
    """Return a saved count.

    Raises:
        ConfigError: it is not an integer in ``least`` … ``most``.
    """
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{what} must be a count in {least} … {most}, got {value!r}")
    return value


def check_rows(saved: Mapping[str, Any], slices: int) -> None:
    """Refuse rows of a saved influence that are not those of its samples and slices, one each.

    Args:
        saved: "values" (R, ...), LongTensors "sample" and "slice" (R,), and "row" (keys,), the row of each key
            ``sample · slices + slice``, −1 for none.
        slices: of the parameter.

    Raises:
        ConfigError: they are not.
    """
    rows, held = saved["row"].cpu(), saved["values"].shape[0]
    if held > rows.numel():
        raise ConfigError(f"the saved influence is damaged: it has {held} rows for {rows.numel()} slices")
    keys = (rows >= 0).nonzero().flatten()
    if bool((rows < -1).any()) or rows[keys].unique().numel() != keys.numel():
        raise ConfigError("the saved influence is damaged: two slices refer to one row, or one to none that there is")
    for name, values in (("sample", keys // max(slices, 1)), ("slice", keys % max(slices, 1))):
        expected = torch.full((held,), -1, device="cpu")
        expected[rows[keys]] = values
        if not torch.equal(saved[name].cpu(), expected):
            raise ConfigError(f"the saved influence is damaged: a row is not that of the {name} that refers to it")


def check_block(rows: Tensor | None, cols: Tensor | None, state: Tensor) -> None:
    """Refuse rows (B, u) and columns (B, c) of a saved block that are not rows of the state, the former among them.

    Raises:
        ConfigError: columns leave out a row.
        SparsityError: an index is out of range or repeated, or they have another form.
    """
    size, n = state.shape[:2]
    for what, index in (("rows of a saved block", rows), ("columns of a saved block", cols)):
        if index is not None:
            check_indices(what, index, size, n, state.device)
    if cols is not None:
        among = torch.zeros(size, n, dtype=torch.bool, device=state.device).scatter_(1, cols, True)
        if rows is None or not bool(among.gather(1, rows).all()):
            raise ConfigError("the columns of a saved block leave out rows that it writes")


def check_plans(saved: Mapping[str, Any], tree: CircularSegmentTree[Any]) -> None:
    """Refuse what a planner noted of nodes that a tree does not have.

    Args:
        saved: "composed", pairs of the first step of a node and the one after its last; "credits", the number of a
            node, its first step and a count.
        tree: the tree.

    Raises:
        ConfigError: there are such nodes, or more notes than nodes.
    """
    composed, credits = saved["composed"], saved["credits"]
    _check_numbers("composed", composed, 2, tree.capacity)
    _check_numbers("credits", credits, 3, 2 * tree.capacity)
    if len({tuple(pair) for pair in composed}) != len(composed):
        raise ConfigError("a node of the saved history is composed twice")
    for start, stop in composed:
        if not tree.oldest <= start < stop <= tree.stop or len(tree.nodes(start, stop)) != 1:
            raise ConfigError(f"the saved history has no node of the blocks {start} … {stop - 1}")
    for number, _, credit in credits:
        if not 0 <= number < 2 * tree.capacity - 1 or not 0 <= credit <= LARGEST_COUNT:
            raise ConfigError("a credit of the saved history is not that of a node")


def _check_numbers(what: str, saved: Any, each: int, most: int) -> None:
    fits = isinstance(saved, Sequence) and len(saved) <= most
    if not fits or not all(len(entry) == each and all(type(v) is int for v in entry) for entry in saved):
        raise ConfigError(f"{what!r} of the saved history must be at most {most} lists of {each} integers")
