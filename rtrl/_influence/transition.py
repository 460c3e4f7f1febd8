"""Transitions: how blocks of steps transform a dormant influence, and the gradient that it contributes meanwhile.

A transition ``(Φ, v)`` maps the influence S at its start to ``Φ S`` at its end and contributes ``v S`` to the gradient.
Transitions form a monoid: ``(Φ₁, v₁)`` followed by ``(Φ₂, v₂)`` is ``(Φ₂ Φ₁, v₁ + v₂ Φ₁)``. They are row-sparse, per
sample: Φ is the identity outside ``rows``, and the rows it changes depend on ``cols`` alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtrl._utils import index_sets


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where the numbers of a transition are, and what it costs: known without computing it.

    Attributes:
        rows, cols, n, width: as in ``Transition``.
        size: B.
        compose_macs: multiply-adds of the composition that makes it, all samples together; 0 for a single block.
    """

    rows: Tensor | None
    cols: Tensor | None
    n: int
    width: int
    size: int
    compose_macs: int = 0

    @property
    def u(self) -> int:
        """How many rows of the state are changed."""
        return self.n if self.rows is None else self.rows.shape[1]

    @property
    def c(self) -> int:
        """How many rows of the state are read."""
        return self.n if self.cols is None else self.cols.shape[1]

    @property
    def apply_macs(self) -> int:
        """Multiply-adds to apply Φ to one column of one sample's influence."""
        return self.u * self.c * self.width**2


@dataclass(frozen=True, slots=True)
class Transition:
    """``(Φ, v)`` of consecutive blocks, for every sample of a batch, over a state of ``n`` rows of ``width`` entries.

    Attributes:
        rows: LongTensor (B, u), the rows Φ may change, or None for all. No index occurs twice in a sample.
        cols: LongTensor (B, c), a superset of ``rows``, or None for all: the rows of the state that Φ's rows and v
            depend on.
        jacobian: (B, u·width, c·width), Φ restricted to these; outside them Φ is the identity.
        adjoint: (B, c·width), v restricted to ``cols``; zero elsewhere.
        n: rows of the state.
        width: entries per row; H = n · width.
    """

    rows: Tensor | None
    cols: Tensor | None
    jacobian: Tensor
    adjoint: Tensor
    n: int
    width: int

    @property
    def pattern(self) -> Pattern:
        """Where its numbers are."""
        return Pattern(self.rows, self.cols, self.n, self.width, self.jacobian.shape[0])

    @property
    def apply_macs(self) -> int:
        """Multiply-adds to apply Φ to one column of one sample's influence."""
        return self.pattern.apply_macs

    def apply(self, influence: Tensor) -> Tensor:
        """Return ``Φ S`` for an influence S (B, H, p)."""
        return self.apply_(influence.clone())

    def apply_(self, influence: Tensor) -> Tensor:
        """Replace an influence S (B, H, p) by ``Φ S``, in place; it may be a view."""
        slots = influence.unflatten(1, (self.n, self.width))
        sample = torch.arange(len(influence), device=influence.device)[:, None]
        read = influence if self.cols is None else slots[sample, self.cols].flatten(1, 2)
        changed = torch.bmm(self.jacobian, read)
        if self.rows is None:
            influence.copy_(changed)
        else:
            slots[sample, self.rows] = changed.unflatten(1, (-1, self.width))
        return influence

    def pull_back(self, cotangent: Tensor | None, *, with_adjoint: bool = True) -> Tensor:
        """Return ``v + w Φ`` for a cotangent w (B, H), None meaning zero; without the adjoint, ``w Φ`` alone."""
        if cotangent is None:
            zero = self.adjoint.new_zeros(self.jacobian.shape[0], self.n, self.width)
            adjoint = self.adjoint.unflatten(1, (-1, self.width)) * with_adjoint
            return index_sets.scatter(zero, self.cols, adjoint).flatten(1)
        slots = cotangent.unflatten(1, (self.n, self.width))
        product = torch.bmm(index_sets.gather(slots, self.rows).flatten(1).unsqueeze(1), self.jacobian).squeeze(1)
        if with_adjoint:
            product = product + self.adjoint
        if self.rows is None:
            return product
        unchanged = index_sets.zero(slots, self.rows)
        return index_sets.scatter_add(unchanged, self.cols, product.unflatten(1, (-1, self.width))).flatten(1)

    def pull_back_rows(self, cotangents: Tensor) -> Tensor:
        """Return ``W Φ`` for L cotangents of each sample, W (B, L, H)."""
        slots = cotangents.transpose(1, 2).unflatten(1, (self.n, self.width))  # (B, n, width, L)
        read = index_sets.gather(slots, self.rows).flatten(1, 2)
        product = torch.bmm(self.jacobian.transpose(1, 2), read)
        if self.rows is not None:
            unchanged = index_sets.zero(slots, self.rows)
            product = index_sets.scatter_add(unchanged, self.cols, product.unflatten(1, (-1, self.width))).flatten(1, 2)
        return product.transpose(1, 2)

    def select_samples(self, samples: Tensor | None) -> "Transition":
        """Return the transition of these samples of the batch (LongTensor); None for all."""
        if samples is None:
            return self
        rows, cols = (index_sets.select_samples(t, samples) for t in (self.rows, self.cols))
        return replace(self, rows=rows, cols=cols, jacobian=self.jacobian[samples], adjoint=self.adjoint[samples])

    def within(self, cols: Tensor | None) -> "Transition":
        """Return the same map over the state rows ``cols`` alone (a superset of its own columns; None: all)."""
        if cols is None:
            return self
        places = index_sets.positions(cols, self.n)
        rows, local = (None if t is None else places.gather(1, t) for t in (self.rows, self.cols))
        return replace(self, rows=rows, cols=local, n=cols.shape[1])


def flush_subnormals(product: Tensor, out: Tensor | None = None) -> Tensor:
    """Set the entries of a product of Jacobians that are close to subnormal numbers, below tiny / eps, to zero.

    Products of contracting Jacobians end there, and a CPU multiplies subnormal numbers many times slower than others.
    The entries cut off are below 1e-31 (float32) or 1e-292 (float64).
    """
    limits = torch.finfo(product.dtype)
    if out is None:
        return torch.nn.functional.hardshrink(product, limits.tiny / limits.eps)
    flushed: Tensor = torch.ops.aten.hardshrink.out(product, limits.tiny / limits.eps, out=out)
    return flushed


def identity(batch_size: int, n: int, width: int, like: Tensor) -> Transition:
    """Return the transition of no steps, ``(I, 0)``: no rows, no columns."""
    none = torch.empty(batch_size, 0, dtype=torch.int64, device=like.device)
    return Transition(none, none, like.new_zeros(batch_size, 0, 0), like.new_zeros(batch_size, 0), n, width)


def compose_patterns(first: Pattern, second: Pattern) -> Pattern:
    """Return the pattern of ``compose(first, second)``; rows and columns grow only as they must."""
    n, width = first.n, first.width
    rows = index_sets.mask_to_indices(index_sets.union(first.rows, second.rows, n))
    cols = None
    if rows is not None:
        cols = index_sets.mask_to_indices(index_sets.union(index_sets.union(first.cols, second.cols, n), rows, n))
    macs = first.size * (second.u * _changed_columns(first, second)[1] * first.c * width**3 + first.apply_macs)
    return Pattern(rows, cols, n, width, first.size, macs)


def _changed_columns(first: Pattern, second: Pattern) -> tuple[Tensor | None, int]:
    """The columns of ``second`` that ``first`` has changed, as positions in ``second.cols``, and their largest number
    per sample; None means all. Samples with fewer are filled up with other positions."""
    if first.rows is None:
        return None, second.c
    if second.cols is None:
        return first.rows, first.u
    changed = index_sets.mask(first.rows, first.n).gather(1, second.cols)
    places = index_sets.mask_to_indices(changed)
    return places, second.c if places is None else places.shape[1]


def compose(first: Transition, second: Transition) -> Transition:
    """Return ``first`` followed by ``second``: ``(Φ₂ Φ₁, v₁ + v₂ Φ₁)``; rows and columns grow only as they must.

    Only the columns of Φ₂ that Φ₁ has changed are multiplied; the other columns of its rows, and the rows of Φ₁ that Φ₂
    leaves alone, are copied to their places.

    Cost: per sample, ``u₂·q·c₁·width³ + u₁·c₁·width²`` multiply-adds, q ≤ min(c₂, u₁) the rows that Φ₁ changes and Φ₂
    reads; memory for the result and the product of ``u₂·width`` by ``c₁·width``.
    """
    n, width, size = first.n, first.width, first.jacobian.shape[0]
    adjoint = first.pull_back(second.pull_back(None))
    if first.rows is None and second.rows is None:
        return Transition(None, None, flush_subnormals(torch.bmm(second.jacobian, first.jacobian)), adjoint, n, width)
    pattern = compose_patterns(first.pattern, second.pattern)
    changed_cols, _ = _changed_columns(first.pattern, second.pattern)

    # The rows of Φ₁ that Φ₂ reads, and the columns of Φ₂ that read them.
    columns = second.jacobian.unflatten(2, (-1, width)).transpose(1, 2)  # (B, c₂, u₂·width, width)
    factor = first.jacobian.unflatten(1, (-1, width))  # (B, u₁, width, c₁·width)
    if first.rows is None:
        factor = index_sets.gather(factor, second.cols)
        unchanged = torch.zeros_like(columns)
    else:
        changed = index_sets.mask(first.rows, n)
        read = changed if second.cols is None else changed.gather(1, second.cols)
        rows = first.rows  # those that Φ₂ reads and Φ₁ changes
        if second.cols is not None:
            rows = second.cols if changed_cols is None else second.cols.gather(1, changed_cols)
        factor = index_sets.gather(factor, index_sets.positions(first.rows, n).gather(1, rows))
        factor = factor.masked_fill(~changed.gather(1, rows)[:, :, None, None], 0.0)
        unchanged = columns.masked_fill(read[:, :, None, None], 0.0)
    product = torch.bmm(index_sets.gather(columns, changed_cols).transpose(1, 2).flatten(2), factor.flatten(1, 2))

    # The rows of Φ₂ over the columns of the result: those that it reads unchanged, and the product.
    c, inside = pattern.c, None if pattern.cols is None else index_sets.positions(pattern.cols, n)

    def local(index: Tensor | None) -> Tensor | None:
        return index if index is None or inside is None else inside.gather(1, index)

    def spread(blocks: Tensor, cols: Tensor | None) -> Tensor:
        """(B, k, m, width), its columns in front, over all c columns."""
        wide = blocks.new_zeros(size, c, *blocks.shape[2:])
        return index_sets.scatter(wide, None if blocks.shape[1] == c and cols is None else local(cols), blocks)

    second_rows = spread(unchanged, second.cols)
    product = product.unflatten(2, (-1, width)).transpose(1, 2)
    second_rows = index_sets.scatter_add(second_rows, local(first.cols), product)
    second_rows = second_rows.transpose(1, 2).flatten(2)  # (B, u₂·width, c·width)
    if second.rows is None:
        return Transition(None, None, flush_subnormals(second_rows), adjoint, n, width)
    first_rows = spread(first.jacobian.unflatten(2, (-1, width)).transpose(1, 2), first.cols)
    first_rows = first_rows.transpose(1, 2).flatten(2)
    if first.rows is None:
        out = index_sets.scatter(
            first_rows.unflatten(1, (-1, width)), second.rows, second_rows.unflatten(1, (-1, width))
        )
        return Transition(None, None, flush_subnormals(out.flatten(1, 2)), adjoint, n, width)

    places = None if pattern.rows is None else index_sets.positions(pattern.rows, n)
    device = second_rows.device
    diagonal = torch.arange(n, device=device).expand(size, -1) if pattern.rows is None else local(pattern.rows)
    out = second_rows.new_zeros(size, pattern.u, width, c, width)  # rows that only fill up stay those of the identity
    sample, place = torch.arange(size, device=device)[:, None], torch.arange(pattern.u, device=device)
    out[sample, place, :, diagonal] = torch.eye(width, dtype=second_rows.dtype, device=device)
    out = out.flatten(3)
    for index, part in ((first.rows, first_rows), (second.rows, second_rows)):
        index = index if places is None else places.gather(1, index)
        out = index_sets.scatter(out, index, part.unflatten(1, (-1, width)))
    if pattern.cols is not None:
        adjoint = index_sets.gather(adjoint.unflatten(1, (n, width)), pattern.cols).flatten(1)
    return Transition(pattern.rows, pattern.cols, flush_subnormals(out.flatten(1, 2)), adjoint, n, width)
