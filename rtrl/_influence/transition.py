"""The affine monoid of steps: what a run of steps does to a sleeping influence, and what it is owed for it.

One element maps the influence S at its start to ``Φ S`` at its end and to the gradient ``v S`` earned on the way;
``(Φ₁, v₁)`` then ``(Φ₂, v₂)`` is ``(Φ₂ Φ₁, v₁ + v₂ Φ₁)``. Elements are row-sparse, per sample: Φ is the identity
outside ``rows``, and the rows it changes depend on ``cols`` alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtrl._utils import index_sets


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where the numbers of a transition are, and so what it costs: known without any of them.

    Attributes:
        rows, cols, n, width: as of ``Transition``. size: B.
        compose_macs: multiply-adds of the composition that makes it, all samples together; 0 for a leaf.
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
    """``(Φ, v)`` of a run of steps, for every sample of a batch, over a state of ``n`` rows of ``width`` entries.

    Attributes:
        rows: LongTensor (B, u), the rows Φ may change, or None for all. No index occurs twice in a sample.
        cols: LongTensor (B, c), a superset of ``rows``, or None for all: the rows of the state that Φ's rows and v
            depend on.
        jacobian: (B, u·width, c·width), Φ restricted to these; outside them Φ is the identity.
        adjoint: (B, c·width), v restricted to ``cols``; zero elsewhere.
        n, width: the state's rows and entries a row; H = n · width.
    """

    rows: Tensor | None
    cols: Tensor | None
    jacobian: Tensor
    adjoint: Tensor
    n: int
    width: int

    @property
    def apply_macs(self) -> int:
        """Multiply-adds to apply Φ to one column of one sample's influence."""
        return self.jacobian.shape[1] * self.jacobian.shape[2]

    @property
    def pattern(self) -> Pattern:
        """Where its numbers are."""
        return Pattern(self.rows, self.cols, self.n, self.width, self.jacobian.shape[0])

    def apply(self, influence: Tensor, sample: Tensor | None) -> Tensor:
        """``Φ S`` for influences (R, H, p) of the samples ``sample`` (LongTensor (R,); None: R = B, in order), out of
        place."""
        jacobian = index_sets.select_samples(self.jacobian, sample)
        rows, cols = index_sets.select_samples(self.rows, sample), index_sets.select_samples(self.cols, sample)
        if rows is None:
            return torch.bmm(jacobian, influence)
        slots = influence.unflatten(1, (self.n, self.width))
        changed = torch.bmm(jacobian, index_sets.gather(slots, cols).flatten(1, 2))
        return index_sets.scatter(slots, rows, changed.unflatten(1, (-1, self.width))).flatten(1, 2)

    def pull(self, functional: Tensor | None, *, earn: bool = True) -> Tensor:
        """``v + w Φ`` for a row functional w (B, H), None meaning zero; with ``earn=False``, ``w Φ`` alone."""
        if functional is None:
            nothing = self.adjoint.new_zeros(self.jacobian.shape[0], self.n, self.width)
            return index_sets.scatter(nothing, self.cols, self.adjoint.unflatten(1, (-1, self.width)) * earn).flatten(1)
        slots = functional.unflatten(1, (self.n, self.width))
        through = torch.bmm(index_sets.gather(slots, self.rows).flatten(1).unsqueeze(1), self.jacobian).squeeze(1)
        if earn:
            through = through + self.adjoint
        if self.rows is None:
            return through
        return index_sets.scatter_add(
            index_sets.zero(slots, self.rows), self.cols, through.unflatten(1, (-1, self.width))
        ).flatten(1)

    def within(self, cols: Tensor | None) -> "Transition":
        """The same element, counted in the rows ``cols`` alone (a superset of its own columns; None: all)."""
        if cols is None:
            return self
        places = index_sets.positions(cols, self.n)
        rows, own = (None if t is None else places.gather(1, t) for t in (self.rows, self.cols))
        return replace(self, rows=rows, cols=own, n=cols.shape[1])


def flush_subnormals(product: Tensor, out: Tensor | None = None) -> Tensor:
    """A product of Jacobians without entries on their way to subnormal numbers: those below tiny / eps become zero.

    Products of contracting Jacobians end there, and a CPU multiplies subnormal numbers many times slower than others.
    What is cut is 1e-31 (float32) or 1e-292 (float64) of the identity that the product began with.
    """
    kind = torch.finfo(product.dtype)
    if out is None:
        return torch.nn.functional.hardshrink(product, kind.tiny / kind.eps)
    flat: Tensor = torch.ops.aten.hardshrink.out(product, kind.tiny / kind.eps, out=out)
    return flat


def identity(batch_size: int, n: int, width: int, like: Tensor) -> Transition:
    """The element of no steps, ``(I, 0)``: no rows, no columns."""
    none = torch.empty(batch_size, 0, dtype=torch.int64, device=like.device)
    return Transition(none, none, like.new_zeros(batch_size, 0, 0), like.new_zeros(batch_size, 0), n, width)


def merge(first: Pattern, then: Pattern) -> Pattern:
    """The pattern of ``compose(first, then)``; rows and columns grow only as they must."""
    n, width = first.n, first.width
    rows = index_sets.mask_to_indices(index_sets.union(first.rows, then.rows, n))
    cols = (
        None
        if rows is None
        else index_sets.mask_to_indices(index_sets.union(index_sets.union(first.cols, then.cols, n), rows, n))
    )
    macs = first.size * (then.u * _meet(first, then)[1] * first.c * width**3 + first.apply_macs)
    return Pattern(rows, cols, n, width, first.size, macs)


def _meet(first: Pattern, then: Pattern) -> tuple[Tensor | None, int]:
    """Which of ``then``'s columns ``first`` has changed, as places in ``then.cols``, and the largest count of a sample;
    None means all. Samples with fewer are filled up with other places."""
    if first.rows is None:
        return None, then.c
    if then.cols is None:
        return first.rows, first.u
    met = index_sets.mask(first.rows, first.n).gather(1, then.cols)
    places = index_sets.mask_to_indices(met)
    return places, then.c if places is None else places.shape[1]


def compose(first: Transition, then: Transition) -> Transition:
    """``first``, followed by ``then``: ``(Φ₂ Φ₁, v₁ + v₂ Φ₁)``; rows and columns grow only as they must.

    Only the columns of Φ₂ that Φ₁ has changed are multiplied; the others of its rows, and the rows of Φ₁ that Φ₂ leaves
    alone, are put where they belong.

    Cost: a sample, ``u₂·q·c₁·width³ + u₁·c₁·width²`` multiply-adds, q ≤ min(c₂, u₁) the rows that Φ₁ changes and Φ₂
    reads; memory for the result and the product of ``u₂·width`` by ``c₁·width``.
    """
    n, width, size = first.n, first.width, first.jacobian.shape[0]
    adjoint = first.pull(then.pull(None))
    if first.rows is None and then.rows is None:
        return Transition(None, None, flush_subnormals(torch.bmm(then.jacobian, first.jacobian)), adjoint, n, width)
    pattern = merge(first.pattern, then.pattern)
    met, _ = _meet(first.pattern, then.pattern)

    # What Φ₁ makes of the rows that Φ₂ reads, and the columns of Φ₂ that read them.
    old = then.jacobian.unflatten(2, (-1, width)).transpose(1, 2)  # (B, c₂, u₂·width, width)
    made = first.jacobian.unflatten(1, (-1, width))  # (B, u₁, width, c₁·width)
    if first.rows is None:
        made = index_sets.gather(made, then.cols)
        kept = torch.zeros_like(old)
    else:
        changed = index_sets.mask(first.rows, n)
        read = changed if then.cols is None else changed.gather(1, then.cols)
        rows = first.rows  # those that Φ₂ reads and Φ₁ changes
        if then.cols is not None:
            rows = then.cols if met is None else then.cols.gather(1, met)
        made = index_sets.gather(made, index_sets.positions(first.rows, n).gather(1, rows))
        made = made.masked_fill(~changed.gather(1, rows)[:, :, None, None], 0.0)
        kept = old.masked_fill(read[:, :, None, None], 0.0)
    product = torch.bmm(index_sets.gather(old, met).transpose(1, 2).flatten(2), made.flatten(1, 2))

    # Rows of Φ₂ over the columns of the result: what it reads unchanged, and the product.
    c, inside = pattern.c, None if pattern.cols is None else index_sets.positions(pattern.cols, n)

    def local(index: Tensor | None) -> Tensor | None:
        return index if index is None or inside is None else inside.gather(1, index)

    def spread(blocks: Tensor, cols: Tensor | None) -> Tensor:
        """(B, k, m, width), its columns in front, over all c columns."""
        wide = blocks.new_zeros(size, c, *blocks.shape[2:])
        return index_sets.scatter(wide, None if blocks.shape[1] == c and cols is None else local(cols), blocks)

    late = spread(kept, then.cols)
    late = index_sets.scatter_add(late, local(first.cols), product.unflatten(2, (-1, width)).transpose(1, 2))
    late = late.transpose(1, 2).flatten(2)  # (B, u₂·width, c·width)
    if then.rows is None:
        return Transition(None, None, flush_subnormals(late), adjoint, n, width)
    early = spread(first.jacobian.unflatten(2, (-1, width)).transpose(1, 2), first.cols).transpose(1, 2).flatten(2)
    if first.rows is None:
        out = index_sets.scatter(early.unflatten(1, (-1, width)), then.rows, late.unflatten(1, (-1, width)))
        return Transition(None, None, flush_subnormals(out.flatten(1, 2)), adjoint, n, width)

    places = None if pattern.rows is None else index_sets.positions(pattern.rows, n)
    device = late.device
    own = torch.arange(n, device=device).expand(size, -1) if pattern.rows is None else local(pattern.rows)
    out = late.new_zeros(size, pattern.u, width, c, width)  # rows that only fill up stay those of the identity
    sample, place = torch.arange(size, device=device)[:, None], torch.arange(pattern.u, device=device)
    out[sample, place, :, own] = torch.eye(width, dtype=late.dtype, device=device)
    out = out.flatten(3)
    for index, part in ((first.rows, early), (then.rows, late)):
        out = index_sets.scatter(
            out, index if places is None else places.gather(1, index), part.unflatten(1, (-1, width))
        )
    if pattern.cols is not None:
        adjoint = index_sets.gather(adjoint.unflatten(1, (n, width)), pattern.cols).flatten(1)
    return Transition(pattern.rows, pattern.cols, flush_subnormals(out.flatten(1, 2)), adjoint, n, width)
