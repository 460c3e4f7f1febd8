"""The reverse sweep through a block, group by group of independent rows.

With ``J_ab`` the dynamics Jacobian of group a by group b, and C, λ as in ``reverse_sweep``, from step τ to step τ − 1:

    C_aa ← C_aa J_aa        C_ab ← C_ab J_bb + Σ_{b<c≤a} C_ac J_cb        λ_b ← δ_b + Σ_{c≥b} λ_c J_cb

``J_aa`` and ``C_aa`` are block-diagonal over the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._engine import deferred
from rtrl._influence.rows import RowTransition, row_products
from rtrl._influence.structure import Structure
from rtrl._influence.transition import flush_subnormals

_FLUSH_EVERY = 4  # steps


@dataclass(frozen=True, slots=True)
class SweptRows:
    """The results of a sweep over m steps.

    Attributes:
        transition: the block.
        own: for each group (m, B, n, w + 1, w): ``C_aa`` of each step, and in the last row its adjoint ``λ``.
        cross: (a, b) → (m, B, n_a·w_a, n_b, w_b), ``C_ab`` of each step.
    """

    transition: RowTransition
    own: list[Tensor]
    cross: dict[tuple[int, int], Tensor]


def sweep_rows(
    structure: Structure,
    own: Sequence[Tensor],
    cross: Mapping[tuple[int, int], Tensor],
    adjoints: Sequence[Tensor | None],
    restarted: Tensor | None = None,
) -> SweptRows:
    """Go through a block from its end.

    Args:
        structure: the groups.
        own: for each group (m, B, n, w, w), ``J_aa`` of each step.
        cross: (a, b) → (m, B, n_a·w_a, n_b, w_b), ``J_ab`` of each step, for each group b that feeds group a.
        adjoints: for each group (m, B, n, w), ``δ``; None for zero.
        restarted: Boolean (m, B), the samples that restarted just before a step; None for none.

    Cost: per step and sample, ``n·(w + 1)·w²`` multiply-adds for each group, and those of C_ab.
    """
    steps, size = own[0].shape[:2]
    xs: list[Tensor] = []
    ys: dict[tuple[int, int], Tensor] = {}
    for a, jacobian in enumerate(own):
        n, width = structure.groups[a].shape
        x = jacobian.new_empty(steps + 1, size, n, width + 1, width)
        x[-1] = 0.0
        x[-1].diagonal(dim1=2, dim2=3).fill_(1.0)
        xs.append(x)
    for a, fed in enumerate(structure.feeds):
        for b in (b for b in range(a) if fed[b]):
            n, width = structure.groups[b].shape
            ys[a, b] = xs[a].new_empty(steps + 1, size, structure.groups[a].numel(), n, width)
            ys[a, b][-1] = 0.0
    restarts = [restarted is not None] * steps
    if restarted is not None and deferred.on_host(restarted):
        restarts = restarted.any(dim=1).tolist()
    views = [(x.unbind(0), jacobian.unbind(0)) for x, jacobian in zip(xs, own, strict=True)]
    for j in range(steps - 1, -1, -1):
        flushed = j % _FLUSH_EVERY == 0
        for (a, b), y in ys.items():
            _step_across(structure, xs, ys, own, cross, a, b, j)
            if flushed:
                flush_subnormals(y[j], out=y[j])
        for a, (at, jacobians) in enumerate(views):
            row_products(at[j + 1], jacobians[j], out=at[j])
            if flushed:
                products = at[j][..., :-1, :]
                flush_subnormals(products, out=products)
            adjoint = adjoints[a]
            if adjoint is not None:
                at[j][..., -1, :].add_(adjoint[j])
            for c in range(a + 1, len(xs)):
                if (c, a) in cross:
                    later = views[c][0][j + 1][..., -1, :].flatten(1)
                    at[j][..., -1, :].add_(torch.einsum("bh,bhnw->bnw", later, cross[c, a][j]))
        if restarts[j] and restarted is not None:
            for value in (*xs, *ys.values()):
                value[j].masked_fill_(restarted[j].reshape(-1, *[1] * (value.ndim - 2)), 0.0)
    transition = RowTransition(
        [x[0, :, :, :-1] for x in xs], {key: y[0] for key, y in ys.items()}, [x[0, :, :, -1] for x in xs]
    )
    return SweptRows(transition, [x[1:] for x in xs], {key: y[1:] for key, y in ys.items()})


def _step_across(
    structure: Structure,
    xs: Sequence[Tensor],
    ys: Mapping[tuple[int, int], Tensor],
    own: Sequence[Tensor],
    cross: Mapping[tuple[int, int], Tensor],
    a: int,
    b: int,
    j: int,
) -> None:
    """Write ``C_ab`` before step j."""
    out = ys[a, b][j]  # (B, H_a, n_b, w_b)
    torch.matmul(ys[a, b][j + 1].transpose(1, 2), own[b][j], out=out.transpose(1, 2))
    jacobian = cross[a, b][j].flatten(2).unflatten(1, tuple(structure.groups[a].shape))
    out += row_products(xs[a][j + 1][..., :-1, :], jacobian).reshape(out.shape)
    for c in range(b + 1, a):
        if (a, c) in ys and (c, b) in cross:
            out += torch.matmul(ys[a, c][j + 1].flatten(2), cross[c, b][j].flatten(2)).reshape(out.shape)
