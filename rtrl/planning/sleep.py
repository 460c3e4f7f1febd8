"""What slices that sleep and wake cost ``rtrl.BlockRTRL``: the same bookkeeping as the learner's, without the numbers.

Clocks, and a segment tree of index sets instead of Jacobians; every product that the learner would plan is planned here
by the same planner, so that its multiply-adds are known.
"""

import torch
from torch import Tensor

from rtrl import _rows
from rtrl.catch_up import CHUNK_BYTES
from rtrl.planning.routing import Group
from rtrl.segment_tree import CircularSegmentTree
from rtrl.transition import Pattern, merge


class Sleepers:
    """The slices of all samples, block by block.

    Args:
        groups: parameters whose slices are active together. window: of the tree. lazy: as for ``BlockRTRL``.
        batch_size, rows, width: of the state. itemsize: of a number.

    Attributes:
        scratch_bytes: of the columns that have been led to the present at once, at most, gathered and multiplied.
    """

    def __init__(
        self, groups: list[Group], batch_size: int, rows: int, width: int, itemsize: int, window: int, lazy: bool
    ) -> None:
        self._itemsize, self.scratch_bytes = itemsize, 0
        self._groups, self._lazy, self._size = groups, lazy, batch_size
        self._full = rows * width
        none = torch.empty(batch_size, 0, dtype=torch.int64)
        self._tree: CircularSegmentTree[Pattern] = CircularSegmentTree(
            window if lazy and groups else 1,
            merge,
            Pattern(none, none, rows, width, batch_size),
            outline=lambda pattern: pattern,
            merge=merge,
        )
        self._clocks = [torch.full((batch_size * group.slices,), -1, dtype=torch.int64) for group in groups]

    def close(self, block: Pattern, active: list[Tensor]) -> int:
        """Multiply-adds of what slices cost when a block closes, but for what is born.

        Args:
            block: where the block's transition has its numbers. active: for each group, the keys
                ``sample · slices + slice`` that were active in the block.
        """
        macs = 0
        if len(self._tree) == self._tree.capacity:
            oldest = self._tree.oldest
            macs += self._advance([((clock >= 0) & (clock <= oldest)) for clock in self._clocks])
        now = self._tree.stop
        self._tree.append(block)
        awake = []
        for clock, keys in zip(self._clocks, active, strict=True):
            mask = torch.zeros_like(clock, dtype=torch.bool)
            mask[keys] = True
            clock[mask & (clock < 0)] = now
            awake.append(mask if self._lazy else clock >= 0)
        return macs + self._advance(awake)

    def sync(self) -> int:
        """Multiply-adds of paying all that is owed."""
        return self._pay([clock >= 0 for clock in self._clocks])

    def _advance(self, rows: list[Tensor]) -> int:
        macs = self._pay(rows)
        columns: dict[int, int] = {}
        together = self._together(rows)
        for group, clock, mine in zip(self._groups, self._clocks, rows, strict=True):
            times, counts = clock[mine & (clock < self._tree.stop)].unique(return_counts=True)
            for time, count in zip(times.tolist(), counts.tolist(), strict=True):
                columns[time] = columns.get(time, 0) + count * group.width
            clock[mine] = self._tree.stop
        return macs + self._planned(columns, together=together)

    def _together(self, rows: list[Tensor]) -> int:
        """Columns that are led on at once, at most: samples that have equally many rows of each clock go together,
        parameter by parameter, as many as fill a chunk."""
        layouts: dict[tuple[tuple[int, int, int], ...], int] = {}
        for sample in range(self._size):
            blocks = []
            for group, clock, mine in zip(self._groups, self._clocks, rows, strict=True):
                own = slice(sample * group.slices, (sample + 1) * group.slices)
                times, counts = clock[own][mine[own] & (clock[own] < self._tree.stop)].unique(return_counts=True)
                for time, count in zip(times.tolist(), counts.tolist(), strict=True):
                    blocks += [(time, at, count * size) for at, size in zip(group.places, group.sizes, strict=True)]
            key = tuple(sorted(blocks))
            layouts[key] = layouts.get(key, 0) + 1
        return max((samples * self._chunk(layout, samples) for layout, samples in layouts.items()), default=0)

    def _chunk(self, layout: tuple[tuple[int, int, int], ...], samples: int) -> int:
        room = limit = max(1, CHUNK_BYTES // (samples * self._full * self._itemsize))
        most = 0
        for _, _, width in layout:
            if width > limit:
                return limit
            room = limit - width if width > room else room - width
            most = max(most, limit - room)
        return most

    def _pay(self, rows: list[Tensor]) -> int:
        """Nothing has been paid before the sync at the end, so what is owed reaches back to each clock."""
        macs, times = 0, set()
        for group, clock, mine in zip(self._groups, self._clocks, rows, strict=True):
            late = clock[mine & (clock < self._tree.stop)]
            times |= set(late.unique().tolist())
            macs += late.numel() * self._full * group.width
        return macs + self._planned(dict.fromkeys(times, self._size), shared=True)

    def _planned(self, columns: dict[int, int], shared: bool = False, together: int = 0) -> int:
        if not columns:
            return 0
        plan = self._tree.plan(
            columns, self._tree.stop, lambda p: p.apply_macs, lambda p: p.compose_macs, shared=shared
        )
        products = self._tree.products(plan)  # from now on they count as composed
        if together:
            self.scratch_bytes = max(self.scratch_bytes, self._scratch(products, together))
        return plan.cost

    def _scratch(self, products: list[Pattern], columns: int) -> int:
        """Bytes of columns gathered, side by side, and of the last product's part of them, read and multiplied."""
        n, width, near = products[0].n, products[0].width, products[0].cols
        masks = None if near is None else _rows.mask(near, n)
        for product in products[1:]:
            masks = _rows.union(masks, product.cols, n)
        touched = n if masks is None else int(masks.sum(dim=1).max())
        last = products[-1]  # which all of them go through
        part = last.u + (0 if last.cols is None else last.c)
        return columns * (2 * touched + part) * width * self._itemsize
