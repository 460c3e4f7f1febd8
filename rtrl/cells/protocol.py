"""What a cell is, and the sparsity that it may declare.

A cell is any ``torch.nn.Module`` with ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, a pure function of
``x``, ``h`` and its parameters in which samples (dimension 0) never meet. A cell that routes also takes
``forward(x, h, replay=None)``: given a ``Sparsity``, it makes those choices and no others.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rtrl.errors import CellError, ConfigError, ShapeError, SparsityError


class Sparsity(NamedTuple):
    """What one step of a cell touches, sample by sample.

    Equation: ``h_next[i] == h[i]`` bit for bit for every row i outside ``writes``; ``h_next[writes]`` and ``y`` depend
    on ``h`` through the rows ``reads`` and ``writes`` alone; ``∂h_next/∂θ_g = ∂ℓ/∂θ_g = 0`` for every slice g outside
    ``active``.

    Args:
        reads: LongTensor (B, r) of rows of the state (its dimension 1), or None for all rows.
        writes: LongTensor (B, w) of rows of the state, or None for all rows.
        active: parameter name → LongTensor (B, k) of slices of that parameter's first dimension. A parameter that is
            not named is always active.

    Within one sample no index may occur twice. Declaring too much is slow and right; declaring too little is wrong.
    """

    reads: Tensor | None = None
    writes: Tensor | None = None
    active: Mapping[str, Tensor] = {}


@runtime_checkable
class Cell(Protocol):
    """A recurrent cell that can start itself (see the module's docstring for its contract)."""

    def init_state(self, batch_size: int) -> Tensor:
        """The first state, of shape (batch_size, rows, ...)."""
        ...


def first_state(cell: nn.Module, batch_size: int) -> Tensor:
    """What ``cell.init_state(batch_size)`` gives.

    Raises:
        ConfigError: the cell has no such method.
    """
    if not isinstance(cell, Cell):
        raise ConfigError(
            f"{type(cell).__name__} has no init_state(batch_size); give it one, or pass its first state yourself"
        )
    return cell.init_state(batch_size)


def takes_replay(cell: nn.Module) -> bool:
    """Whether ``cell.forward`` accepts a ``replay`` argument."""
    parameters = inspect.signature(cell.forward).parameters
    return "replay" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def call_cell(cell: Callable[..., Any], x: Any, h: Tensor, replay: Sparsity | None) -> tuple[Any, Tensor, Sparsity]:
    """Run one step and normalise what comes back to ``(y, h_next, Sparsity)``.

    Raises:
        CellError: the cell returned something else than two or three items of the right kinds.
    """
    out = cell(x, h) if replay is None else cell(x, h, replay=replay)
    if not isinstance(out, tuple) or len(out) not in (2, 3):
        raise CellError(f"a cell must return (y, h_next) or (y, h_next, Sparsity), got {type(out).__name__}")
    y, h_next = out[0], out[1]
    sparsity = out[2] if len(out) == 3 else Sparsity()
    if not isinstance(h_next, Tensor):
        raise CellError(
            f"h_next must be a tensor, got {type(h_next).__name__}; pack a state of several tensors into one"
        )
    if not isinstance(sparsity, Sparsity):
        raise CellError(f"the third item a cell returns must be rtrl.Sparsity, got {type(sparsity).__name__}")
    return y, h_next, sparsity


def own_copy(sparsity: Sparsity) -> Sparsity:
    """A copy that nobody else can change; tensors that were shared stay shared."""
    copies: dict[int, Tensor] = {}

    def copy(index: Tensor | None) -> Tensor | None:
        return None if index is None else copies.setdefault(id(index), index.clone())

    active = {name: copies.setdefault(id(index), index.clone()) for name, index in sparsity.active.items()}
    return Sparsity(copy(sparsity.reads), copy(sparsity.writes), active)


OTHER_CHOICES = (
    "run again, the cell makes other choices than it did; a cell that routes must take forward(x, h, replay=None) "
    "and make "
    "exactly the choices of a given Sparsity"
)


def same_choices(one: Sparsity, two: Sparsity) -> bool:
    """Whether two steps touched the same rows and slices, in the same order."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return (
        same(one.reads, two.reads)
        and same(one.writes, two.writes)
        and one.active.keys() == two.active.keys()
        and all(same(index, two.active[name]) for name, index in one.active.items())
    )


def under_vmap(tensor: Tensor) -> bool:
    """Whether a tensor stands for one of many under ``torch.func.vmap``, so that its values cannot steer Python
    code."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def check_indices(what: str, index: Any, batch_size: int, size: int, device: torch.device) -> None:
    """Refuse an index tensor that is not (B, k) long, on the state's device, in range and free of repeats.

    Raises:
        SparsityError: naming what was wrong and what was expected.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise SparsityError(f"{what} must be a LongTensor of shape (B, k), got {kind}")
    if index.ndim != 2 or index.shape[0] != batch_size:
        raise SparsityError(f"{what} must have shape ({batch_size}, k), got {tuple(index.shape)}")
    if index.device != device:
        raise SparsityError(
            f"{what} is on {index.device}, the state on {device}; declare sparsity on the state's device"
        )
    if index.shape[1] == 0:
        return
    ordered = index.sort(dim=1).values
    if bool((ordered[:, 0] < 0).any()) or bool((ordered[:, -1] >= size).any()):
        raise SparsityError(f"{what} must lie in 0 … {size - 1}, got {int(ordered.min())} … {int(ordered.max())}")
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        sample = int((ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()[0])
        raise SparsityError(f"{what} repeats an index within sample {sample}: {index[sample].tolist()}")


def check_sparsity(sparsity: Sparsity, h: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a malformed ``Sparsity`` for the state ``h`` and the named parameters.

    Raises:
        SparsityError: wrong kind, shape, device or range, repeated indices, or an unknown parameter name.
    """
    if not isinstance(sparsity.active, Mapping):
        raise SparsityError(
            f"Sparsity.active must map parameter names to LongTensors, got {type(sparsity.active).__name__}"
        )
    for name, rows in (("reads", sparsity.reads), ("writes", sparsity.writes)):
        if rows is not None:
            check_indices(f"Sparsity.{name}", rows, h.shape[0], h.shape[1], h.device)
    checked: set[tuple[int, int]] = set()  # many parameters of one expert share one index tensor
    for name, slices in sparsity.active.items():
        if name not in parameters:
            raise SparsityError(f"Sparsity.active names {name!r}, which is no parameter of the cell")
        if parameters[name].ndim == 0:
            raise SparsityError(f"Sparsity.active[{name!r}]: a scalar parameter has no slices")
        key = (id(slices), parameters[name].shape[0])
        if key not in checked:
            check_indices(f"Sparsity.active[{name!r}]", slices, h.shape[0], parameters[name].shape[0], h.device)
            checked.add(key)


def check_input(what: str, tensor: Tensor, batch_size: int, like: Tensor) -> None:
    """Refuse an input tensor whose batch, float dtype or device does not match the state's.

    Raises:
        ShapeError: naming what was wrong and what was expected.
    """
    if tensor.ndim == 0 or tensor.shape[0] != batch_size:
        raise ShapeError(f"{what} must have the batch of {batch_size} as dimension 0, got shape {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ShapeError(f"{what} is on {tensor.device}, the state on {like.device}; move one of them")
    if tensor.is_floating_point() and tensor.dtype != like.dtype:
        raise ShapeError(f"{what} is {tensor.dtype}, the state {like.dtype}; convert one of them")
