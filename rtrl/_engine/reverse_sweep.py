"""The reverse sweep through a block: suffix products and adjoints, shared by all parameters.

With ``C_τ = J_{m−1} … J_{τ+1}`` and ``λ_τ = δ_τ + λ_{τ+1} J_τ``, λ_m = 0, the adjoint is carried as one more row under
C, ``X_τ = [C_τ; λ_{τ+1}]``, so that both take one product a step: ``X_{τ−1} = X_τ J_τ + [0; δ_τ]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.linearization import Linearization
from rtrl._influence.transition import Transition, flush_subnormals
from rtrl._utils import index_sets

# Up to so many multiply-adds, a product takes about as long as its launch: then fewer launches are worth more products.
_LAUNCH_MACS = {"cpu": 2**18}
_LAUNCH_MACS_ELSEWHERE = 2**24
_CHUNK = 2**20  # numbers of Jacobians that are written out at a time
_FLUSH_EVERY = 4  # steps: it is a pass over X, and hardly a number becomes subnormal in fewer


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the sweep leaves behind.

    Attributes:
        transition: the whole block as one element.
        reach: for each group (B, m, u·width + 1, w·width): ``C_τ[rows, writes_τ]``, and ``λ_{τ+1}[writes_τ]`` as the
            last row.
    """

    transition: Transition
    reach: list[Tensor]


def sweep(groups: Sequence[Linearization], state: Tensor, scratch: ReusableBuffer) -> Sweep:
    """Go through a block from its end.

    Args:
        groups: the linearised steps. state: any state of the block (B, n, ...), for its shape, dtype and device.
        scratch: where ``reach`` of dense steps may lie; what it had been lent for is then overwritten.

    Cost: a step and sample, ``(u·width + 1)·w·c·width²`` multiply-adds; twice that for small dense states, in
        O(√steps) launches. Bytes: ``(u·width + 1)·w·width`` numbers a step and sample are kept.
    """
    if len(groups) == 1 and groups[0].writes is None and groups[0].cols is None:
        return _dense(groups[0], state, scratch)
    return _rows_by_rows(groups, state)


def _dense(group: Linearization, state: Tensor, scratch: ReusableBuffer) -> Sweep:
    size, n = state.shape[:2]
    full, width, m = state[0].numel(), state[0, 0].numel(), len(group.times)
    reach = scratch.empty(state, size, m, full + 1, full)
    macs = size * full**3
    if m > 3 and macs <= _LAUNCH_MACS.get(state.device.type, _LAUNCH_MACS_ELSEWHERE):
        last = _scan(group, reach)
    else:
        last = _one_by_one(group, reach)
    return Sweep(Transition(None, None, last[:, :-1], last[:, -1], n, width), [reach])


def _start(reach: Tensor) -> None:
    """``[I; 0]`` at the last step."""
    reach[:, -1] = 0.0
    reach[:, -1].diagonal(dim1=1, dim2=2).fill_(1.0)


def _onward(product: Tensor, adjoint: Tensor | None, out: Tensor) -> None:
    """``product + [0; adjoint]`` without numbers on their way to subnormal ones; but an adjoint may be as small as its
    loss."""
    flush_subnormals(product[:, :-1], out=out[:, :-1])
    if adjoint is None:
        out[:, -1] = product[:, -1]
    else:
        torch.add(product[:, -1], adjoint, out=out[:, -1])


def _one_by_one(group: Linearization, reach: Tensor) -> Tensor:
    """Fill ``reach`` in as many products as steps, each written where it stays; returns X before the first step."""
    size, m, r, full = reach.shape
    _start(reach)
    last = reach.new_empty(size, r, full)
    product = torch.mm if size == 1 else torch.bmm  # a batch of one would cost more
    xs = [*_by_step(last.unsqueeze(1)), *_by_step(reach)]  # [j] is X before step j
    joined = _joined(group)
    rows = None if joined is None else _by_step(joined)
    if rows is not None:
        xs[m][..., -1, :] += rows[m]
    span = max(1, _CHUNK // (size * full * full))
    for stop in range(m, 0, -span):
        start = max(0, stop - span)
        jacobians = _by_step(group.jacobian(start, stop))
        for j in range(stop - 1, start - 1, -1):
            x = xs[j]
            product(xs[j + 1], jacobians[j - start], out=x)
            if j % _FLUSH_EVERY == 0:
                products = x[..., :-1, :]
                flush_subnormals(products, out=products)
            if rows is not None:
                x[..., -1, :].add_(rows[j])
    return last


def _by_step(stacked: Tensor) -> Sequence[Tensor]:
    """(B, m, ...) → views of each step, without B where that is 1."""
    steps: Sequence[Tensor] = stacked[0].unbind(0) if stacked.shape[0] == 1 else stacked.unbind(1)
    return steps


def _joined(group: Linearization) -> Tensor | None:
    """What joins the adjoint in each X, (B, m + 1, W), or None: in that before step j what step j earns, and what step
    j − 1 earns through its next state."""
    own, after = group.adjoint, group.adjoint_next
    if own is None:
        return None if after is None else pad(after, (0, 0, 1, 0))
    joined = pad(own, (0, 0, 0, 1))
    if after is not None:
        joined[:, 1:] += after
    return joined


def _scan(group: Linearization, reach: Tensor) -> Tensor:
    """The same in about 2·√m batched products: within pieces, all at once; from piece to piece; then all at once."""
    size, m, r, full = reach.shape
    jacobians = group.jacobian(0, m)
    adjoint = group.adjoint
    if group.adjoint_next is not None:
        early = torch.matmul(group.adjoint_next.unsqueeze(2), jacobians).squeeze(2)
        adjoint = early if adjoint is None else adjoint + early
    length = max(2, int(m**0.5))
    pieces = -(-m // length)
    lead = pieces * length - m  # steps of the first piece that do not exist: identities
    if lead:
        eye = torch.eye(full, dtype=reach.dtype, device=reach.device).expand(size, lead, full, full)
        jacobians = torch.cat([eye, jacobians], dim=1)
        if adjoint is not None:
            adjoint = torch.cat([adjoint.new_zeros(size, lead, full), adjoint], dim=1)
    jacobians = jacobians.reshape(size * pieces, length, full, full)
    given = None if adjoint is None else adjoint.reshape(size * pieces, length, full)

    inside = reach.new_empty(size * pieces, length + 1, r, full)  # [j] is X before step j of a piece that begins anew
    _start(inside)
    for j in range(length - 1, -1, -1):
        product = torch.bmm(inside[:, j + 1], jacobians[:, j])
        _onward(product, None if given is None else given[:, j], inside[:, j])
    inside = inside.view(size, pieces, length + 1, r, full)

    behind = reach.new_empty(size, pieces + 1, r, full)  # [k] is X before piece k
    _start(behind)
    for k in range(pieces - 1, -1, -1):
        _onward(torch.bmm(behind[:, k + 1], inside[:, k, 0, :-1]), inside[:, k, 0, -1], behind[:, k])
    after = behind[:, 1:].unsqueeze(2).expand(-1, -1, length, -1, -1)
    whole = torch.matmul(after, inside[:, :, 1:, :-1])
    flush_subnormals(whole[..., :-1, :], out=whole[..., :-1, :])
    whole[..., -1, :] += inside[:, :, 1:, -1]
    reach.copy_(whole.reshape(size, pieces * length, r, full)[:, lead:])
    if group.adjoint_next is not None:
        reach[:, :, -1] += group.adjoint_next
    return behind[:, 0].contiguous()


def _rows_by_rows(groups: Sequence[Linearization], state: Tensor) -> Sweep:
    """Over the rows that the block touches, in place."""
    size, n = state.shape[:2]
    width = state[0, 0].numel()
    rows_mask: Tensor | None = torch.zeros(size, n, dtype=torch.bool, device=state.device)
    cols_mask = rows_mask
    for group in groups:
        rows_mask = index_sets.union(rows_mask, _by_sample(group.writes), n)
        cols_mask = index_sets.union(cols_mask, _by_sample(group.cols), n)
    rows = index_sets.mask_to_indices(rows_mask)
    cols = None if rows is None else index_sets.mask_to_indices(index_sets.union(cols_mask, rows, n))
    u, c = (n if index is None else index.shape[1] for index in (rows, cols))
    table = None if cols is None else index_sets.positions(cols, n)
    first = torch.arange(size, device=state.device)[:, None] * c

    def flat(index: Tensor | None) -> Tensor | None:
        """Rows of the state (B, k) → rows of X, all samples' one after the other."""
        if index is None:
            return None
        return (first + (index if table is None else table.gather(1, index))).flatten()

    # X with the state's rows in front: (B·c, u·width + 1, width).
    r = u * width + 1
    x = state.new_zeros(size * c, r, width)
    eye = torch.eye(u * width, r, dtype=state.dtype, device=state.device).view(u, width, r).transpose(1, 2)
    own = flat(rows if rows is not None else torch.arange(n, device=state.device).expand(size, n))
    assert own is not None
    x[own] = eye.repeat(size, 1, 1)

    reach = [
        state.new_empty(size, len(g.times), r, (n if g.writes is None else g.writes.shape[2]) * width) for g in groups
    ]
    order = sorted(((t, i, j) for i, group in enumerate(groups) for j, t in enumerate(group.times)), reverse=True)
    for _, i, j in order:
        group = groups[i]
        written, read = (flat(None if t is None else t[:, j]) for t in (group.writes, group.cols))
        own_rows = x if written is None else x[written]
        here = reach[i][:, j].unflatten(2, (reach[i].shape[3] // width, width))
        here.copy_(own_rows.view(size, here.shape[2], r, width).transpose(1, 2))
        if group.adjoint_next is not None:
            reach[i][:, j, -1] += group.adjoint_next[:, j]
        onward = torch.bmm(reach[i][:, j], group.jacobian(j, j + 1)[:, 0])
        _onward(onward, None if group.adjoint is None else group.adjoint[:, j], onward)
        k = onward.shape[2] // width
        turned = onward.view(size, r, k, width).transpose(1, 2).reshape(size * k, r, width)
        if written is None:
            x.zero_()
        else:
            x.index_fill_(0, written, 0.0)
        if read is None:
            x += turned
        else:
            x[read] += turned  # no row occurs twice
    last = x.view(size, c, r, width).transpose(1, 2).reshape(size, r, c * width)
    return Sweep(Transition(rows, cols, last[:, :-1], last[:, -1], n, width), reach)


def _by_sample(index: Tensor | None) -> Tensor | None:
    """(B, m, k) → (B, m·k)."""
    return None if index is None else index.flatten(1)
