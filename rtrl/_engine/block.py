"""A block of linearised steps → its transition, its immediate influence, and its gradient.

Over the steps of a block, with suffix products ``C_τ = J_{m−1} … J_{τ+1}`` and the adjoints
``λ_τ = δ_τ + λ_{τ+1} J_τ``, λ_m = 0:

    S_m = Φ S_0 + Σ_τ C_τ B_τ        gradient = v S_0 + Σ_τ ( ∂ℓ_τ/∂θ + λ_{τ+1} B_τ )        Φ = C_{−1}, v = λ_0

C and λ are shared by all parameters. Source: Schmidhuber (1992), Neural Computation 4(2), section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._engine import checks, deferred
from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.immediate import DenseImmediate, InfluenceWriter, SlicedImmediate, active, immediate_terms
from rtrl._engine.linearization import Linearization, LinearizedTap, largest
from rtrl._engine.reverse_sweep import reverse_sweep
from rtrl._engine.taps import segment_products
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.errors import SparsityError


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The results of a block. Nothing has been changed yet.

    Attributes:
        transition: the block as one transition of the state.
        keys: parameter name → LongTensor (R,), ascending: ``sample · slices + slice`` of every slice that was active
            for a sample in the block.
        immediate: the immediate influence through taps.
        untapped: parameter name → (R, u·slot_size, p), the immediate influence of untapped parameters.
        gradient: parameter name → gradient from the losses of the block, shaped like the parameter, without ``v S_0``.
        restarted: Boolean (B,), the samples that restarted inside the block, None for none: for them ``v S_0`` counts,
            and ``Φ S_0`` is zero. Φ says so only in the rows that the block writes; the others must be dropped.
    """

    transition: Transition
    keys: dict[str, Tensor]
    immediate: list[DenseImmediate | SlicedImmediate]
    untapped: dict[str, Tensor]
    gradient: dict[str, Tensor]
    restarted: Tensor | None = None

    def add_immediate(self, influences: Mapping[str, ParameterInfluence], rows: Mapping[str, Tensor]) -> None:
        """Add ``Σ_τ C_τ B_τ`` to the influences by parameter name, in place, in the rows (on the CPU) that stand for
        ``keys``."""
        writer = InfluenceWriter(influences, rows, self.transition)
        for term in self.immediate:
            term.add_to(writer)
        for name, immediate in self.untapped.items():
            writer.add(name, immediate)


def close_block(
    groups: Sequence[Linearization],
    state: Tensor,
    parameters: Mapping[str, Tensor],
    sliced: Sequence[str],
    buffer: ReusableBuffer,
) -> BlockResult:
    """Sweep a block of linearised steps.

    Args:
        groups: the linearised steps.
        state: any state of the block, for its shape, dtype and device.
        parameters: name → parameter.
        sliced: the parameters whose influence is kept slice by slice.
        buffer: lends memory that the result refers to.

    Raises:
        SparsityError: a slice was used that was not declared active.

    Cost: that of ``reverse_sweep``; for ``add_immediate``, per step and sample, ``(u·slot_size)·(w·slot_size)``
        multiply-adds times the size of each linear map's output (units for analytic steps), and one product of the
        size of the active parameters times ``u·slot_size``.
    """
    size = state.shape[0]
    swept = reverse_sweep(groups, state, buffer)
    has_losses = any(group.has_losses for group in groups)
    slices = {name: parameter.shape[0] if parameter.ndim else 1 for name, parameter in parameters.items()}

    keys: dict[str, Tensor] = {}
    gradient: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name in sliced:
            keys[name] = _active_keys(groups, name, slices[name], size, state.device)
        else:
            keys[name] = torch.arange(size, device="cpu")
        if has_losses:
            gradient[name] = torch.zeros_like(parameter)

    sliced_keys = {name: keys[name] for name in sliced}
    immediate: list[DenseImmediate | SlicedImmediate] = []
    untapped: dict[str, Tensor] = {}
    for group, cotangents in zip(groups, swept.cotangents, strict=True):
        immediate.extend(immediate_terms(group, cotangents, sliced_keys, slices))
        if has_losses:
            accumulate_losses(group.taps, cotangents[:, :, -1:], gradient, group.untapped)
            for name, value in group.gradients.items():
                gradient[name] += value
        if group.untapped:
            for name, jacobian in group.untapped_jacobians(cotangents.transpose(1, 2)).items():
                if has_losses:
                    gradient[name] += jacobian[:, -1].sum(dim=0)
                if name in sliced:
                    rows = _active_rows(name, jacobian[:, :-1], keys[name], slices[name])
                else:  # the block may write no row at all
                    rows = jacobian[:, :-1].reshape(size, jacobian.shape[1] - 1, jacobian[0, 0].numel())
                untapped[name] = untapped[name] + rows if name in untapped else rows
    restarts = [group.restarted.any(dim=1) for group in groups if group.restarted is not None]
    restarted = torch.stack(restarts).any(dim=0) if restarts else None
    return BlockResult(swept.transition, keys, immediate, untapped, gradient, restarted)


def overflowing(
    result: BlockResult, state: Tensor, parameters: Mapping[str, Tensor], sliced: Sequence[str]
) -> str | None:
    """The name of a parameter whose immediate influence has NaN or infinity, or None.

    Cost: a pass over the factors; the immediate influence itself is only computed for it if these do not rule NaN and
        infinity out.
    """
    for name, value in result.untapped.items():
        if not checks.finite(value):
            return name
    largest_cotangent: dict[int, Tensor] = {}  # linear maps of one group share the cotangents
    for term in result.immediate:
        if id(term.cotangents) not in largest_cotangent:
            largest_cotangent[id(term.cotangents)] = largest(term.cotangents)
        if not _may_overflow(term, largest_cotangent[id(term.cotangents)]):
            continue
        trial, rows = {}, {}
        for name in (tap.name for tap in term.taps):
            shape = parameters[name].shape
            trial[name] = ParameterInfluence(shape, name in sliced, state.shape[0], state[0].numel(), state)
            rows[name] = trial[name].allocate(result.keys[name], 0)
        term.add_to(InfluenceWriter(trial, rows, result.transition))
        for name, influence in trial.items():
            if not bool(torch.isfinite(influence.values).all()):
                return name
    return None


def _may_overflow(term: DenseImmediate | SlicedImmediate, largest_cotangent: Tensor) -> bool:
    """Whether a bound, from the largest factors, does not rule out that a sum overflows; NaN does not rule it out."""
    m, w = term.cotangents.shape[1], term.cotangents.shape[3]
    k, length, _ = term.taps[0].use.shape
    inputs = [largest(tap.use.inputs) for tap in term.taps if tap.use.inputs is not None]
    factors = torch.stack([largest_cotangent, term.output_jacobian.largest(), *inputs])
    count, limit = float(m * k * length * w), torch.finfo(term.cotangents.dtype).max / 16
    if deferred.current(factors) is not None:
        bound = factors[:2].prod() * torch.cat([factors.new_ones(1), factors[2:]]).amax() * count
        return not deferred.holds(bound < limit)
    values = factors.tolist()
    return not count * values[0] * values[1] * max([1.0, *values[2:]]) < limit


def _active_keys(groups: Sequence[Linearization], name: str, slices: int, size: int, device: torch.device) -> Tensor:
    """``sample · slices + slice`` of all slices of a parameter that were active in the block, ascending, without
    repeats."""
    first = torch.arange(size, device=device)[:, None, None] * slices
    per_group = [(first + active(group, name, slices, size, device)).flatten() for group in groups]
    keys: Tensor = torch.cat(per_group).unique()
    return keys


def accumulate_losses(
    taps: Sequence[LinearizedTap], adjoint: Tensor, gradient: dict[str, Tensor], untapped: Sequence[str] = ()
) -> None:
    """Add the gradients through taps, ``Σ (∂ℓ/∂z + λ ∂h_next/∂z) ⊗ u``, λ being adjoint (B, m, 1, W). Those of untapped
    parameters through h_next are not among them."""
    flat = adjoint.flatten(0, 1)
    weights: dict[tuple[int, int, bool], Tensor | None] = {}
    for tap in taps:
        through_state = tap.output_jacobian is not None and tap.name not in untapped
        key = (id(tap.output_jacobian), id(tap.grad_output), through_state)
        if key not in weights:
            weight = None
            if through_state and tap.output_jacobian is not None:
                weight = tap.output_jacobian.vjp(flat).squeeze(3)
            if tap.grad_output is not None:
                weight = tap.grad_output if weight is None else weight + tap.grad_output
            weights[key] = weight
        weight = weights[key]
        if weight is not None:
            gradient[tap.name] += _tap_gradient(tap, weight, gradient[tap.name].shape)


def _tap_gradient(tap: LinearizedTap, weight: Tensor, shape: torch.Size) -> Tensor:
    """``Σ weight ⊗ u`` of one use, weight (N, K, L, O)."""
    use = tap.use
    n, k, length, o = weight.shape
    if use.index is not None:
        right = None if use.inputs is None else use.inputs.expand(-1, k, -1, -1).flatten(0, 1)
        products = segment_products(weight.reshape(n * k, 1, length, o), right, use.index.flatten(), shape[0])
        return products.reshape(shape)
    if use.inputs is None:
        return weight.sum(dim=(0, 1, 2)).reshape(shape)
    product = weight.reshape(n * length, o).T @ use.inputs.reshape(n * length, use.inputs.shape[-1])
    return product.T if use.transposed else product.reshape(shape)


def _active_rows(name: str, jacobian: Tensor, keys: Tensor, slices: int) -> Tensor:
    """The weighted immediate Jacobian (B, U, *shape) of an untapped parameter, as rows (R, U, p)."""
    size, u = jacobian.shape[:2]
    p = jacobian.shape[2:].numel() // max(slices, 1)
    values = jacobian.reshape(size, u, slices, p).transpose(1, 2).flatten(0, 1)
    rows = values[keys]
    if int(values.count_nonzero()) != int(rows.count_nonzero()):
        raise SparsityError(f"a slice of parameter {name!r} was used that Sparsity.active does not declare")
    return rows
