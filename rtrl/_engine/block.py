"""A block of linearised steps → one transition, the new influence born inside it, and the gradient earned inside it.

Over the steps of a block, with suffix products ``C_τ = J_{m−1} … J_{τ+1}`` and the adjoint sweep
``λ_τ = δ_τ + λ_{τ+1} J_τ``, λ_m = 0:

    S_m = Φ S_0 + Σ_τ C_τ B_τ        gradient = v S_0 + Σ_τ ( ∂ℓ_τ/∂θ + λ_{τ+1} B_τ )        Φ = C_{−1}, v = λ_0

Both sweeps are shared by all parameters. Source: Schmidhuber (1992), Neural Computation 4(2), section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.immediate import DenseImmediate, SlicedImmediate, Stores, active, births, may_overflow
from rtrl._engine.linearization import Linearization, LinearTap
from rtrl._engine.output_jacobian import largest
from rtrl._engine.reverse_sweep import sweep
from rtrl._engine.taps import segment_products
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.errors import SparsityError


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What a block leaves behind. Nothing has been changed yet.

    Attributes:
        transition: the whole block as one element.
        keys: parameter name → LongTensor (R,), ascending: ``sample · slices + slice`` of every slice that was active
            for a sample in the block.
        births: what is born through linear maps.
        dense: parameter name → (R, u·width, p), what is born in other ways.
        gradient: parameter name → gradient earned inside the block, shaped like the parameter; without ``v S_0``.
    """

    transition: Transition
    keys: dict[str, Tensor]
    births: list[DenseImmediate | SlicedImmediate]
    dense: dict[str, Tensor]
    gradient: dict[str, Tensor]

    def add_immediate(self, influences: Mapping[str, ParameterInfluence], rows: Mapping[str, Tensor]) -> None:
        """Add ``Σ_τ C_τ B_τ`` to the influences, in place.

        Args:
            rows: parameter name → LongTensor (R,) on the CPU, the rows of its influence that stand for ``keys``.
        """
        stores = Stores(influences, rows, self.transition)
        for birth in self.births:
            birth.add_to(stores)
        for name, born in self.dense.items():
            stores.add_dense(name, born)


def close_block(
    groups: Sequence[Linearization],
    state: Tensor,
    parameters: Mapping[str, Tensor],
    sliced: Sequence[str],
    scratch: ReusableBuffer,
) -> BlockResult:
    """Sweep a block of linearised steps.

    Args:
        groups: what ``Linearizer`` made of the steps.
        state: any state of the block, for its shape, dtype and device.
        parameters: name → parameter.
        sliced: the parameters whose influence is kept slice by slice.
        scratch: lends memory that is needed until the result is no more.

    Raises:
        SparsityError: a slice was used that was not declared active.

    Cost: that of ``reverse_sweep``; for ``add_immediate``, per step and sample, ``(u·width)·(w·width)`` multiply-adds
        times the size of each linear map's output (units for analytic steps), and one product of the size of the
        active parameters times ``u·width``.
    """
    size = state.shape[0]
    swept = sweep(groups, state, scratch)
    losses = not all(group.lossless for group in groups)
    slices = {name: parameter.shape[0] if parameter.ndim else 1 for name, parameter in parameters.items()}

    keys: dict[str, Tensor] = {}
    gradient: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name in sliced:
            keys[name] = _active_keys(groups, name, slices[name], size, state.device)
        else:
            keys[name] = torch.arange(size, device=state.device)
        if losses:
            gradient[name] = torch.zeros_like(parameter)

    own_keys = {name: keys[name] for name in sliced}
    born: list[DenseImmediate | SlicedImmediate] = []
    dense: dict[str, Tensor] = {}
    for group, reach in zip(groups, swept.reach, strict=True):
        born.extend(births(group, reach, own_keys, slices))
        if losses:
            _earn(group, reach[:, :, -1:], gradient)
        if group.general:
            for name, jacobian in group.jacobians(reach.transpose(1, 2)).items():
                if losses:
                    gradient[name] += jacobian[:, -1].sum(dim=0)
                value = _rows_born(name, jacobian[:, :-1], keys[name], slices[name] if name in sliced else 1)
                dense[name] = dense[name] + value if name in dense else value
    return BlockResult(swept.transition, keys, born, dense, gradient)


def overflowing(
    result: BlockResult, state: Tensor, parameters: Mapping[str, Tensor], sliced: Sequence[str]
) -> str | None:
    """The name of a parameter of which NaN or infinity would be born, or None.

    Cost: a look at the factors; the births themselves are written out for a look only if these leave it open.
    """
    for name, value in result.dense.items():
        if not bool(torch.isfinite(value).all()):
            return name
    largest_reach: dict[int, Tensor] = {}  # maps of one group share it
    for birth in result.births:
        if id(birth.reach) not in largest_reach:
            largest_reach[id(birth.reach)] = largest(birth.reach)
        if not may_overflow(birth, largest_reach[id(birth.reach)]):
            continue
        names = [tap.tap.name for tap in birth.taps]
        trial, rows = {}, {}
        for name in names:
            shape = parameters[name].shape
            trial[name] = ParameterInfluence(shape, name in sliced, state.shape[0], state[0].numel(), state)
            rows[name] = trial[name].claim(result.keys[name], 0)
        birth.add_to(Stores(trial, rows, result.transition))
        for name in names:
            if not bool(torch.isfinite(trial[name].values).all()):
                return name
    return None


def _active_keys(groups: Sequence[Linearization], name: str, slices: int, size: int, device: torch.device) -> Tensor:
    """``sample · slices + slice`` of all slices of a parameter that were active in the block, ascending, without
    repeats."""
    first = torch.arange(size, device=device)[:, None, None] * slices
    found = [(first + active(group, name, slices, size, device)).flatten() for group in groups]
    keys: Tensor = torch.cat(found).unique()
    return keys


def _earn(group: Linearization, adjoint: Tensor, gradient: dict[str, Tensor]) -> None:
    """Add what a group's linear maps and y earn inside the block, ``Σ (∂ℓ/∂z + λ ∂h_next/∂z) ⊗ u``, λ being adjoint
    (B, m, 1, W). What parameters of the general path earn through h_next is none of it."""
    flat = adjoint.flatten(0, 1)
    weights: dict[tuple[int, int, bool], Tensor | None] = {}
    for tap in group.taps:
        through = tap.response is not None and tap.tap.name not in group.general
        key = (id(tap.response), id(tap.earned), through)
        if key not in weights:
            weight = None
            if through and tap.response is not None:
                weight = tap.response.left(flat, slice(None)).squeeze(3)
            if tap.earned is not None:
                weight = tap.earned if weight is None else weight + tap.earned
            weights[key] = weight
        weight = weights[key]
        if weight is not None:
            name = tap.tap.name
            gradient[name] += _earned(tap, weight, gradient[name].shape)
    for name, value in group.direct.items():
        gradient[name] += value


def _earned(tap: LinearTap, weight: Tensor, shape: torch.Size) -> Tensor:
    """``Σ weight ⊗ u`` of one use, weight (N, K, L, O)."""
    use = tap.tap
    n, k, length, o = weight.shape
    if use.index is not None:
        right = None if use.inputs is None else use.inputs.expand(-1, k, -1, -1).flatten(0, 1)
        return segment_products(weight.reshape(n * k, 1, length, o), right, use.index.flatten(), shape[0]).reshape(
            shape
        )
    if use.inputs is None:
        return weight.sum(dim=(0, 1, 2)).reshape(shape)
    product = weight.reshape(n * length, o).T @ use.inputs.reshape(n * length, use.inputs.shape[-1])
    return product.T if use.transposed else product.reshape(shape)


def _rows_born(name: str, jacobian: Tensor, keys: Tensor, slices: int) -> Tensor:
    """The weighted immediate Jacobian (B, U, *shape) of a parameter that no tap covers, as rows (R, U, p)."""
    size, u = jacobian.shape[:2]
    p = jacobian.shape[2:].numel() // max(slices, 1)
    values = jacobian.reshape(size, u, slices, p).transpose(1, 2).flatten(0, 1)
    mine = values[keys]
    if int(values.count_nonzero()) != int(mine.count_nonzero()):
        raise SparsityError(f"a slice of parameter {name!r} was used that Sparsity.active does not declare")
    return mine
