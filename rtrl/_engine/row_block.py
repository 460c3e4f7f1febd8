"""A block of steps linearised with structure → its transition, its immediate influence, and its gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._engine import deferred
from rtrl._engine.mixing import normal_like
from rtrl._engine.row_linearization import CouplingFound, RowLinearization, RowTap
from rtrl._engine.row_sweep import SweptRows, sweep_rows
from rtrl._engine.unrolled import PulledBlock
from rtrl._influence.rows import RowInfluence, RowTransition, row_products
from rtrl._influence.structure import ALL, ParameterReach, RowMap, Structure, by_channel, from_channels

_ROUNDING = 32  # how many rounding errors per step of a sample's largest entry a probe may be off


@dataclass(frozen=True, slots=True)
class RowBlockResult:
    """The results of a block. Nothing has been changed yet.

    Attributes:
        structure: what the block was linearised with.
        transition: the block as one transition of the state.
        gradient: parameter name → gradient from the losses of the block, without ``v S_0``; empty without losses.
        immediate: parameter name → [(group, left, right)], see ``RowInfluence.add``.
        whole: parameter name → group → immediate influence like its part.
        restarted: Boolean (B, m), the samples that restarted just before each step; None if none did.
    """

    structure: Structure
    transition: RowTransition
    gradient: dict[str, Tensor]
    immediate: dict[str, list[tuple[int, Tensor, Tensor | None]]]
    whole: dict[str, dict[int, Tensor]]
    restarted: Tensor | None

    def add_immediate(self, influences: Mapping[str, RowInfluence]) -> None:
        """Add ``Σ_τ C_τ B_τ`` to what the influences have staged. Cost: per step and sample, w·C·I multiply-adds for
        each parameter, and more in groups that others feed."""
        for name, terms in self.immediate.items():
            for group, left, right in terms:
                influences[name].add(group, left, right)
        for name, parts in self.whole.items():
            for group, part in parts.items():
                influences[name].add_whole(group, part)

    def pull_back(self, cotangent: Tensor, parameters: Mapping[str, Tensor]) -> tuple[PulledBlock, dict[str, Tensor]]:
        """Pull a cotangent w (B, H) of the last state and the gradients of the losses back through the block.

        Returns:
            All of it; and by parameter the share of the cotangent alone, ``w Σ_τ C_τ B_τ``.

        Cost: that of the immediate influence, and memory for it.
        """
        groups = self.structure.split(cotangent)
        trial = {
            name: RowInfluence(self.structure, reach, len(cotangent), cotangent)
            for name, reach in self.structure.parameters.items()
            if name in parameters
        }
        nothing = RowTransition(
            [torch.zeros_like(own) for own in self.transition.own], {}, list(self.transition.adjoint)
        )
        for influence in trial.values():
            influence.stage(nothing)
        self.add_immediate(trial)
        for influence in trial.values():
            influence.commit()
        immediate = {name: influence.contract(groups).sum(dim=0) for name, influence in trial.items()}
        gradients = {name: value + self.gradient.get(name, 0.0) for name, value in immediate.items()}
        pulled = zip(self.transition.pull_back(groups), self.transition.adjoint, strict=True)
        return PulledBlock(self.structure.join([own + adjoint for own, adjoint in pulled]), gradients), immediate


def close_rows(
    batches: Sequence[RowLinearization],
    structure: Structure,
    parameters: Mapping[str, Tensor],
    steps: int,
    restarted: Tensor | None = None,
    *,
    probed: bool = True,
) -> RowBlockResult:
    """Sweep a block of m linearised steps.

    Args:
        batches: the linearised steps, those of one kind together.
        structure: what they were linearised with.
        parameters: name → parameter.
        steps: m.
        restarted: Boolean (B, m), the samples that restarted just before each step; None if none did.
        probed: False takes the structure at its word.

    Raises:
        CouplingFound: a parameter reaches another row than the structure says.
    """
    swept = _sweep(batches, structure, steps, None if restarted is None else restarted.T)
    has_losses = any(batch.has_losses for batch in batches)
    gradient = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()} if has_losses else {}
    immediate: dict[str, list[tuple[int, Tensor, Tensor | None]]] = {}
    whole: dict[str, dict[int, Tensor]] = {}
    for batch in batches:
        cotangents = _Cotangents(structure, swept, batch.times)
        for tap in batch.taps:
            reach, tapped = structure.parameters[tap.use.name], tap.use.name not in batch.untapped
            right = tap.inputs(reach.shape[0] if reach.shape else 1)
            for group, rows in enumerate(reach.groups):
                left = cotangents.left(group, tap, reach) if tapped and rows is not None else None
                if left is not None and tap.use.factor is not None:
                    factor = tap.use.factor.reshape(left.shape[0], left.shape[1], -1)
                    left = left * (factor.unsqueeze(3) if isinstance(rows, RowMap) else factor.unsqueeze(2))
                if left is not None:
                    flat = None if right is None else right.reshape(len(left), -1, right.shape[-1])
                    immediate.setdefault(tap.use.name, []).append((group, left, flat))
            if has_losses:
                _add_gradient(gradient, tap, right, cotangents.adjoint_at(tap, reach) if tapped else None)
        if has_losses:
            for name, value in batch.gradients.items():
                gradient[name] += value
        if batch.untapped:
            _add_untapped(batch, structure, cotangents, gradient, whole, probed)
    return RowBlockResult(structure, swept.transition, gradient, immediate, whole, restarted)


def _sweep(
    batches: Sequence[RowLinearization], structure: Structure, steps: int, restarted: Tensor | None
) -> SweptRows:
    """Put the steps of all batches in order, and sweep them."""
    if len(batches) == 1:
        only = batches[0]
        own = [value.transpose(0, 1) for value in only.own]
        cross = {key: value.transpose(0, 1) for key, value in only.cross.items()}
        adjoints = [None if value is None else value.transpose(0, 1) for value in only.adjoints]
        return sweep_rows(structure, own, cross, adjoints, restarted)

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        like = next((value for value in values if value is not None), None)
        if like is None:
            return None
        out = like.new_zeros(steps, like.shape[0], *like.shape[2:])
        for batch, value in zip(batches, values, strict=True):
            if value is not None:
                out[batch.times] = value.transpose(0, 1)
        return out

    groups = range(len(structure.groups))
    own = [joined([batch.own[a] for batch in batches]) for a in groups]  # type: ignore[misc]
    cross = {key: joined([batch.cross[key] for batch in batches]) for key in batches[0].cross}  # type: ignore[misc]
    adjoints = [joined([batch.adjoints[a] for batch in batches]) for a in groups]
    return sweep_rows(structure, own, cross, adjoints, restarted)


class _Cotangents:
    """What the sweep says of the steps of one batch, sample by sample.

    Attributes:
        own: for each group (B, m, n, w + 1, w).
        cross: (a, b) → (B, m, n_a·w_a, n_b, w_b).
    """

    def __init__(self, structure: Structure, swept: SweptRows, times: list[int]) -> None:
        self.structure = structure
        every = times == list(range(len(swept.own[0])))

        def of_batch(value: Tensor) -> Tensor:
            return (value if every else value[times]).transpose(0, 1)

        self.own = [of_batch(value) for value in swept.own]
        self.cross = {key: of_batch(value) for key, value in swept.cross.items()}

    def left(self, group: int, tap: RowTap, reach: ParameterReach) -> Tensor | None:
        """``C_τ ∂h_next/∂z`` at the rows of a group: (B, m·L, C, w) or (B, m·L, n·w, C); None if it is zero."""
        size, m = self.own[0].shape[:2]
        rows = reach.groups[group]
        if isinstance(rows, RowMap):
            own = self._jacobian_at_rows(group, tap, reach)  # (B, m, L, C, w)
            if own is None:
                return None
            cotangents = rows.take(self.own[group][..., :-1, :], 2).unsqueeze(2)  # (B, m, 1, C, w, w)
            left = row_products(cotangents, own.unsqueeze(-1)).squeeze(-1)
            return left.flatten(1, 2)
        total: Tensor | None = None
        n, width = self.structure.groups[group].shape
        if group in tap.fed:
            at_group = tap.fed[group].unflatten(0, (size, m)).unflatten(3, (n, width))  # (B, m, L, n, w, O)
            own = self.own[group][..., :-1, :].unsqueeze(2)
            total = row_products(own, at_group).flatten(3, 4)
        for b in range(group):
            below, rows = self.cross.get((group, b)), reach.groups[b]  # (B, m, H, n_b, w_b)
            if below is None or rows is None:
                continue
            if isinstance(rows, RowMap):
                jacobian = self._jacobian_at_rows(b, tap, reach)
                if jacobian is None:
                    continue
                weights = rows.take(below, 3).unsqueeze(2)  # (B, m, 1, H, C, w_b)
                product = (weights * jacobian.unsqueeze(3)).sum(dim=-1)
            else:
                product = torch.matmul(below.flatten(3).unsqueeze(2), tap.fed[b].unflatten(0, (size, m)))
            total = product if total is None else total + product
        return None if total is None else total.flatten(1, 2)

    def _jacobian_at_rows(self, group: int, tap: RowTap, reach: ParameterReach) -> Tensor | None:
        """``∂h_next/∂z`` at the row of each channel: (B, m, L, C, w)."""
        rows = reach.groups[group]
        assert isinstance(rows, RowMap)
        size, m = self.own[0].shape[:2]
        n, width = self.structure.groups[group].shape
        if group in tap.fed:
            values = tap.fed[group].unflatten(2, (n, width))  # (N, L, n, w, O)
            index = rows.index.view(1, 1, 1, 1, -1).expand(*values.shape[:2], 1, width, -1)
            jacobian = values.gather(2, index).squeeze(2).transpose(2, 3)
        elif tap.alone is None:
            return None
        else:
            jacobian = tap.alone[:width].permute(1, 2, 3, 0)
        if not rows.complete:
            jacobian = jacobian * rows.present.to(jacobian.dtype)[:, None]
        by_sample: Tensor = jacobian.reshape(size, m, *jacobian.shape[1:])
        return by_sample

    def adjoint_at(self, tap: RowTap, reach: ParameterReach) -> Tensor | None:
        """``λ ∂h_next/∂z``, (N, L, O); None if it is zero."""
        size, m = self.own[0].shape[:2]
        total: Tensor | None = None
        for group, rows in enumerate(reach.groups):
            if rows is None:
                continue
            adjoint = self.own[group][..., -1, :]  # (B, m, n, w)
            if isinstance(rows, RowMap):
                jacobian = self._jacobian_at_rows(group, tap, reach)
                if jacobian is None:
                    continue
                product = (jacobian * rows.take(adjoint, 2).unsqueeze(2)).sum(dim=-1)
            elif group in tap.fed:
                weights = adjoint.flatten(2).unsqueeze(2).unsqueeze(3)  # (B, m, 1, 1, H)
                product = torch.matmul(weights, tap.fed[group].unflatten(0, (size, m))).squeeze(3)
            else:
                continue
            total = product if total is None else total + product
        return None if total is None else total.flatten(0, 1)


def _add_gradient(gradient: dict[str, Tensor], tap: RowTap, right: Tensor | None, weight: Tensor | None) -> None:
    """Add ``Σ (∂ℓ/∂z + λ ∂h_next/∂z) ⊗ u`` to the gradient of a tap's parameter."""
    if tap.grad_output is not None:
        weight = tap.grad_output if weight is None else weight + tap.grad_output
    if weight is None:
        return
    target = gradient[tap.use.name]
    if tap.use.factor is not None:
        weight = weight * tap.use.factor
    flat = weight.flatten(0, 1)
    if right is None:
        target += flat.sum(dim=0).reshape(target.shape)
        return
    product = flat.mT @ right.flatten(0, 1)
    last = tap.use.transposed or tap.use.index is not None
    target += from_channels(product, target.shape, "last" if last else "first")


def _add_untapped(
    batch: RowLinearization,
    structure: Structure,
    cotangents: _Cotangents,
    gradient: dict[str, Tensor],
    whole: dict[str, dict[int, Tensor]],
    probed: bool,
) -> None:
    """Add what parameters with other uses contribute: one backward pass for each entry of a row, or of a group's rows;
    and one for a probe of the rows that they reach.

    Raises:
        CouplingFound: a parameter reaches another row than the structure says.
    """
    own = cotangents.own
    size, m = own[0].shape[:2]
    nothing = [
        own_group.new_zeros(()).expand(size, m, *group.shape)
        for own_group, group in zip(own, structure.groups, strict=True)
    ]
    generator = torch.Generator().manual_seed(3)  # not the user's, whose random numbers stay as they are
    passes: list[Tensor] = []  # (B, m, H)
    found: dict[tuple[int, bool], slice] = {}  # (group, whether on all of its rows) → which of the passes
    row_weights, mix = [], []
    probe = [value.clone() for value in nothing]
    for a, group in enumerate(structure.groups):
        n, width = group.shape
        reached = [structure.parameters[name].groups[a] for name in batch.untapped]
        for everywhere in sorted({rows is ALL for rows in reached if rows is not None}):
            first = len(passes)
            for i in range(n * width if everywhere else width):
                parts = list(nothing)
                if everywhere:
                    parts[a] = parts[a].clone()
                    parts[a][:, :, i // width] = own[a][:, :, i // width, i % width]
                    for b in (b for b in range(a) if (a, b) in cotangents.cross):
                        parts[b] = cotangents.cross[a, b][:, :, i]
                else:
                    parts[a] = own[a][:, :, :, i]
                passes.append(structure.join(parts))
            found[a, everywhere] = slice(first, len(passes))
        row_weights.append(normal_like(own[0].new_empty(n), generator))
        mix.append(normal_like(own[0].new_empty(width), generator))
        probe[a] += torch.einsum("n,k,bmnkw->bmnw", row_weights[a], mix[a], own[a][..., :-1, :])
        for b in (b for b in range(a) if (a, b) in cotangents.cross):
            both = torch.outer(row_weights[a], mix[a]).flatten()
            probe[b] += torch.einsum("h,bmhnw->bmnw", both, cotangents.cross[a, b])
    adjoint = structure.join([value[..., -1, :] for value in own])
    passes += [structure.join(probe), adjoint]
    for name, values in batch.untapped_jacobians(torch.stack(passes, dim=1)).items():
        reach = structure.parameters[name]
        if gradient:
            gradient[name] += values[:, -1].sum(dim=0)
        values = by_channel(values, reach.shape, reach.orientation)  # (B, passes, C, I)
        expected, largest = torch.zeros_like(values[:, 0]), values.new_zeros(size)
        for a, rows in enumerate(reach.groups):
            if rows is None:
                continue
            of_group = values[:, found[a, rows is ALL]]
            weights = torch.outer(row_weights[a], mix[a])  # (n, w)
            if isinstance(rows, RowMap):
                part = of_group.transpose(1, 2).contiguous()
                terms = part * (rows.take(weights, 0) * rows.present[:, None])[..., None]
                expected += terms.sum(dim=2)
            else:
                part = of_group.flatten(2)
                terms = of_group * weights.flatten()[:, None, None]
                expected += terms.sum(dim=1)
            largest = torch.maximum(largest, terms.abs().flatten(1).amax(dim=1) if terms.numel() else largest)
            known = whole.setdefault(name, {})
            known[a] = known[a] + part if a in known else part
        error = (values[:, -2] - expected).abs().flatten(1)
        bound = _ROUNDING * m * torch.finfo(values.dtype).eps * largest[:, None]
        if probed and not deferred.holds(~(error > bound).any()):
            raise CouplingFound
