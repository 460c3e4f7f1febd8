"""What slices that sleep and wake cost ``rtrl.BlockRTRL``: the same bookkeeping as the learner's, without the numbers.

Clocks, and a segment tree of index sets instead of Jacobians; every product that the learner would plan is planned here
by the same planner, so that its multiply-adds are known.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rtrl._influence.catch_up import CHUNK_BYTES
from rtrl._influence.catch_up_plan import CatchUpPlan, CatchUpPlanner
from rtrl._influence.segment_tree import CircularSegmentTree
from rtrl._influence.transition import Pattern, compose_patterns
from rtrl._utils import index_sets
from rtrl.costs.routing import Group


@dataclass(frozen=True)
class Moved:
    """What sleeping slices cost when a block closes.

    Attributes:
        macs: multiply-adds. before, after: bytes alive at once while those that the tree forgets are led to the
            present, and while those that wake are, once there is room for what is born.
    """

    macs: int
    before: int
    after: int


class _Rows(NamedTuple):
    """Rows of one clock and one parameter, as many of each of some samples: ``rows`` of ``size`` columns."""

    clock: int
    place: int
    rows: int
    size: int

    @property
    def width(self) -> int:
        return self.rows * self.size


class Sleepers:
    """The slices of all samples, block by block.

    Args:
        groups: parameters whose slices are active together. window: of the tree. lazy: as for ``BlockRTRL``.
        batch_size, rows, width: of the state. itemsize: of a number.
    """

    def __init__(
        self, groups: list[Group], batch_size: int, rows: int, width: int, itemsize: int, window: int, lazy: bool
    ) -> None:
        self._itemsize = itemsize
        self._groups, self._lazy, self._size = groups, lazy, batch_size
        self._full = rows * width
        none = torch.empty(batch_size, 0, dtype=torch.int64)
        self._tree: CircularSegmentTree[Pattern] = CircularSegmentTree(
            window if lazy and groups else 1,
            compose_patterns,
            Pattern(none, none, rows, width, batch_size),
        )
        self._planner = CatchUpPlanner(self._tree, lambda pattern: pattern, compose_patterns)
        self._clocks = [torch.full((batch_size * group.slices,), -1, dtype=torch.int64) for group in groups]

    def close(self, block: Pattern, active: list[Tensor]) -> Moved:
        """What slices cost when a block closes, but for what is born.

        Args:
            block: where the block's transition has its numbers. active: for each group, the keys
                ``sample · slices + slice`` that were active in the block.
        """
        early = late = 0, 0
        if len(self._tree) == self._tree.capacity:
            oldest = self._tree.oldest
            early = self._advance([((clock >= 0) & (clock <= oldest)) for clock in self._clocks])
        now = self._tree.stop
        self._tree.append(block)
        awake = []
        for clock, keys in zip(self._clocks, active, strict=True):
            mask = torch.zeros_like(clock, dtype=torch.bool)
            mask[keys] = True
            clock[mask & (clock < 0)] = now
            awake.append(mask if self._lazy else clock >= 0)
        late = self._advance(awake)
        return Moved(early[0] + late[0], early[1], late[1])

    def sync(self) -> int:
        """Multiply-adds of paying all that is owed."""
        return self._pay([clock >= 0 for clock in self._clocks])

    def _advance(self, rows: list[Tensor]) -> tuple[int, int]:
        """Multiply-adds and bytes of leading these slices to the present."""
        macs, columns = self._pay(rows), dict[int, int]()
        layouts = self._layouts(rows)
        for group, clock, mine in zip(self._groups, self._clocks, rows, strict=True):
            times, counts = clock[mine & (clock < self._tree.stop)].unique(return_counts=True)
            for time, count in zip(times.tolist(), counts.tolist(), strict=True):
                columns[time] = columns.get(time, 0) + count * group.width
            clock[mine] = self._tree.stop
        if not columns:
            return macs, 0
        plan, products = self._planned(columns)
        return macs + plan.cost, max(self._scratch(plan, products, *layout) for layout in layouts.items())

    def _layouts(self, rows: list[Tensor]) -> dict[tuple[_Rows, ...], int]:
        """Samples that have equally many rows of each clock and parameter go together: what they have, and how many
        samples these are."""
        layouts: dict[tuple[_Rows, ...], int] = {}
        for sample in range(self._size):
            mine: list[_Rows] = []
            for group, clock, chosen in zip(self._groups, self._clocks, rows, strict=True):
                own = slice(sample * group.slices, (sample + 1) * group.slices)
                times, counts = clock[own][chosen[own] & (clock[own] < self._tree.stop)].unique(return_counts=True)
                for time, count in zip(times.tolist(), counts.tolist(), strict=True):
                    mine += [_Rows(time, at, count, size) for at, size in zip(group.places, group.sizes, strict=True)]
            if mine:
                key = tuple(sorted(mine))
                layouts[key] = layouts.get(key, 0) + 1
        return layouts

    def _pay(self, rows: list[Tensor]) -> int:
        """Nothing has been paid before the sync at the end, so what is owed reaches back to each clock."""
        macs, times = 0, set[int]()
        for group, clock, mine in zip(self._groups, self._clocks, rows, strict=True):
            late = clock[mine & (clock < self._tree.stop)]
            times |= set(late.unique().tolist())
            macs += late.numel() * self._full * group.width
        return macs + (self._planned(dict.fromkeys(times, self._size), shared=True)[0].cost if times else 0)

    def _planned(self, columns: dict[int, int], shared: bool = False) -> tuple[CatchUpPlan, list[Pattern]]:
        """How the learner would lead these columns to the present; its products count as composed from now on."""
        plan = self._planner.plan(columns, self._tree.stop, shared=shared)
        return plan, self._planner.products(plan)

    def _scratch(self, plan: CatchUpPlan, products: list[Pattern], layout: tuple[_Rows, ...], samples: int) -> int:
        """Bytes of the chunk of columns that takes most: gathered, put side by side, and what a product reads of them
        and makes of it."""
        n, width = products[0].n, products[0].width
        touched = products[0].cols
        for product in products[1:]:
            touched = index_sets.union(touched, product.cols, n)
        if touched is not None:
            touched = touched if touched.dtype == torch.bool else index_sets.mask(touched, n)
        reach = n if touched is None else int(touched.sum(dim=1).max())
        most = 0
        for chunk in self._chunks(layout, samples):
            numbers = 0  # of rows of the state
            if len(chunk) > 1 or chunk[0].rows * samples > 1:
                numbers = reach * sum(rows.width for rows in chunk) * (2 if len(chunk) > 1 else 1)
                numbers += reach * chunk[-1].width if chunk[-1].rows > 1 else 0  # turned
            numbers += max(
                sum(rows.width for rows in chunk if hop.first_start <= rows.clock <= hop.start)
                * (product.u + (0 if product.cols is None else product.c))
                for hop, product in zip(plan.hops, products, strict=True)
            )
            most = max(most, numbers)
        return samples * most * width * self._itemsize

    def _chunks(self, layout: tuple[_Rows, ...], samples: int) -> list[list[_Rows]]:
        """As ``catch_up`` cuts them; rows wider than a chunk fill one, and are not gone through part by part."""
        room = limit = max(1, CHUNK_BYTES // (samples * self._full * self._itemsize))
        chunks: list[list[_Rows]] = [[]]
        for rows in layout:
            if chunks[-1] and rows.width > room:
                chunks.append([])
                room = limit
            chunks[-1].append(rows if rows.width <= limit else rows._replace(rows=1, size=limit))
            room -= rows.width
        return chunks
