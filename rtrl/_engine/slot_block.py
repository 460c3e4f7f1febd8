"""A block of steps whose slots are independent → one transition for each slot of each sample.

To what is carried, slot i of sample b is the *sample* ``b·n + i``, with a state of one row of d entries: its influence,
its dormant slices and its place in the segment tree are those of a state (B·n, 1, d).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtrl._engine.block import BlockResult, accumulate_losses
from rtrl._engine.immediate import InfluenceWriter, SlicedImmediate
from rtrl._engine.linearization import DenseOutputJacobian, LinearizedTap
from rtrl._engine.slot_linearization import SlotLinearization
from rtrl._engine.unrolled import PulledBlock
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition, flush_subnormals

_FLUSH_EVERY = 4  # steps


@dataclass(frozen=True, slots=True)
class SlotBlockResult:
    """The results of a block. Nothing has been changed yet.

    Attributes:
        block: the results over B·n samples of one row.
        n_slots: n.
        sliced: the parameters whose influence is kept slice by slice.
        samples: by the ``id`` of the cotangents of immediate terms, LongTensor (B, X), the sample of each entry.
    """

    block: BlockResult
    n_slots: int
    sliced: tuple[str, ...]
    samples: Mapping[int, Tensor]

    @property
    def gradient(self) -> dict[str, Tensor]:
        """The gradient from the losses of the block, by parameter; empty without losses."""
        return self.block.gradient

    @property
    def restarted(self) -> Tensor | None:
        """Boolean (B·n,), what restarted inside the block; None if nothing did."""
        return self.block.restarted

    def pull_back(self, cotangent: Tensor, parameters: Mapping[str, Tensor]) -> tuple[PulledBlock, dict[str, Tensor]]:
        """Pull a cotangent w (B, H) of the last state and the gradients of the losses back through the block.

        Returns:
            All of it; and by parameter the share of the cotangent alone, ``w Σ_τ C_τ B_τ``.

        Cost: that of one row of the immediate influence.
        """
        block, by_slot = self.block, cotangent.reshape(len(cotangent) * self.n_slots, -1)
        one = cotangent.new_ones(len(by_slot), 1, 1)
        influences, rows = {}, {}
        for name, parameter in parameters.items():
            influences[name] = ParameterInfluence(parameter.shape, name in self.sliced, len(by_slot), 1, cotangent)
            rows[name] = influences[name].allocate(block.keys[name], 0)
        writer = InfluenceWriter(influences, rows, Transition(None, None, one, one[:, 0], 1, 1))
        for term in block.immediate:
            states, adjoint = term.cotangents[:, :, :-1], term.cotangents[:, :, -1:]
            row = by_slot[self.samples[id(term.cotangents)]].unsqueeze(2)
            replace(term, cotangents=torch.cat([row @ states, adjoint], dim=2)).add_to(writer)
        immediate = {
            name: influences[name].to_dense().sum(dim=(0, 1)).reshape(parameter.shape)
            for name, parameter in parameters.items()
        }
        gradients = {name: value + block.gradient.get(name, 0.0) for name, value in immediate.items()}
        if block.restarted is not None:
            by_slot = by_slot.masked_fill(block.restarted[:, None], 0.0)
        state = block.transition.pull_back(by_slot).reshape(cotangent.shape)
        return PulledBlock(state, gradients), immediate


def close_slots(
    groups: Sequence[SlotLinearization],
    state: Tensor,
    parameters: Mapping[str, Tensor],
    sliced: Sequence[str],
    held: set[str],
    restarted: Tensor | None = None,
) -> SlotBlockResult:
    """Sweep a block of linearised steps.

    Args:
        groups: the linearised steps, those of one kind together.
        state: (B, n, ...), any state of the block, for its shape, dtype and device.
        parameters: name → parameter.
        sliced: the parameters whose influence is kept slice by slice.
        held: other parameters that have an influence before the block.
        restarted: Boolean (B, m), the samples that restarted just before each step; None if none did.

    Cost: per step and written slot, ``(d + 1)·d²`` multiply-adds, and ``d`` for each number of a parameter that it
        uses.
    """
    size, n = state.shape[:2]
    transition, cotangents = _sweep(groups, state, restarted)
    has_losses = any(group.has_losses for group in groups)
    gradient = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()} if has_losses else {}
    slices = {name: parameter.shape[0] if parameter.ndim else 1 for name, parameter in parameters.items()}
    entries = [_samples_of(group, n) for group in groups]
    every = torch.arange(size * n, device="cpu")
    keys = {}
    for name in parameters:
        used = [
            _keys(tap, samples, slices[name])
            for group, samples in zip(groups, entries, strict=True)
            for tap in group.taps
            if tap.name == name
        ]
        if name in sliced:
            keys[name] = torch.cat([key.flatten() for key in used]).unique() if used else every[:0]
        else:
            keys[name] = every if used or name in held else every[:0]
    immediate: list[SlicedImmediate] = []
    for group, samples, of_group in zip(groups, entries, cotangents, strict=True):
        if has_losses:
            accumulate_losses(group.taps, of_group[:, :, -1:], gradient)
            accumulate_losses(group.outputs, of_group[:, :, -1:], gradient)
            for name, value in group.gradients.items():
                gradient[name] += value
        immediate.extend(_immediate(t, samples, of_group, keys, slices) for t in _alike(group.taps, keys))
    restarts = None if restarted is None else restarted.any(dim=1).repeat_interleave(n)
    by_id = {id(of_group): samples for of_group, samples in zip(cotangents, entries, strict=True)}
    block = BlockResult(transition, keys, list(immediate), {}, gradient, restarts)
    return SlotBlockResult(block, n, tuple(sliced), by_id)


def _alike(taps: Sequence[LinearizedTap], keys: Mapping[str, Tensor]) -> list[list[LinearizedTap]]:
    """Taps of one linear map whose parameters have the same keys, together."""
    alike: list[list[LinearizedTap]] = []
    for tap in taps:
        for others in alike:
            same = others[0].use.output is tap.use.output
            if same and torch.equal(keys[others[0].name], keys[tap.name]):
                others.append(tap)
                break
        else:
            alike.append([tap])
    return alike


def _samples_of(group: SlotLinearization, n: int) -> Tensor:
    """(B, m·w), the sample ``b·n + i`` of each entry."""
    first = torch.arange(len(group.written), device=group.written.device)[:, None] * n
    return first + group.written.flatten(1)


def _keys(tap: LinearizedTap, samples: Tensor, slices: int) -> Tensor:
    """``sample · slices + slice`` of what a use touches, (E, K)."""
    if tap.use.index is None:
        return samples.reshape(-1, 1)
    return samples.reshape(-1, 1) * slices + tap.use.index


def _immediate(
    taps: list[LinearizedTap],
    samples: Tensor,
    cotangents: Tensor,
    keys: Mapping[str, Tensor],
    slices: Mapping[str, int],
) -> SlicedImmediate:
    """The immediate influence through one linear map; a parameter that is kept whole counts as one slice."""
    name = taps[0].name
    if taps[0].use.index is None:
        whole = samples.new_zeros(samples.numel(), 1)
        taps = [replace(tap, use=replace(tap.use, index=whole)) for tap in taps]
        slices = {name: 1}
    use, jacobian = taps[0].use, taps[0].output_jacobian
    assert isinstance(jacobian, DenseOutputJacobian)
    k = use.shape[0]
    found = _keys(taps[0], samples, slices[name]).flatten()
    own = keys[name].to(found.device)
    at = torch.arange(samples.numel(), device=found.device).repeat_interleave(k)
    which = torch.arange(k, device=found.device).repeat(samples.numel())
    return SlicedImmediate(taps, jacobian, cotangents, torch.searchsorted(own, found), at, which, own.numel())


def _sweep(
    groups: Sequence[SlotLinearization], state: Tensor, restarted: Tensor | None
) -> tuple[Transition, list[Tensor]]:
    """Go through a block from its end.

    Returns:
        The transition over B·n samples; and for each group (B, m·w, d + 1, d), ``C_τ`` of each entry, and in the last
        row the adjoint ``λ_{τ+1}``.
    """
    (size, n), d = state.shape[:2], state[0, 0].numel()
    x = state.new_zeros(size * n, d + 1, d)
    x.diagonal(dim1=1, dim2=2).fill_(1.0)
    first = torch.arange(size, device=state.device)[:, None, None] * n
    rows = [(first + group.written).transpose(0, 1).flatten(1) for group in groups]  # (m, B·w)
    cotangents = [state.new_empty(*group.own.shape[:3], d + 1, d) for group in groups]
    order = sorted(((t, i, j) for i, group in enumerate(groups) for j, t in enumerate(group.times)), reverse=True)
    for t, i, j in order:
        group, written = groups[i], rows[i][j]
        of_step = x[written]
        cotangents[i][:, j] = of_step.view(cotangents[i][:, j].shape)
        product = torch.bmm(of_step, group.own[:, j].reshape(-1, d, d))
        if t % _FLUSH_EVERY == 0:
            product[:, :-1] = flush_subnormals(product[:, :-1])
        x[written] = product
        if group.adjoint is not None:
            x[:, -1] += group.adjoint[:, j].reshape(-1, d)
        if restarted is not None:
            x.view(size, -1).masked_fill_(restarted[:, t, None], 0.0)
    transition = Transition(None, None, x[:, :-1], x[:, -1], 1, d)
    return transition, [values.flatten(1, 2) for values in cotangents]
