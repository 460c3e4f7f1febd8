"""Accumulate the block's immediate influence ``Σ_τ C_τ B_τ`` directly into the stored influence.

A tap's immediate Jacobian, carried to the block's end, is ``(C_τ ∂h_next/∂z) ⊗ u``: for a whole block, one matrix
product per weight, or per active slice of it. Nothing else of the influence's size is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtrl._engine.linearization import (
    DenseOutputJacobian,
    Linearization,
    LinearizedTap,
    OutputJacobian,
    UnitwiseOutputJacobian,
)
from rtrl._engine.taps import Tap, segment_products
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.errors import SparsityError

# Numbers of ``C_τ ∂h_next/∂z`` that are written out at a time: of slices, and of rows of the state, few enough of these
# to stay in a processor's cache.
_CHUNK = 2**22
_ROWS_CHUNK = 2**20
_LEAST_ROWS = 8
_LEAST_ROWS_DENSE = 64  # for fewer, each matrix of an output Jacobian is read for too little work


@dataclass(frozen=True, slots=True)
class InfluenceWriter:
    """Adds to the stored influences.

    Attributes:
        influences: name → influence.
        rows: name → LongTensor (R,) on the CPU, the rows of the influence that stand for the block's active slices.
        block: the block's transition.
    """

    influences: Mapping[str, ParameterInfluence]
    rows: Mapping[str, Tensor]
    block: Transition

    def add_products(
        self, name: str, which: slice, left: Tensor, right: Tensor, transposed: bool = False, part: slice = slice(None)
    ) -> None:
        """Add ``leftᵀ right`` to the rows ``which`` of a parameter: left (C, X, R·O), right (C, X, I), R being the
        entries ``part`` of those that the block writes."""
        self.influences[name].add_products(self.rows[name][which], self.block, left, right, transposed, part)

    def add(self, name: str, immediate: Tensor, part: slice = slice(None)) -> None:
        """Add (rows, R, p) to all rows of a parameter."""
        self.influences[name].add(self.rows[name], self.block, immediate, part)

    def parts(self, count: int, numbers: int, least: int) -> Iterator[slice]:
        """Cut the ``count`` entries of the state that the block writes into parts that fit a processor's cache, if each
        entry takes this many numbers; a part holds ``least`` entries at least, and whole slots unless the block writes
        all."""
        slot_size = 1 if self.block.rows is None else self.block.width
        span = max(least, _ROWS_CHUNK // max(1, numbers))
        span = -(-span // slot_size) * slot_size
        return (slice(start, min(start + span, count)) for start in range(0, count, span))


@dataclass(frozen=True, slots=True)
class DenseImmediate:
    """The immediate influence through one linear map z = W u, of parameters that are kept whole.

    Attributes:
        taps: the uses with this z.
        output_jacobian: ``∂h_next/∂z``.
        cotangents: (B, m, R + 1, W), see ``reverse_sweep``.
        slices: parameter name → size of its first dimension.
    """

    taps: Sequence[LinearizedTap]
    output_jacobian: OutputJacobian
    cotangents: Tensor
    slices: Mapping[str, int]

    def add_to(self, writer: InfluenceWriter) -> None:
        """Add it, some rows of the state at a time, so that each is written once. Cost: per sample and weight,
        ``m·R·O·I·K·L`` multiply-adds; and the vector–Jacobian products."""
        size, m, r = self.cotangents.shape[0], self.cotangents.shape[1], self.cotangents.shape[2] - 1
        k, length, o = self.taps[0].use.shape
        cotangents = self.cotangents.flatten(0, 1)
        least = _LEAST_ROWS_DENSE if isinstance(self.output_jacobian, DenseOutputJacobian) else _LEAST_ROWS
        for part in writer.parts(r if length else 0, size * m * k * length * o, least):
            left = self.output_jacobian.vjp(cotangents[:, part])  # (N, K, L, R, O)
            for tap in self.taps:
                if tap.use.index is not None:
                    writer.add(tap.name, self._by_slice(tap, tap.use.index, left), part)
                    continue
                rows = left.reshape(size, m * length, -1)
                right = left.new_ones(1).expand(size, m * length, 1) if tap.use.inputs is None else tap.use.inputs
                right = right.reshape(size, m * length, right.shape[-1])
                writer.add_products(tap.name, slice(None), rows, right, tap.use.transposed, part)

    def _by_slice(self, tap: LinearizedTap, index: Tensor, left: Tensor) -> Tensor:
        """The immediate influence (B, R, p) through slices that were picked from a parameter that is kept whole."""
        size, slices, k = self.cotangents.shape[0], self.slices[tap.name], index.shape[1]
        first = torch.arange(size, device=left.device).repeat_interleave(index.shape[0] // size)[:, None] * slices
        used, place = (first + index).flatten().unique(return_inverse=True)
        right = None if tap.use.inputs is None else tap.use.inputs.expand(-1, k, -1, -1).flatten(0, 1)
        products = segment_products(left.flatten(0, 1).transpose(1, 2), right, place, used.numel())
        immediate = left.new_zeros(size, left.shape[3], slices, products.shape[2] * products.shape[3])
        immediate[used // slices, :, used % slices] = products.flatten(2)
        return immediate.flatten(2)


@dataclass(frozen=True, slots=True)
class SlicedImmediate:
    """The immediate influence through one linear map, of parameters that are kept slice by slice.

    An *entry* is a slice used by a sample at a step; there are E of them.

    Attributes:
        taps: the uses with this z.
        output_jacobian: ``∂h_next/∂z``.
        cotangents: (B, m, R + 1, W), see ``reverse_sweep``.
        key: LongTensor (E,), to which of the active slices an entry belongs.
        at: LongTensor (E,), to which of the N samples.
        which: LongTensor (E,), its place in ``use.index``, or the slice itself where the whole parameter was used.
        n_keys: the number of active slices.
    """

    taps: Sequence[LinearizedTap]
    output_jacobian: DenseOutputJacobian
    cotangents: Tensor
    key: Tensor
    at: Tensor
    which: Tensor
    n_keys: int

    def add_to(self, writer: InfluenceWriter) -> None:
        """Add it, in place. Cost: per weight and entry, ``R·O·I·L`` multiply-adds; and the vector–Jacobian products."""
        r = self.cotangents.shape[2] - 1
        cotangents = self.cotangents.flatten(0, 1)
        use = self.taps[0].use
        _, length, o = use.shape
        o = 1 if use.index is None and not use.transposed else o
        if not r * length:
            return
        order = self.key.argsort(stable=True)
        counts = torch.bincount(self.key, minlength=self.n_keys).tolist()
        for keys, entries, longest in _batches(counts, max(1, _CHUNK // max(1, length * r * o))):
            table, present = _padded(order, counts[keys], entries, longest)
            at, which = self.at[table], self.which[table]
            left = self._own_jacobian(at, which).vjp(cotangents[at, :-1])
            left = left.reshape(len(counts[keys]), longest * length, r * o)
            for tap in self.taps:
                right = self._own_inputs(tap, at, which)
                right = left.new_ones(at.numel(), length, 1) if right is None else right
                if present is not None:
                    right = right * present.to(right.dtype)[:, None, None]
                factors = right.reshape(left.shape[0], longest * length, right.shape[2])
                writer.add_products(tap.name, keys, left, factors)

    def _own_jacobian(self, at: Tensor, which: Tensor) -> DenseOutputJacobian:
        """The output Jacobian of each entry's part of z, (E, W, 1, L, O)."""
        use, values = self.taps[0].use, self.output_jacobian.values
        if use.index is not None:
            return DenseOutputJacobian(values[at, :, which].unsqueeze(2))
        if use.transposed:
            return DenseOutputJacobian(values[at])
        return DenseOutputJacobian(values[at, :, 0, :, which][:, :, None, :, None])

    @staticmethod
    def _own_inputs(tap: LinearizedTap, at: Tensor, which: Tensor) -> Tensor | None:
        """Each entry's part of the inputs, (E, L, I); None for ones."""
        use = tap.use
        if use.inputs is None:
            return None
        if use.index is not None:
            return use.inputs[at, which] if use.inputs.shape[1] > 1 else use.inputs[at, 0]
        if use.transposed:
            return use.inputs[at, 0, :, which].unsqueeze(2)
        return use.inputs[at, 0]


def immediate_terms(
    group: Linearization, cotangents: Tensor, keys: Mapping[str, Tensor], slices: Mapping[str, int]
) -> list[DenseImmediate | SlicedImmediate]:
    """The immediate influence through the taps of a group, one term per linear map.

    Args:
        group: the steps.
        cotangents: those of the group, see ``reverse_sweep``.
        keys: for each parameter kept slice by slice, ascending ``sample · slices + slice`` of what the block used.
        slices: parameter name → size of its first dimension.

    Raises:
        SparsityError: a slice was used that was not declared active.
    """
    terms: list[DenseImmediate | SlicedImmediate] = []
    by_output: dict[tuple[int, int], list[LinearizedTap]] = {}  # outputs may share their Jacobian
    for tap in group.taps:
        if tap.output_jacobian is None and tap.name in keys:
            used = _used_slices(group, tap, slices[tap.name], cotangents.shape[0])
            _active_places(tap.use, used, keys[tap.name], slices[tap.name], len(group.times))
        if tap.output_jacobian is not None and tap.name not in group.untapped:
            output = id(tap.use.output) if tap.name in keys else 0
            by_output.setdefault((id(tap.output_jacobian), output), []).append(tap)
    for taps in by_output.values():
        jacobian = taps[0].output_jacobian
        assert jacobian is not None
        if taps[0].name not in keys:
            terms.append(DenseImmediate(taps, jacobian, cotangents, slices))
            continue
        if isinstance(jacobian, UnitwiseOutputJacobian):
            written_out = jacobian.written_out()
            taps = [replace(tap, output_jacobian=written_out) for tap in taps]
        alike: list[tuple[Tensor, Tensor, list[LinearizedTap]]] = []
        for tap in taps:
            used = _used_slices(group, tap, slices[tap.name], cotangents.shape[0])
            for index, active_keys, others in alike:
                if torch.equal(index, used) and torch.equal(active_keys, keys[tap.name]):
                    others.append(tap)
                    break
            else:
                alike.append((used, keys[tap.name], [tap]))
        terms.extend(_sliced(others, cotangents, index, used, slices) for index, used, others in alike)
    return terms


def _sliced(
    taps: list[LinearizedTap], cotangents: Tensor, index: Tensor, keys: Tensor, slices: Mapping[str, int]
) -> SlicedImmediate:
    size, m = cotangents.shape[:2]
    use, output_jacobian = taps[0].use, taps[0].output_jacobian
    assert isinstance(output_jacobian, DenseOutputJacobian)
    k = index.shape[1]
    at = torch.arange(size * m, device=cotangents.device).repeat_interleave(k)
    key = _active_places(use, index, keys, slices[use.name], m)
    which = torch.arange(k, device=cotangents.device).repeat(size * m) if use.index is not None else index.flatten()
    return SlicedImmediate(taps, output_jacobian, cotangents, key, at, which, keys.numel())


def _active_places(use: Tap, index: Tensor, keys: Tensor, slices: int, m: int) -> Tensor:
    """Where ``sample · slices + slice`` of the slices ``index`` (N, k) that a use touches stand among the active ones.

    Raises:
        SparsityError: one is not there.
    """
    sample = torch.arange(len(index), device=index.device) // m
    entries = (sample[:, None] * slices + index).flatten()
    key = torch.searchsorted(keys, entries).clamp(max=max(keys.numel() - 1, 0))
    if entries.numel() and not bool((keys[key] == entries).all()):
        raise SparsityError(f"a slice of parameter {use.name!r} was used that Sparsity.active does not declare")
    return key


def _used_slices(group: Linearization, tap: LinearizedTap, slices: int, size: int) -> Tensor:
    """The slices that a use touches, (N, k); where it takes the whole parameter, those declared active, no others."""
    use = tap.use
    if use.index is not None:
        return use.index
    index = active(group, use.name, slices, size, use.output.device).flatten(0, 1)
    if use.transposed and use.inputs is None:
        raise SparsityError(f"parameter {use.name!r} has no slices along its first dimension")
    if use.transposed:
        values = use.inputs
    else:
        values = tap.output_jacobian.values if isinstance(tap.output_jacobian, DenseOutputJacobian) else None
    if values is not None and int(values.count_nonzero()) != _count_inside(values, index):
        raise SparsityError(f"a slice of parameter {use.name!r} was used that Sparsity.active does not declare")
    return index


def _count_inside(values: Tensor, index: Tensor) -> int:
    """The number of nonzero entries of values (N, ..., slices) in each sample's slices ``index``."""
    wide = index.view(len(index), *[1] * (values.ndim - 2), -1).expand(*values.shape[:-1], -1)
    return int(values.gather(values.ndim - 1, wide).count_nonzero())


def active(group: Linearization, name: str, slices: int, size: int, device: torch.device) -> Tensor:
    """The slices of a parameter that were active, (B, m, k): all of them at steps that do not name it."""
    declared = group.active.get(name) if slices > 1 else None
    if declared is not None:
        return declared
    return torch.arange(slices, device=device).expand(size, len(group.times), -1)


def _batches(counts: list[int], limit: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut the sorted entries of consecutive keys into batches of about ``limit`` entries, padding included: (keys,
    entries, the most entries of a key in it)."""
    key, entry = 0, 0
    while key < len(counts):
        stop, longest, total = key + 1, counts[key], counts[key]
        while stop < len(counts) and (stop + 1 - key) * max(longest, counts[stop]) <= limit:
            longest, total, stop = max(longest, counts[stop]), total + counts[stop], stop + 1
        if longest > limit:  # then it is one key
            for start in range(0, longest, limit):
                span = min(limit, longest - start)
                yield slice(key, key + 1), slice(entry + start, entry + start + span), span
        elif longest:
            yield slice(key, stop), slice(entry, entry + total), longest
        key, entry = stop, entry + total


def _padded(order: Tensor, counts: list[int], entries: slice, longest: int) -> tuple[Tensor, Tensor | None]:
    """The entries of a batch, key by key and padded, (count·longest,), and which of these are present (None: all)."""
    if len(counts) * longest == entries.stop - entries.start:
        return order[entries], None
    count = torch.tensor(counts, device=order.device)
    place = torch.arange(longest, device=order.device)
    present = place < count[:, None]
    first = entries.start + count.cumsum(0) - count
    return order[torch.where(present, first[:, None] + place, entries.start).flatten()], present.flatten()
