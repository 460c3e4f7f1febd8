"""The reverse sweep through a block: suffix products and adjoints, shared by all parameters.

With ``C_τ = J_{m−1} … J_{τ+1}`` and ``λ_τ = δ_τ + λ_{τ+1} J_τ``, λ_m = 0, the adjoint is one more row under C,
``X_τ = [C_τ; λ_{τ+1}]``, so that both take one product per step: ``X_{τ−1} = X_τ J_τ + [0; δ_τ]``.
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

# Up to this many multiply-adds, a product takes less time than its launch: fewer launches are worth more products.
_LAUNCH_MACS = {"cpu": 2**14}
_LAUNCH_MACS_ELSEWHERE = 2**24
_CHUNK = 2**20  # numbers of state Jacobians that are written out at a time
_FLUSH_EVERY = 4  # steps: it is a pass over X, and hardly a number becomes subnormal in fewer


@dataclass(frozen=True, slots=True)
class SweptBlock:
    """The results of a reverse sweep.

    Attributes:
        transition: the block as one transition of the state.
        cotangents: for each group (B, m, u·slot_size + 1, w·slot_size): ``C_τ[:, written_τ]``, and in the last row the
            adjoint ``λ_{τ+1}[written_τ]``.
    """

    transition: Transition
    cotangents: list[Tensor]


def reverse_sweep(groups: Sequence[Linearization], state: Tensor, buffer: ReusableBuffer) -> SweptBlock:
    """Go through a block from its end.

    Args:
        groups: the linearised steps.
        state: any state of the block (B, n, ...), for its shape, dtype and device.
        buffer: lends memory for the cotangents of dense steps; what it lent before is overwritten.

    Cost: per step and sample, ``(u·slot_size + 1)·w·c·slot_size²`` multiply-adds; twice that for small dense states, in
        O(√m) launches. Bytes: ``(u·slot_size + 1)·w·slot_size`` numbers per step and sample are kept.
    """
    if len(groups) == 1 and groups[0].written is None and groups[0].touched is None:
        return _dense(groups[0], state, buffer)
    return _sparse(groups, state)


def _dense(group: Linearization, state: Tensor, buffer: ReusableBuffer) -> SweptBlock:
    size, n_slots = state.shape[:2]
    full, slot_size, m = state[0].numel(), state[0, 0].numel(), len(group.times)
    cotangents = buffer.empty(state, size, m, full + 1, full)
    macs = size * full**3
    if m > 3 and macs <= _LAUNCH_MACS.get(state.device.type, _LAUNCH_MACS_ELSEWHERE):
        first = _scan(group, cotangents)
    else:
        first = _one_by_one(group, cotangents)
    return SweptBlock(Transition(None, None, first[:, :-1], first[:, -1], n_slots, slot_size), [cotangents])


def _init_identity(xs: Tensor) -> None:
    """``[I; 0]`` at the last step."""
    xs[:, -1] = 0.0
    xs[:, -1].diagonal(dim1=1, dim2=2).fill_(1.0)


def _add_adjoint(product: Tensor, adjoint: Tensor | None, out: Tensor) -> None:
    """``product + [0; adjoint]``, with products flushed before they become subnormal; an adjoint may be as small as its
    loss."""
    flush_subnormals(product[:, :-1], out=out[:, :-1])
    if adjoint is None:
        out[:, -1] = product[:, -1]
    else:
        torch.add(product[:, -1], adjoint, out=out[:, -1])


def _one_by_one(group: Linearization, cotangents: Tensor) -> Tensor:
    """Fill ``cotangents`` with one product per step, each written to its place; returns X before the first step."""
    size, m, r, full = cotangents.shape
    _init_identity(cotangents)
    first = cotangents.new_empty(size, r, full)
    product = torch.mm if size == 1 else torch.bmm  # a batch of one would cost more
    xs = [*_by_step(first.unsqueeze(1)), *_by_step(cotangents)]  # [j] is X before step j
    stacked = _per_step_adjoints(group)
    adjoints = None if stacked is None else _by_step(stacked)
    last_rows = [*_by_step(first[:, None, -1]), *_by_step(cotangents[:, :, -1])]
    if adjoints is not None:
        last_rows[m] += adjoints[m]
    span = max(1, _CHUNK // (size * full * full))
    for stop in range(m, 0, -span):
        start = max(0, stop - span)
        jacobians = _by_step(group.state_jacobian(start, stop))
        for j in range(stop - 1, start - 1, -1):
            product(xs[j + 1], jacobians[j - start], out=xs[j])
            if j % _FLUSH_EVERY == 0:
                products = xs[j][..., :-1, :]
                flush_subnormals(products, out=products)
            if adjoints is not None:
                last_rows[j].add_(adjoints[j])
    return first


def _by_step(stacked: Tensor) -> Sequence[Tensor]:
    """(B, m, ...) → views of each step, without B where that is 1."""
    steps: Sequence[Tensor] = stacked[0].unbind(0) if stacked.shape[0] == 1 else stacked.unbind(1)
    return steps


def _per_step_adjoints(group: Linearization) -> Tensor | None:
    """What is added to the adjoint in X before each step and after the last, (B, m + 1, W), or None: before step j, the
    adjoint of its own y at h, and that of step j − 1 at its next state."""
    at_state, at_next = group.adjoint, group.adjoint_next
    if at_state is None:
        return None if at_next is None else pad(at_next, (0, 0, 1, 0))
    adjoints = pad(at_state, (0, 0, 0, 1))
    if at_next is not None:
        adjoints[:, 1:] += at_next
    return adjoints


def _scan(group: Linearization, cotangents: Tensor) -> Tensor:
    """Fill ``cotangents`` in about 2·√m batched products: inside all pieces at once, from piece to piece, and combined
    for all at once. Returns X before the first step."""
    size, m, r, full = cotangents.shape
    jacobians = group.state_jacobian(0, m)
    adjoint = group.adjoint
    if group.adjoint_next is not None:
        through_next = torch.matmul(group.adjoint_next.unsqueeze(2), jacobians).squeeze(2)
        adjoint = through_next if adjoint is None else adjoint + through_next
    length = max(2, int(m**0.5))
    pieces = -(-m // length)
    padding = pieces * length - m  # steps that fill up the first piece: identities
    if padding:
        eye = torch.eye(full, dtype=cotangents.dtype, device=cotangents.device).expand(size, padding, full, full)
        jacobians = torch.cat([eye, jacobians], dim=1)
        if adjoint is not None:
            adjoint = torch.cat([adjoint.new_zeros(size, padding, full), adjoint], dim=1)
    jacobians = jacobians.reshape(size * pieces, length, full, full)
    adjoints = None if adjoint is None else adjoint.reshape(size * pieces, length, full)

    inside = cotangents.new_empty(size * pieces, length + 1, r, full)  # [j] is X before step j, from the piece's end
    _init_identity(inside)
    for j in range(length - 1, -1, -1):
        product = torch.bmm(inside[:, j + 1], jacobians[:, j])
        _add_adjoint(product, None if adjoints is None else adjoints[:, j], inside[:, j])
    inside = inside.view(size, pieces, length + 1, r, full)

    between = cotangents.new_empty(size, pieces + 1, r, full)  # [k] is X before piece k, from the block's end
    _init_identity(between)
    for k in range(pieces - 1, -1, -1):
        _add_adjoint(torch.bmm(between[:, k + 1], inside[:, k, 0, :-1]), inside[:, k, 0, -1], between[:, k])
    after = between[:, 1:].unsqueeze(2).expand(-1, -1, length, -1, -1)
    combined = torch.matmul(after, inside[:, :, 1:, :-1])
    flush_subnormals(combined[..., :-1, :], out=combined[..., :-1, :])
    combined[..., -1, :] += inside[:, :, 1:, -1]
    cotangents.copy_(combined.reshape(size, pieces * length, r, full)[:, padding:])
    if group.adjoint_next is not None:
        cotangents[:, :, -1] += group.adjoint_next
    return between[:, 0].contiguous()


def _sparse(groups: Sequence[Linearization], state: Tensor) -> SweptBlock:
    """Sweep over the slots that the block touches, in place."""
    size, n_slots = state.shape[:2]
    slot_size = state[0, 0].numel()
    written_mask: Tensor | None = torch.zeros(size, n_slots, dtype=torch.bool, device=state.device)
    touched_mask = written_mask
    for group in groups:
        written_mask = index_sets.union(written_mask, _by_sample(group.written), n_slots)
        touched_mask = index_sets.union(touched_mask, _by_sample(group.touched), n_slots)
    written = index_sets.mask_to_indices(written_mask)
    touched = None if written is None else index_sets.mask_to_indices(index_sets.union(touched_mask, written, n_slots))
    u, c = (n_slots if index is None else index.shape[1] for index in (written, touched))
    position = None if touched is None else index_sets.positions(touched, n_slots)
    offset = torch.arange(size, device=state.device)[:, None] * c

    def rows_of(index: Tensor | None) -> Tensor | None:
        """Slots of the state (B, k) → rows of X, (B·k,); None for all."""
        if index is None:
            return None
        return (offset + (index if position is None else position.gather(1, index))).flatten()

    # X with the state's slots in front: (B·c, u·slot_size + 1, slot_size).
    r = u * slot_size + 1
    x = state.new_zeros(size * c, r, slot_size)
    eye = torch.eye(u * slot_size, r, dtype=state.dtype, device=state.device).view(u, slot_size, r).transpose(1, 2)
    diagonal = rows_of(torch.arange(n_slots, device=state.device).expand(size, n_slots) if written is None else written)
    assert diagonal is not None
    x[diagonal] = eye.repeat(size, 1, 1)

    cotangents = [
        state.new_empty(size, len(g.times), r, (n_slots if g.written is None else g.written.shape[2]) * slot_size)
        for g in groups
    ]
    order = sorted(((t, i, j) for i, group in enumerate(groups) for j, t in enumerate(group.times)), reverse=True)
    for _, i, j in order:
        group, of_step = groups[i], cotangents[i][:, j]
        step_written, step_touched = (rows_of(t if t is None else t[:, j]) for t in (group.written, group.touched))
        x_written = x if step_written is None else x[step_written]
        by_slot = of_step.unflatten(2, (of_step.shape[2] // slot_size, slot_size))
        by_slot.copy_(x_written.view(size, by_slot.shape[2], r, slot_size).transpose(1, 2))
        if group.adjoint_next is not None:
            of_step[:, -1] += group.adjoint_next[:, j]
        product = torch.bmm(of_step, group.state_jacobian(j, j + 1)[:, 0])
        _add_adjoint(product, None if group.adjoint is None else group.adjoint[:, j], product)
        k = product.shape[2] // slot_size
        slots_first = product.view(size, r, k, slot_size).transpose(1, 2).reshape(size * k, r, slot_size)
        if step_written is None:
            x.zero_()
        else:
            x.index_fill_(0, step_written, 0.0)
        if step_touched is None:
            x += slots_first
        else:
            x[step_touched] += slots_first  # no slot occurs twice
        if group.restarted is not None:  # what slots that the step did not write would hand on
            x.view(size, -1).masked_fill_(group.restarted[:, j, None], 0.0)
    first = x.view(size, c, r, slot_size).transpose(1, 2).reshape(size, r, c * slot_size)
    return SweptBlock(Transition(written, touched, first[:, :-1], first[:, -1], n_slots, slot_size), cotangents)


def _by_sample(index: Tensor | None) -> Tensor | None:
    """(B, m, k) → (B, m·k)."""
    return None if index is None else index.flatten(1)
