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

from rtrl import _rows
from rtrl.errors import SparsityError
from rtrl.linearize import Linearization, LinearTap
from rtrl.taps import segment_products
from rtrl.transition import Transition, flushed


@dataclass(frozen=True, slots=True)
class Birth:
    """The influence on one parameter that is born inside a block, at the block's end.

    Attributes:
        keys: LongTensor (R,), ascending: ``sample · slices + slice`` of every slice that was active for a sample in
            the block.
        values: (R, u·width, p), ``Σ_τ C_τ B_τ`` on the transition's rows.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What a block leaves behind.

    Attributes:
        transition: the whole block as one element.
        births: parameter name → what was born in the block.
        gradient: parameter name → gradient earned inside the block, shaped like the parameter; without ``v S_0``.
    """

    transition: Transition
    births: dict[str, Birth]
    gradient: dict[str, Tensor]


def close_block(
    groups: Sequence[Linearization], state: Tensor, parameters: Mapping[str, Tensor], sliced: Sequence[str]
) -> BlockResult:
    """Sweep a block of linearised steps.

    Args:
        groups: what ``Linearizer`` made of the steps.
        state: any state of the block, for its shape, dtype and device.
        parameters: name → parameter.
        sliced: the parameters whose influence is kept slice by slice.

    Raises:
        SparsityError: a slice was used that was not declared active.

    Cost: a step and sample, ``u·w·c·width³`` for the suffix products and ``u·w·width²`` times the size of each tap's
        output; then, a block, one product of the size of the active parameters times ``u·width``.
    """
    size, n = state.shape[:2]
    sweep = _sweep(groups, state, n, state[0, 0].numel())
    losses = not all(group.lossless for group in groups)

    births: dict[str, Birth] = {}
    gradient: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        slices = parameter.shape[0] if name in sliced else 1
        keys = _active_keys(groups, name, slices, size, state.device)
        born = state.new_zeros(keys.numel(), sweep.transition.jacobian.shape[1], parameter.numel() // slices)
        births[name] = Birth(keys, born)
        if losses:
            gradient[name] = torch.zeros_like(parameter)

    for group, suffix, pulled in zip(groups, sweep.suffix, sweep.pulled, strict=True):
        for tap in group.taps:
            name = tap.tap.name
            if losses:
                gradient[name] += _earned(tap, pulled, parameters[name].shape)
            if name not in group.general:
                shape = parameters[name].shape
                active = _active(group, name, shape[0], size, state.device) if name in sliced else None
                _bear(births[name], tap, suffix, shape, active)
        if group.general:
            for name, jacobian in group.jacobians(suffix.permute(1, 2, 0, 3)).items():
                _bear_general(births[name], name, jacobian, parameters[name].shape[0] if name in sliced else 1)
            if losses:
                for part in (group.direct, group.pull(pulled)):
                    for name, value in part.items():
                        gradient[name] += value
    return BlockResult(sweep.transition, births, gradient)


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Both sweeps of a block: suffix products C_τ[rows, writes_τ], (m, B, u·width, w·width) a group;
    λ_{τ+1}[writes_τ], (m, B, w·width)."""

    transition: Transition
    suffix: list[Tensor]
    pulled: list[Tensor]


def _sweep(groups: Sequence[Linearization], state: Tensor, n: int, width: int) -> _Sweep:
    size = state.shape[0]
    rows_mask: Tensor | None = torch.zeros(size, n, dtype=torch.bool, device=state.device)
    cols_mask = rows_mask
    for group in groups:
        rows_mask = _rows.union(rows_mask, _by_sample(group.writes), n)
        cols_mask = _rows.union(cols_mask, _by_sample(group.cols), n)
    rows = _rows.members(rows_mask)
    cols = None if rows is None else _rows.members(_rows.union(cols_mask, rows, n))
    c = n if cols is None else cols.shape[1]
    table = None if cols is None else _rows.locate(cols, n)

    def local(index: Tensor | None) -> Tensor | None:
        return index if index is None or table is None else table.gather(1, index)

    # The suffix product of the rows that the block writes, its columns in front: (B, c, u·width, width).
    product = torch.eye(c * width, dtype=state.dtype, device=state.device).expand(size, -1, -1)
    inside = local(rows)
    product = (
        _rows.take(product.unflatten(1, (c, width)), inside).flatten(1, 2).unflatten(2, (c, width)).transpose(1, 2)
    )
    adjoint = state.new_zeros(size, c, width)
    suffix: list[list[Tensor]] = [[] for _ in groups]
    pulled: list[list[Tensor]] = [[] for _ in groups]
    order = sorted(((t, i, j) for i, group in enumerate(groups) for j, t in enumerate(group.times)), reverse=True)
    for _, i, j in order:
        group = groups[i]
        writes, read = (None if t is None else local(t[j]) for t in (group.writes, group.cols))
        jacobian = group.jacobian[j]
        reach = _rows.take(product, writes).transpose(1, 2).flatten(2)  # (B, u·width, w·width)
        weight = _rows.take(adjoint, writes).flatten(1)
        suffix[i].append(reach)
        pulled[i].append(weight)
        onward = flushed(torch.bmm(reach, jacobian)).unflatten(2, (-1, width)).transpose(1, 2)
        back = torch.bmm(weight.unsqueeze(1), jacobian).squeeze(1) + group.adjoint[j]
        product = _rows.add(_rows.zero(product, writes), read, onward) if writes is not None else onward
        adjoint = _rows.add(_rows.zero(adjoint, writes), read, back.unflatten(1, (-1, width)))
    transition = Transition(rows, cols, product.transpose(1, 2).flatten(2), adjoint.flatten(1), n, width)
    return _Sweep(transition, [torch.stack(s[::-1]) for s in suffix], [torch.stack(p[::-1]) for p in pulled])


def _by_sample(index: Tensor | None) -> Tensor | None:
    """(m, B, k) → (B, m·k)."""
    return None if index is None else index.transpose(0, 1).flatten(1)


def _active_keys(groups: Sequence[Linearization], name: str, slices: int, size: int, device: torch.device) -> Tensor:
    """``sample · slices + slice`` of all slices of a parameter that were active in the block, ascending, without
    repeats."""
    first = torch.arange(size, device=device)[None, :, None] * slices
    found = [(first + _active(group, name, slices, size, device)).flatten() for group in groups]
    keys: Tensor = torch.cat(found).unique()
    return keys


def _active(group: Linearization, name: str, slices: int, size: int, device: torch.device) -> Tensor:
    """The slices of a parameter that were active, (m, B, k): all of them at steps that do not name it."""
    declared = group.active.get(name) if slices > 1 else None
    if declared is not None:
        return declared
    return torch.arange(slices, device=device).expand(len(group.times), size, -1)


def _earned(tap: LinearTap, pulled: Tensor, shape: torch.Size) -> Tensor:
    """The gradient that one use of a parameter earns inside the block: ``Σ (∂ℓ/∂z + λ ∂h_next/∂z) ⊗ u``."""
    use = tap.tap
    k, length, o = use.shape
    weight = torch.einsum("mbw,mbwklo->mbklo", pulled, tap.response)
    n = weight.shape[0] * weight.shape[1]
    weight = weight.reshape(n, k, length, o)
    if tap.earned is not None:
        weight = weight + tap.earned
    if use.index is not None:
        right = None if use.inputs is None else use.inputs.expand(-1, k, -1, -1).flatten(0, 1)
        return segment_products(weight.reshape(n * k, 1, length, o), right, use.index.flatten(), shape[0]).reshape(
            shape
        )
    if use.inputs is None:
        return weight.sum(dim=(0, 1, 2)).reshape(shape)
    product = weight.reshape(n * length, o).T @ use.inputs.reshape(n * length, use.inputs.shape[-1])
    return product.T if use.transposed else product.reshape(shape)


def _bear(birth: Birth, tap: LinearTap, suffix: Tensor, shape: torch.Size, active: Tensor | None) -> None:
    """Add ``Σ_τ C_τ B_τ`` of one use of a parameter, in place. ``active`` (m, B, k) is given for parameters kept slice
    by slice."""
    use = tap.tap
    k, length, o = use.shape
    m, size, u = suffix.shape[:3]
    left = torch.bmm(suffix.flatten(0, 1), tap.response.flatten(0, 1).flatten(2)).reshape(m, size, u, k, length, o)
    right = use.inputs
    if use.index is None and active is None:
        rows = left.permute(1, 2, 5, 0, 3, 4).reshape(size, u * o, m * length)
        if right is None:
            born = rows.sum(dim=2).reshape(size, u, o, 1)
        else:
            i = right.shape[-1]
            factors = right.reshape(m, size, length, i).transpose(0, 1).reshape(size, m * length, i)
            born = torch.bmm(rows, factors).reshape(size, u, o, i)
        if use.transposed:
            born = born.transpose(2, 3)
        birth.values.add_(born.reshape(birth.values.shape))
        return

    slices = shape[0]
    if use.index is None:
        assert active is not None
        left, right, k = _only_slices(use.name, left, right, active, use.transposed, (m, size))
        index = active
    else:
        index = use.index.reshape(m, size, k)
        right = None if right is None else right.expand(-1, k, -1, -1).flatten(0, 1)
    owner = (torch.arange(size, device=left.device)[None, :, None] * slices + index).flatten()
    left = left.permute(0, 1, 3, 2, 4, 5).flatten(0, 2)  # (m·B·K, U, L, O)
    if active is not None:
        place = torch.searchsorted(birth.keys, owner).clamp(max=max(birth.keys.numel() - 1, 0))
        if owner.numel() and not bool((birth.keys[place] == owner).all()):
            raise SparsityError(f"a slice of parameter {use.name!r} was used that Sparsity.active does not declare")
        birth.values.add_(segment_products(left, right, place, birth.keys.numel()).reshape(birth.values.shape))
    else:
        used, place = owner.unique(return_inverse=True)
        born = segment_products(left, right, place, used.numel())
        p = birth.values.shape[2] // slices
        spread = birth.values.view(size, u, slices, p)
        spread[used // slices, :, used % slices] += born.reshape(used.numel(), u, p)


def _only_slices(
    name: str, left: Tensor, right: Tensor | None, active: Tensor, transposed: bool, lead: tuple[int, int]
) -> tuple[Tensor, Tensor | None, int]:
    """Cut a use of a whole parameter down to its active slices: rows of z (m, B, U, 1, L, E), or of the inputs if
    transposed."""
    m, size = lead
    u, length, k = left.shape[2], left.shape[4], active.shape[2]
    if transposed:
        if right is None:
            raise SparsityError(f"parameter {name!r} has no slices along its first dimension")
        values = right.reshape(m, size, length, right.shape[-1])
        mine = values.gather(3, active.unsqueeze(2).expand(-1, -1, length, -1))
        _nothing_else(name, values, mine)
        return left.expand(-1, -1, -1, k, -1, -1), mine.permute(0, 1, 3, 2).reshape(m * size * k, length, 1), k
    values = left.squeeze(3)  # (m, B, U, L, E)
    mine = values.gather(4, active[:, :, None, None].expand(-1, -1, u, length, -1))
    _nothing_else(name, values, mine)
    if right is not None:
        right = right.expand(-1, k, -1, -1).flatten(0, 1)
    return mine.permute(0, 1, 2, 4, 3).unsqueeze(5), right, k


def _bear_general(birth: Birth, name: str, jacobian: Tensor, slices: int) -> None:
    """Add the weighted immediate Jacobian (B, U, *shape) of a parameter that no tap covers, in place."""
    size, u = jacobian.shape[:2]
    p = jacobian[0, 0].numel() // slices if size * u else birth.values.shape[2]
    values = jacobian.reshape(size, u, slices, p).transpose(1, 2).reshape(size * slices, u, p)
    mine = values[birth.keys]
    _nothing_else(name, values, mine)
    birth.values.add_(mine)


def _nothing_else(name: str, values: Tensor, chosen: Tensor) -> None:
    if int(values.count_nonzero()) != int(chosen.count_nonzero()):
        raise SparsityError(f"a slice of parameter {name!r} was used that Sparsity.active does not declare")
