"""Slices that wake together are led to the present together: rows of many influences, by shared products."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from rtrl._influence.catch_up_plan import Leg
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl._utils import index_sets

CHUNK_BYTES = 1 << 25
"""Columns are worked off in chunks, so that what is gathered, and each product, takes no more than this."""


def catch_up(history: History, late: Sequence[tuple[ParameterInfluence, Tensor]]) -> int:
    """Lead rows of influences from their own clocks to now, in place: ``S ← Φ_{clock→now} S``. Clocks are not changed.

    One plan serves them all. The columns of all rows of a sample stand side by side, ordered by clock, so that each
    product of the plan is one matrix product a sample; samples whose rows have the same clocks share it as a batch.

    Args:
        history: which has all blocks since the oldest clock.
        late: influences, each with some of its rows (LongTensor, CPU), none twice.

    Returns:
        The multiply-adds planned; exactly as many are done.

    Cost: ``History.plan`` of the columns; memory for two chunks of columns beside the influences.
    """
    stores = [influence for influence, _ in late]
    blocks = _blocks(stores, [rows for _, rows in late], history.now)
    columns: dict[int, int] = {}
    for block in blocks:
        columns[block.clock] = columns.get(block.clock, 0) + block.width(stores) * len(block.samples)
    plan = history.plan(columns)
    legs = history.products(plan)
    for samples, own in groupby(blocks, key=lambda block: block.samples):
        _lead(stores, list(own), _Legs(legs, samples))
    return plan.cost


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one influence with one clock, as many of every sample: ``rows`` is (G, k), CPU; ``part`` names columns of
    each row, None all of them."""

    store: int
    clock: int
    samples: tuple[int, ...]
    rows: Tensor
    part: slice | None = None

    def width(self, stores: Sequence[ParameterInfluence]) -> int:
        """Columns that a sample has here."""
        p = stores[self.store].values.shape[2]
        return self.rows.shape[1] * (p if self.part is None else len(range(p)[self.part]))

    def values(self, stores: Sequence[ParameterInfluence]) -> Tensor:
        """The columns, of all rows of the influence: (R, H, p)."""
        values = stores[self.store].values
        return values if self.part is None else values[:, :, self.part]


def _blocks(stores: Sequence[ParameterInfluence], rows: Sequence[Tensor], now: int) -> list[_Block]:
    """All rows that are behind, those of the same samples together, ordered by clock.

    Samples belong together if they have equally many rows of each clock and influence.
    """
    found = []
    for store, (influence, own) in enumerate(zip(stores, rows, strict=True)):
        own = own[influence.clock[own] < now]
        sample = influence.sample[own.to(influence.sample.device)].cpu()
        found.append(torch.stack([sample, influence.clock[own], torch.full_like(own, store), own]))
    table = torch.cat(found, dim=1) if found else torch.empty(4, 0, dtype=torch.int64, device="cpu")
    for key in (3, 2, 1, 0):
        table = table[:, table[key].argsort(stable=True)]
    kinds, counts = table[:3].unique_consecutive(dim=1, return_counts=True)
    ends = counts.cumsum(0).tolist()
    layouts: dict[tuple[tuple[int, int, int], ...], list[tuple[int, int]]] = {}
    runs = zip(*kinds.tolist(), counts.tolist(), [0, *ends], strict=False)
    for sample, members in groupby(runs, key=lambda run: run[0]):
        mine = list(members)
        layouts.setdefault(tuple((clock, store, count) for _, clock, store, count, _ in mine), []).append(
            (sample, mine[0][4])
        )
    blocks = []
    for layout, alike in layouts.items():
        samples, firsts = tuple(sample for sample, _ in alike), torch.tensor([f for _, f in alike], device="cpu")
        done = 0
        for clock, store, count in layout:
            place = firsts[:, None] + torch.arange(done, done + count, device="cpu")
            blocks.append(_Block(store, clock, samples, table[3][place]))
            done += count
    return blocks


class _Legs:
    """The products of a plan for some samples, counted in the rows of the state that any of them touches."""

    def __init__(self, legs: Sequence[tuple[Leg, Transition]], samples: tuple[int, ...]) -> None:
        first = legs[0][1]
        size = first.jacobian.shape[0]
        everyone = samples == tuple(range(size))
        chosen = None if everyone else torch.tensor(samples, device=first.jacobian.device)
        reach = first.cols
        for _, product in legs[1:]:
            reach = index_sets.union(reach, product.cols, first.n)
        if reach is not None and reach.dtype == torch.bool:
            reach = index_sets.mask_to_indices(reach)
        self.cols = index_sets.select_samples(reach, chosen)
        self.n, self.width = first.n, first.width
        self._whole = [(leg, _of(product, chosen)) for leg, product in legs]
        self._near = [(leg, _of(product.within(reach), chosen)) for leg, product in legs]

    def apply(self, columns: Tensor, clocks: Sequence[tuple[int, int]], whole: bool) -> None:
        """All legs in turn, in place, on columns (G, rows · width, m): (clock, how many), ordered by clock. ``whole``:
        the rows are those of the state, not only those touched."""
        for leg, product in self._whole if whole else self._near:
            low = sum(m for clock, m in clocks if clock < leg.since)
            high = sum(m for clock, m in clocks if clock <= leg.start)
            if low < high:
                _apply(product, columns[:, :, low:high])


def _of(product: Transition, samples: Tensor | None) -> Transition:
    if samples is None:
        return product
    rows, cols = (index_sets.select_samples(t, samples) for t in (product.rows, product.cols))
    return replace(product, rows=rows, cols=cols, jacobian=product.jacobian[samples], adjoint=product.adjoint[samples])


def _apply(product: Transition, columns: Tensor) -> None:
    slots = columns.unflatten(1, (product.n, product.width))
    sample = torch.arange(len(columns), device=columns.device)[:, None]
    read = columns if product.cols is None else slots[sample, product.cols].flatten(1, 2)
    changed = torch.bmm(product.jacobian, read)
    if product.rows is None:
        columns.copy_(changed)
    else:
        slots[sample, product.rows] = changed.unflatten(1, (-1, product.width))


def _lead(stores: Sequence[ParameterInfluence], blocks: list[_Block], legs: _Legs) -> None:
    """Take all legs with the rows of some samples, chunk by chunk."""
    values = stores[blocks[0].store].values
    most = max(1, CHUNK_BYTES // (len(blocks[0].samples) * values.shape[1] * values.element_size()))
    chunk: list[_Block] = []
    room = most
    for part in (part for block in blocks for part in _cut(block, stores, most)):
        if chunk and part.width(stores) > room:
            _lead_chunk(stores, chunk, legs)
            chunk, room = [], most
        chunk.append(part)
        room -= part.width(stores)
    _lead_chunk(stores, chunk, legs)


def _cut(block: _Block, stores: Sequence[ParameterInfluence], most: int) -> list[_Block]:
    """The same columns in blocks of at most this many."""
    p = stores[block.store].values.shape[2]
    if block.width(stores) <= most:
        return [block]
    at_once = max(1, most // p)
    out = []
    for rows in block.rows.split(at_once, dim=1):
        parts = [None] if p <= most else [slice(j, j + most) for j in range(0, p, most)]
        out += [_Block(block.store, block.clock, block.samples, rows, part) for part in parts]
    return out


def _lead_chunk(stores: Sequence[ParameterInfluence], chunk: list[_Block], legs: _Legs) -> None:
    clocks = [(block.clock, block.width(stores)) for block in chunk]
    if len(chunk) == 1 and chunk[0].rows.numel() == 1:  # where it stands
        (block,) = chunk
        row = int(block.rows)
        legs.apply(block.values(stores)[row : row + 1], clocks, whole=True)
        return
    cols = legs.cols
    views, columns = [], []
    for block in chunk:
        view = block.values(stores).unflatten(1, (legs.n, legs.width))
        rows = block.rows.to(view.device)
        values = view[rows] if cols is None else view[rows[:, :, None], cols[:, None]]
        columns.append(values.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))  # (G, rows · width, k · p)
        views.append((view, rows))
    together = torch.cat(columns, dim=2) if len(columns) > 1 else columns[0]
    legs.apply(together, clocks, whole=False)
    for (view, rows), (_, width), new in zip(views, clocks, together.split([m for _, m in clocks], dim=2), strict=True):
        new = new.unflatten(2, (rows.shape[1], width // max(rows.shape[1], 1)))
        new = new.unflatten(1, (-1, legs.width)).permute(0, 3, 1, 2, 4)
        if cols is None:
            view[rows] = new
        else:
            view[rows[:, :, None], cols[:, None]] = new
