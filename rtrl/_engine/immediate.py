"""The influence that is born inside a block, ``Σ_τ C_τ B_τ``, from the taps straight into the store.

A tap's immediate Jacobian, carried to the block's end, is ``left ⊗ u``: a whole block of them is one matrix product for
each weight, or for each of its slices that was active. Besides the influence itself nothing of its size is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._engine.linearization import Linearization, LinearTap
from rtrl._engine.output_jacobian import DenseOutputJacobian, Response, largest
from rtrl._engine.taps import segment_products
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.errors import SparsityError

_CHUNK = 2**22  # numbers of ``left`` that are written out at a time
_ROWS_CHUNK = 2**20  # the same where that costs nothing: few enough to stay in a processor's cache
_LEAST_ROWS = 8


class Stores:
    """Where births go: the influence of each parameter, and the rows of it that stand for the block's active slices.

    Args:
        influences: by name. rows: name → LongTensor (R,) on the CPU. block: the block's transition.
    """

    def __init__(
        self, influences: Mapping[str, ParameterInfluence], rows: Mapping[str, Tensor], block: Transition
    ) -> None:
        self.influences, self.rows, self.block = influences, rows, block

    def add(
        self, name: str, which: slice, left: Tensor, right: Tensor, transposed: bool = False, part: slice = slice(None)
    ) -> None:
        """Add ``leftᵀ right`` to the rows ``which`` of a parameter: left (C, X, R·O), right (C, X, I), R being those of
        the state's entries that ``part`` names."""
        self.influences[name].add_products(self.rows[name][which], self.block, left, right, transposed, part)

    def add_dense(self, name: str, born: Tensor) -> None:
        """Add born (R, u·width, p) to all rows of a parameter."""
        self.influences[name].add(self.rows[name], self.block, born)


@dataclass(frozen=True, slots=True)
class DenseImmediate:
    """What is born through one linear map z = W u of parameters that are kept whole.

    Attributes:
        taps: the uses with this z. response: ``∂h_next/∂z``. reach: (B, m, R + 1, W), see ``reverse_sweep``.
        slices: parameter name → size of its first dimension.
    """

    taps: Sequence[LinearTap]
    response: Response
    reach: Tensor
    slices: Mapping[str, int]

    def add_to(self, stores: Stores) -> None:
        """Add it, in place. Cost: for each weight ``m·R·O·I·K·L`` multiply-adds a sample, and once ``left``."""
        size, m, r = self.reach.shape[0], self.reach.shape[1], self.reach.shape[2] - 1
        k, length, o = self.taps[0].tap.shape
        if not r * length:
            return
        if stores.block.rows is None and all(tap.tap.index is None for tap in self.taps):
            self._add_by_rows(stores)
            return
        for start, stop in _spans(m, size * k * length * r * o, _CHUNK):
            reach = self.reach[:, start:stop, :-1]
            at: Tensor | slice = slice(None)
            if stop - start < m:
                at = slice(start, stop) if size == 1 else _places(size, m, start, stop, reach.device)
            left = self.response.left(reach.flatten(0, 1), at)  # (B·span, K, L, R, O)
            for tap in self.taps:
                use = tap.tap
                right = None if use.inputs is None else use.inputs[at]
                if use.index is not None:
                    self._spread(stores, use.name, use.index[at], left, right)
                    continue
                rows = left.reshape(size, (stop - start) * length, r * o)
                factors = _ones(rows) if right is None else right.reshape(size, rows.shape[1], right.shape[3])
                stores.add(use.name, slice(None), rows, factors, use.transposed)

    def _add_by_rows(self, stores: Stores) -> None:
        """The same for influences all rows of which grow: some rows at a time, so that each is written once."""
        size, m, r = self.reach.shape[0], self.reach.shape[1], self.reach.shape[2] - 1
        _, length, o = self.taps[0].tap.shape
        reach = self.reach.flatten(0, 1)
        for start, stop in _spans(r, size * m * length * o, _ROWS_CHUNK, _LEAST_ROWS):
            left = self.response.left(reach[:, start:stop], slice(None))
            left = left.reshape(size, m * length, (stop - start) * o)
            for tap in self.taps:
                right = tap.tap.inputs
                factors = _ones(left) if right is None else right.reshape(size, m * length, right.shape[3])
                stores.add(tap.tap.name, slice(None), left, factors, tap.tap.transposed, slice(start, stop))

    def _spread(self, stores: Stores, name: str, index: Tensor, left: Tensor, right: Tensor | None) -> None:
        """Slices picked from a parameter that is kept whole."""
        size, slices, k = self.reach.shape[0], self.slices[name], index.shape[1]
        r = left.shape[3]
        owner = (
            torch.arange(size, device=left.device).repeat_interleave(index.shape[0] // size)[:, None] * slices + index
        )
        used, place = owner.flatten().unique(return_inverse=True)
        if right is not None:
            right = right.expand(-1, k, -1, -1).flatten(0, 1)
        born = segment_products(left.flatten(0, 1).transpose(1, 2), right, place, used.numel())
        whole = left.new_zeros(size, r, slices, born.shape[2] * born.shape[3])
        whole[used // slices, :, used % slices] = born.flatten(2)
        stores.add_dense(name, whole.flatten(2))


@dataclass(frozen=True, slots=True)
class SlicedImmediate:
    """What is born through one linear map of parameters that are kept slice by slice.

    Attributes:
        taps, response, reach: as for ``DenseImmediate``; the response is dense.
        place: LongTensor (E,), which of the active slices each entry belongs to, an entry being a slice used by a
            sample at a step.
        at: LongTensor (E,), which of the N samples it is. which: LongTensor (E,), its place in tap.index, or the slice
            itself where the whole parameter was used.
        count: how many active slices there are.
    """

    taps: Sequence[LinearTap]
    response: DenseOutputJacobian
    reach: Tensor
    place: Tensor
    at: Tensor
    which: Tensor
    count: int

    def add_to(self, stores: Stores) -> None:
        """Add it, in place. Cost: for each weight and entry ``R·O·I·L`` multiply-adds, and once ``left``."""
        r = self.reach.shape[2] - 1
        reach = self.reach.flatten(0, 1)
        use = self.taps[0].tap
        _, length, o = use.shape
        o = 1 if use.index is None and not use.transposed else o
        if not r * length:
            return
        order = self.place.argsort(stable=True)
        sizes = torch.bincount(self.place, minlength=self.count).tolist()
        for keys, entries, longest in _batches(sizes, max(1, _CHUNK // max(1, length * r * o))):
            table, there = _table(order, sizes[keys], entries, longest)
            at, which = self.at[table], self.which[table]
            left = self.response_of(at, which).left(reach[at, :-1], slice(None))
            left = left.reshape(len(sizes[keys]), longest * length, r * o)
            for tap in self.taps:
                right = self._right(tap, at, which)
                right = left.new_ones(at.numel(), length, 1) if right is None else right
                if there is not None:
                    right = right * there.to(right.dtype)[:, None, None]
                stores.add(tap.tap.name, keys, left, right.reshape(left.shape[0], longest * length, right.shape[2]))

    def response_of(self, at: Tensor, which: Tensor) -> DenseOutputJacobian:
        """The response of each entry's own part of z: (W, E, 1, L, O)."""
        use, values = self.taps[0].tap, self.response.values
        if use.index is not None:
            return DenseOutputJacobian(values[:, at, which].unsqueeze(2))
        if use.transposed:
            return DenseOutputJacobian(values[:, at])
        return DenseOutputJacobian(values[:, at, 0, :, which].permute(1, 0, 2)[:, :, None, :, None])

    @staticmethod
    def _right(tap: LinearTap, at: Tensor, which: Tensor) -> Tensor | None:
        """Each entry's own part of the inputs, (E, L, I); None for ones."""
        use = tap.tap
        if use.inputs is None:
            return None
        if use.index is not None:
            return use.inputs[at, which] if use.inputs.shape[1] > 1 else use.inputs[at, 0]
        if use.transposed:
            return use.inputs[at, 0, :, which].unsqueeze(2)
        return use.inputs[at, 0]


def births(
    group: Linearization, reach: Tensor, keys: Mapping[str, Tensor], slices: Mapping[str, int]
) -> list[DenseImmediate | SlicedImmediate]:
    """What the taps of a group give birth to.

    Args:
        reach: (B, m, R + 1, W), see ``rtrl._engine.reverse_sweep``.
        keys: for each parameter kept slice by slice, ascending ``sample · slices + slice`` of what the block used.
        slices: parameter name → size of its first dimension.

    Raises:
        SparsityError: a slice was used that was not declared active.
    """
    size, m = reach.shape[:2]
    found: list[DenseImmediate | SlicedImmediate] = []
    shared: dict[int, list[LinearTap]] = {}  # by what they share: z
    for tap in group.taps:
        if tap.response is not None and tap.tap.name not in group.general:
            shared.setdefault(id(tap.response), []).append(tap)
    for taps in shared.values():
        whole = [tap for tap in taps if tap.tap.name not in keys]
        if whole:
            assert whole[0].response is not None
            found.append(DenseImmediate(whole, whole[0].response, reach, slices))
        alike: list[tuple[Tensor, Tensor, list[LinearTap]]] = []
        for tap in taps:
            name = tap.tap.name
            if name not in keys:
                continue
            used = _used(group, tap, slices[name], (size, m))
            for index, own, others in alike:
                if torch.equal(index, used) and torch.equal(own, keys[name]):
                    others.append(tap)
                    break
            else:
                alike.append((used, keys[name], [tap]))
        found.extend(_sliced(others, reach, index, own, slices) for index, own, others in alike)
    return found


def _sliced(
    taps: list[LinearTap], reach: Tensor, index: Tensor, keys: Tensor, slices: Mapping[str, int]
) -> SlicedImmediate:
    size, m = reach.shape[:2]
    use, response = taps[0].tap, taps[0].response
    if not isinstance(response, DenseOutputJacobian):
        raise SparsityError(f"parameter {use.name!r} is active slice by slice, which an analytic step cannot be")
    k = index.shape[1]
    at = torch.arange(size * m, device=reach.device).repeat_interleave(k)
    owner = at // m * slices[use.name] + index.flatten()
    place = torch.searchsorted(keys, owner).clamp(max=max(keys.numel() - 1, 0))
    if owner.numel() and not bool((keys[place] == owner).all()):
        raise SparsityError(f"a slice of parameter {use.name!r} was used that Sparsity.active does not declare")
    which = torch.arange(k, device=reach.device).repeat(size * m) if use.index is not None else index.flatten()
    return SlicedImmediate(taps, response, reach, place, at, which, keys.numel())


def _used(group: Linearization, tap: LinearTap, slices: int, lead: tuple[int, int]) -> Tensor:
    """The slices that a use touches, (N, k); where it takes the whole parameter, those declared active, no others."""
    use = tap.tap
    if use.index is not None:
        return use.index
    index = active(group, use.name, slices, lead[0], use.output.device).flatten(0, 1)
    if use.transposed and use.inputs is None:
        raise SparsityError(f"parameter {use.name!r} has no slices along its first dimension")
    values = (
        use.inputs if use.transposed else tap.response.values if isinstance(tap.response, DenseOutputJacobian) else None
    )
    if values is not None and int(values.count_nonzero()) != _count(values, index):
        raise SparsityError(f"a slice of parameter {use.name!r} was used that Sparsity.active does not declare")
    return index


def _count(values: Tensor, index: Tensor) -> int:
    """How many entries of values (..., N, 1, L, slices) are not zero in each sample's own slices."""
    wide = index[:, None, None, :].expand(*values.shape[:-1], -1)
    return int(values.gather(values.ndim - 1, wide).count_nonzero())


def active(group: Linearization, name: str, slices: int, size: int, device: torch.device) -> Tensor:
    """The slices of a parameter that were active, (B, m, k): all of them at steps that do not name it."""
    declared = group.active.get(name) if slices > 1 else None
    if declared is not None:
        return declared
    return torch.arange(slices, device=device).expand(size, len(group.times), -1)


def may_overflow(birth: DenseImmediate | SlicedImmediate, largest_reach: Tensor) -> bool:
    """Whether a bound, from the largest factors, leaves it open that a sum overflows; NaN leaves it open, too.

    Args:
        largest_reach: the largest absolute value in ``birth.reach``.
    """
    reach = birth.reach
    kind = torch.finfo(reach.dtype)
    m, w = reach.shape[1], reach.shape[3]
    k, length, _ = birth.taps[0].tap.shape
    inputs = [largest(tap.tap.inputs) for tap in birth.taps if tap.tap.inputs is not None]
    factors = torch.stack([largest_reach, birth.response.largest(), *inputs]).tolist()
    bound = float(m * k * length * w) * factors[0] * factors[1] * max([1.0, *factors[2:]])
    return not bound < kind.max / 16


def _ones(rows: Tensor) -> Tensor:
    return rows.new_ones(1, 1, 1).expand(rows.shape[0], rows.shape[1], 1)


def _spans(count: int, numbers: int, chunk: int, least: int = 1) -> Iterator[tuple[int, int]]:
    span = max(least, chunk // max(1, numbers))
    return ((start, min(start + span, count)) for start in range(0, count, span))


def _places(size: int, m: int, start: int, stop: int, device: torch.device) -> Tensor:
    return (torch.arange(size, device=device)[:, None] * m + torch.arange(start, stop, device=device)).flatten()


def _batches(sizes: list[int], limit: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut the sorted entries of consecutive keys into batches of about ``limit`` entries, padding included: (keys,
    entries, the most entries of a key in it)."""
    key, entry = 0, 0
    while key < len(sizes):
        stop, longest, total = key + 1, sizes[key], sizes[key]
        while stop < len(sizes) and (stop + 1 - key) * max(longest, sizes[stop]) <= limit:
            longest, total, stop = max(longest, sizes[stop]), total + sizes[stop], stop + 1
        if longest > limit:  # then it is one key
            for start in range(0, longest, limit):
                span = min(limit, longest - start)
                yield slice(key, key + 1), slice(entry + start, entry + start + span), span
        elif longest:
            yield slice(key, stop), slice(entry, entry + total), longest
        key, entry = stop, entry + total


def _table(order: Tensor, sizes: list[int], entries: slice, longest: int) -> tuple[Tensor, Tensor | None]:
    """The entries of a batch, key by key and padded (count·longest,), and which of these are there (None: all)."""
    if len(sizes) * longest == entries.stop - entries.start:
        return order[entries], None
    counts = torch.tensor(sizes, device=order.device)
    inside = torch.arange(longest, device=order.device)
    there = inside < counts[:, None]
    first = entries.start + counts.cumsum(0) - counts
    return order[torch.where(there, first[:, None] + inside, entries.start).flatten()], there.flatten()
