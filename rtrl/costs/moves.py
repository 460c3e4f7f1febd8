"""What moving influences takes in each block, counted from the rows and slices that its steps touch.

A block that writes u rows of the state and touches c of them, width numbers each, moves a column of an influence by
``u·c·width²`` multiply-adds. A slice that was dormant for some blocks is moved when it is active again, or leaves the
window: block by block, or by their product, which writes and touches the rows of all of them; the cheaper one counts.
All samples of a batch are worked off as the one whose blocks touch most.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_

from torch import Tensor

from rtrl.costs.profile import Profile


def touched(profile: Profile, name: str, steps: int) -> set[tuple[int, int]]:
    """The pairs (sample, slice) of a parameter that are active in the first steps of the stream."""
    return {pair for step in range(steps) for pair in _pairs(profile.choice(step).active.get(name))}


def longest_dormancy(profile: Profile, steps: int) -> int:
    """The most steps in a row that a slice, once active, is dormant in the first steps of the stream."""
    longest = 0
    for name in {id(profile.choice(0).active[name]): name for name in profile.sliced}.values():
        last: dict[tuple[int, int], int] = {}
        for step in range(steps):
            for pair in _pairs(profile.choice(step).active.get(name)):
                longest = max(longest, step - last.get(pair, step))
                last[pair] = step
        longest = max([longest, *(steps - step for step in last.values())])
    return longest


class Moves:
    """Blocks of the stream, one after another.

    Args:
        profile: of the cell.
        names: the parameters that are counted.
        lengths: the steps of each block.
        window: blocks after which a dormant slice is moved.
        lazy: False moves every slice in every block.

    Attributes:
        macs: multiply-adds in each block, and at the end those of the gradients pending for dormant slices.
        rows: numbers of the state that each block writes, of the sample that writes most.
    """

    def __init__(
        self, profile: Profile, names: Iterable[str], lengths: Sequence[int], window: int, lazy: bool = True
    ) -> None:
        self._profile, self._lazy, self._window = profile, lazy, window
        self._written, self._reached = list[list[int]](), list[list[int]]()
        sliced = set(profile.sliced)
        self._known: dict[tuple[int, int], int] = {}
        whole = sum(profile.sizes[name] for name in names if name not in sliced)
        groups: dict[tuple[int, int], list[str]] = {}
        for name in names:
            if name in sliced:
                together = id(profile.choice(0).active[name]), profile.slices[name]
                groups.setdefault(together, []).append(name)
        sizes = {group[0]: sum(profile.sizes[n] // profile.slices[n] for n in group) for group in groups.values()}
        last: dict[str, dict[tuple[int, int], int]] = {name: {} for name in sizes}
        self.macs, self.rows, begin, size, width = list[int](), list[int](), 0, profile.batch_size, profile.width
        for number, length in enumerate(lengths):
            steps = range(begin, begin + length)
            begin += length
            self._note(steps)
            rows, columns = _most(self._written[-1]), _most(self._reached[-1])
            self.rows.append(rows * width)
            moved = whole * size * (rows * width + 1) * columns * width if number else 0
            for name, entries in sizes.items():
                moved += entries * self._slices(name, last[name], steps, number)
            self.macs.append(moved)
        pending = sum(sizes[name] * sum(b < len(lengths) - 1 for b in last[name].values()) for name in sizes)
        if self.macs:
            self.macs[-1] += pending * profile.state_size

    def _slices(self, name: str, last: dict[tuple[int, int], int], steps: range, number: int) -> int:
        """Multiply-adds of a column of each slice that is moved in a block."""
        macs = 0
        for pair, block in last.items():
            if block <= number - 1 - self._window and self._lazy:
                macs += self._moved(block, number - 1)
                last[pair] = number - 1
        active = {pair for step in steps for pair in _pairs(self._profile.choice(step).active.get(name))}
        for pair in active if self._lazy else active | last.keys():
            if pair in last:
                macs += self._moved(last[pair], number)
            last[pair] = number
        return macs

    def _moved(self, since: int, until: int) -> int:
        """Multiply-adds of moving a column over the blocks after ``since`` up to ``until``, and of the gradient that is
        pending for it."""
        if (since, until) not in self._known:
            blocks = range(since + 1, until + 1)
            replayed = sum(_most(self._written[block]) * _most(self._reached[block]) for block in blocks)
            written, reached = (
                _most(reduce(or_, (masks[block][sample] for block in blocks)) for sample in range(len(masks[until])))
                for masks in (self._written, self._reached)
            )
            cheaper = min(replayed, written * reached)
            self._known[since, until] = cheaper * self._profile.width**2 + self._profile.state_size
        return self._known[since, until]

    def _note(self, steps: range) -> None:
        """The rows that steps write, and those that they write or read, of each sample, as bits."""
        every, size = (1 << self._profile.rows) - 1, self._profile.batch_size
        written, reached = [0] * size, [0] * size
        for step in steps:
            reads, writes = (_bits(index, size, every) for index in self._profile.choice(step)[:2])
            for sample in range(size):
                written[sample] |= writes[sample]
                reached[sample] |= writes[sample] | reads[sample]
            if min(written) == every:
                break
        self._written.append(written)
        self._reached.append(reached)


def _most(masks: Iterable[int]) -> int:
    """The most bits of any mask: all samples of a batch are worked off as the widest one."""
    return max(map(int.bit_count, masks))


def _pairs(index: Tensor | None) -> list[tuple[int, int]]:
    rows = [] if index is None else index.tolist()
    return [(sample, index) for sample, row in enumerate(rows) for index in row]


def _bits(index: Tensor | None, size: int, every: int) -> list[int]:
    if index is None:
        return [every] * size
    return [sum(1 << row for row in rows) for rows in index.tolist()]
