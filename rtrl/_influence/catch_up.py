"""Bring slices that reactivate together up to date in one batch, sharing Jacobian products across parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from rtrl._influence.catch_up_plan import Hop
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl._utils import index_sets

CHUNK_BYTES = 1 << 25
"""Columns are multiplied in chunks, so that what is gathered, and each product, takes at most this many bytes."""


def catch_up(history: History, outdated: Sequence[tuple[ParameterInfluence, Tensor]]) -> int:
    """Bring rows of influences up to date, in place: ``S ← Φ_{last_block→now} S``. The caller sets ``last_block``.

    One plan serves all of them. The columns of all rows of a sample stand side by side, ordered by last block, so that
    each product of the plan is one matrix product per sample; samples whose rows have the same last blocks share it as
    a batch.

    Args:
        history: the blocks since the oldest last block.
        outdated: influences, each with some of its rows (LongTensor, CPU), none twice.

    Returns:
        The multiply-adds planned; exactly as many are done.

    Cost: ``History.plan`` of the columns; memory for two chunks of columns beside the influences.
    """
    groups = _group_columns(outdated, history.now)
    columns: dict[int, int] = {}
    for group in groups:
        columns[group.last_block] = columns.get(group.last_block, 0) + group.width * len(group.samples)
    plan = history.plan(columns)
    products = history.products(plan)
    for samples, same_samples in groupby(groups, key=lambda group: group.samples):
        _propagate(list(same_samples), SampleHops(products, samples))
    return plan.cost


@dataclass(frozen=True, slots=True)
class ColumnGroup:
    """Rows of one influence with one last block, equally many of each of G samples.

    Attributes:
        influence: whose rows.
        last_block: of all of them.
        samples: G of them.
        rows: LongTensor (G, k), CPU.
        part: columns of each row; None for all of them.
    """

    influence: ParameterInfluence
    last_block: int
    samples: tuple[int, ...]
    rows: Tensor
    part: slice | None = None

    @property
    def values(self) -> Tensor:
        """These columns, of all rows of the influence: (R, H, p)."""
        values = self.influence.values
        return values if self.part is None else values[:, :, self.part]

    @property
    def width(self) -> int:
        """Columns per sample."""
        return self.rows.shape[1] * self.values.shape[2]

    def split_columns(self, most: int) -> "list[ColumnGroup]":
        """Return groups of at most ``most`` columns per sample."""
        p = self.influence.values.shape[2]
        if self.width <= most:
            return [self]
        parts = [None] if p <= most else [slice(j, j + most) for j in range(0, p, most)]
        return [
            ColumnGroup(self.influence, self.last_block, self.samples, rows, part)
            for rows in self.rows.split(max(1, most // p), dim=1)
            for part in parts
        ]


def _group_columns(outdated: Sequence[tuple[ParameterInfluence, Tensor]], now: int) -> list[ColumnGroup]:
    """All rows that are not up to date, those of the same samples together, ordered by last block.

    Samples belong together if they have equally many rows of each last block and influence.
    """
    tables = [torch.empty(4, 0, dtype=torch.int64, device="cpu")]
    for i, (influence, rows) in enumerate(outdated):
        rows = rows[influence.last_block[rows] < now]
        sample = influence.sample[rows.to(influence.sample.device)].cpu()
        tables.append(torch.stack([sample, influence.last_block[rows], torch.full_like(rows, i), rows]))
    table = torch.cat(tables, dim=1)
    for key in (3, 2, 1, 0):
        table = table[:, table[key].argsort(stable=True)]
    keys, counts = table[:3].unique_consecutive(dim=1, return_counts=True)
    runs = zip(*keys.tolist(), counts.tolist(), [0, *counts.cumsum(0).tolist()], strict=False)
    # By what a sample has, as (last block, influence, count): which samples, and where their rows begin in the table.
    layouts: dict[tuple[tuple[int, int, int], ...], list[tuple[int, int]]] = {}
    for sample, sample_runs in groupby(runs, key=lambda run: run[0]):
        _, last_blocks, influences, lengths, begins = zip(*sample_runs, strict=True)
        layouts.setdefault(tuple(zip(last_blocks, influences, lengths, strict=True)), []).append((sample, begins[0]))
    groups = []
    for layout, members in layouts.items():
        samples, begins = zip(*members, strict=True)
        place = torch.tensor(begins, device="cpu")[:, None]
        for last_block, i, count in layout:
            rows = table[3][place + torch.arange(count, device="cpu")]
            groups.append(ColumnGroup(outdated[i][0], last_block, samples, rows))
            place = place + count
    return groups


class SampleHops:
    """The products of a plan for some samples, in the state rows that any of them touches.

    Args:
        products: the hops of the plan, with their transitions.
        samples: which of the batch.
    """

    def __init__(self, products: Sequence[tuple[Hop, Transition]], samples: tuple[int, ...]) -> None:
        first = products[0][1]
        device = first.jacobian.device
        selected = None if samples == tuple(range(len(first.jacobian))) else torch.tensor(samples, device=device)
        touched = first.cols
        for _, product in products[1:]:
            touched = index_sets.union(touched, product.cols, first.n)
        if touched is not None and touched.dtype == torch.bool:
            touched = index_sets.mask_to_indices(touched)
        self.cols = index_sets.select_samples(touched, selected)
        self.n, self.width = first.n, first.width
        self._over_state = [(hop, product.select_samples(selected)) for hop, product in products]
        self._over_cols = [(hop, product.within(touched).select_samples(selected)) for hop, product in products]

    def apply_(self, columns: Tensor, widths: Sequence[tuple[int, int]], whole_state: bool) -> None:
        """Apply all hops in turn, in place.

        Args:
            columns: (G, rows · width, m), ordered by last block.
            widths: (last block, how many columns), in order.
            whole_state: the rows are those of the state, not only those touched.
        """
        for hop, product in self._over_state if whole_state else self._over_cols:
            lo = sum(m for last_block, m in widths if last_block < hop.first_start)
            hi = sum(m for last_block, m in widths if last_block <= hop.start)
            if lo < hi:
                product.apply_(columns[:, :, lo:hi])


def _propagate(groups: list[ColumnGroup], hops: SampleHops) -> None:
    """Apply all hops to the rows of some samples, chunk by chunk."""
    values = groups[0].values
    most = max(1, CHUNK_BYTES // (len(groups[0].samples) * values.shape[1] * values.element_size()))
    chunk: list[ColumnGroup] = []
    room = most
    for part in (part for group in groups for part in group.split_columns(most)):
        if chunk and part.width > room:
            _propagate_chunk(chunk, hops)
            chunk, room = [], most
        chunk.append(part)
        room -= part.width
    _propagate_chunk(chunk, hops)


def _propagate_chunk(chunk: list[ColumnGroup], hops: SampleHops) -> None:
    widths = [(group.last_block, group.width) for group in chunk]
    if len(chunk) == 1 and chunk[0].rows.numel() == 1:  # without a copy
        row = int(chunk[0].rows)
        hops.apply_(chunk[0].values[row : row + 1], widths, whole_state=True)
        return
    places, columns = [], []
    for group in chunk:
        slots = group.values.unflatten(1, (hops.n, hops.width))
        rows = group.rows.to(slots.device)
        place = (rows,) if hops.cols is None else (rows[:, :, None], hops.cols[:, None])
        columns.append(slots[place].permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))  # (G, rows · width, k · p)
        places.append((slots, place))
    together = torch.cat(columns, dim=2) if len(columns) > 1 else columns[0]
    hops.apply_(together, widths, whole_state=False)
    parts = together.split([m for _, m in widths], dim=2)
    for group, (slots, place), new in zip(chunk, places, parts, strict=True):
        new = new.unflatten(2, (group.rows.shape[1], slots.shape[3])).unflatten(1, (-1, hops.width))
        slots[place] = new.permute(0, 3, 1, 2, 4)
