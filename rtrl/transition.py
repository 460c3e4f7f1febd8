"""The affine monoid of steps: what a run of steps does to a sleeping influence, and what it is owed for it.

One element maps the influence S at its start to ``Φ S`` at its end and to the gradient ``v S`` earned on the way;
``(Φ₁, v₁)`` then ``(Φ₂, v₂)`` is ``(Φ₂ Φ₁, v₁ + v₂ Φ₁)``. Elements are row-sparse, per sample: Φ is the identity
outside ``rows``, and the rows it changes depend on ``cols`` alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtrl import _rows


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

    def apply(self, influence: Tensor, sample: Tensor | None) -> Tensor:
        """``Φ S`` for influences (R, H, p) of the samples ``sample`` (LongTensor (R,); None: R = B, in order), out of
        place."""
        jacobian = _rows.pick(self.jacobian, sample)
        rows, cols = _rows.pick(self.rows, sample), _rows.pick(self.cols, sample)
        if rows is None:
            return torch.bmm(jacobian, influence)
        slots = influence.unflatten(1, (self.n, self.width))
        changed = torch.bmm(jacobian, _rows.take(slots, cols).flatten(1, 2))
        return _rows.put(slots, rows, changed.unflatten(1, (-1, self.width))).flatten(1, 2)

    def pull(self, functional: Tensor | None, *, earn: bool = True) -> Tensor:
        """``v + w Φ`` for a row functional w (B, H), None meaning zero; with ``earn=False``, ``w Φ`` alone."""
        if functional is None:
            functional = self.adjoint.new_zeros(self.jacobian.shape[0], self.n * self.width)
        slots = functional.unflatten(1, (self.n, self.width))
        through = torch.bmm(_rows.take(slots, self.rows).flatten(1).unsqueeze(1), self.jacobian).squeeze(1)
        if earn:
            through = through + self.adjoint
        if self.rows is None:
            return through
        return _rows.add(_rows.zero(slots, self.rows), self.cols, through.unflatten(1, (-1, self.width))).flatten(1)

    def square(self) -> Tensor:
        """Φ written out over the whole state: (B, H, H)."""
        if self.rows is None:
            return self.jacobian
        size, full = self.jacobian.shape[0], self.n * self.width
        changed = self.jacobian
        if self.cols is not None:
            blocks = changed.unflatten(2, (-1, self.width)).transpose(1, 2)
            spread = changed.new_zeros(size, self.n, changed.shape[1], self.width)
            changed = _rows.put(spread, self.cols, blocks).transpose(1, 2).flatten(2)
        eye = torch.eye(full, dtype=changed.dtype, device=changed.device).expand(size, full, full)
        return _rows.put(
            eye.unflatten(1, (self.n, self.width)), self.rows, changed.unflatten(1, (-1, self.width))
        ).flatten(1, 2)

    def within(self, cols: Tensor | None) -> "Transition":
        """The same element, counted in the rows ``cols`` alone (a superset of its own columns; None: all)."""
        if cols is None:
            return self
        places = _rows.locate(cols, self.n)
        rows, own = (None if t is None else places.gather(1, t) for t in (self.rows, self.cols))
        return replace(self, rows=rows, cols=own, n=cols.shape[1])


def flushed(product: Tensor, out: Tensor | None = None) -> Tensor:
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


def compose(first: Transition, then: Transition) -> Transition:
    """``first``, followed by ``then``: ``(Φ₂ Φ₁, v₁ + v₂ Φ₁)``; rows and columns grow only as they must.

    Cost: ``u₂·c₂·c·width³`` multiply-adds a sample, c the columns of the result.
    """
    n, width = first.n, first.width
    rows = _rows.members(_rows.union(first.rows, then.rows, n))
    cols = None if rows is None else _rows.members(_rows.union(_rows.union(first.cols, then.cols, n), rows, n))
    one, two = first.within(cols), then.within(cols)
    jacobian = flushed(two.apply(one.square(), None))
    adjoint = one.pull(two.pull(None))
    if rows is not None:
        inside = rows if cols is None else _rows.locate(cols, n).gather(1, rows)
        jacobian = _rows.take(jacobian.unflatten(1, (-1, width)), inside).flatten(1, 2)
    return Transition(rows, cols, jacobian, adjoint, n, width)
