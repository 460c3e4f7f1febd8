"""The protocol of a cell, and the sparsity that it may declare.

A cell is any ``torch.nn.Module`` with ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, a pure function of
``x``, ``h`` and its parameters in which samples (dimension 0) do not interact. A cell that routes also takes
``forward(x, h, replay=None)``: given a ``Sparsity``, it makes exactly those choices.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rtrl.cells.supported import original
from rtrl.errors import CellError, ConfigError, ShapeError, SparsityError


class Sparsity(NamedTuple):
    """Declare what one step of a cell reads, writes and uses, sample by sample.

    Within one sample no index may occur twice. Declaring too much costs time; declaring too little gives wrong
    gradients.

    Equation:
        ``h_next[i] == h[i]`` bit for bit for every row i outside ``writes``; ``h_next[writes]`` and ``y`` depend on
        ``h`` only through the rows ``reads`` and ``writes``; ``∂h_next/∂θ_g = ∂ℓ/∂θ_g = 0`` for every slice g outside
        ``active``.

    Attributes:
        reads: LongTensor (B, r) of rows of the state (its dimension 1), or None for all rows.
        writes: LongTensor (B, w) of rows of the state, or None for all rows.
        active: parameter name → LongTensor (B, k) of slices of that parameter's first dimension. A parameter that is
            not named is always active.
    """

    reads: Tensor | None = None
    writes: Tensor | None = None
    active: Mapping[str, Tensor] = {}


_DENSE = Sparsity()  # of a cell that declares nothing


@runtime_checkable
class Cell(Protocol):
    """A recurrent cell with a first state; see the module's docstring for its contract."""

    def init_state(self, batch_size: int) -> Tensor:
        """Return the first state (``batch_size``, rows, ...): a constant, or a function of parameters, which then learn
        by it."""
        ...


def first_state(cell: nn.Module, batch_size: int) -> Tensor:
    """Return ``cell.init_state(batch_size)``.

    Raises:
        ConfigError: the cell has no such method.
    """
    if not isinstance(cell, Cell):
        raise ConfigError(
            f"{type(cell).__name__} has no init_state(batch_size); define it, or pass the first state as an argument"
        )
    return cell.init_state(batch_size)


def takes_replay(cell: nn.Module) -> bool:
    """Whether ``cell.forward`` accepts a ``replay`` argument.

    One that takes any keyword (``**kwargs``) does if it names ``replay`` itself, or passes it on to a part that takes
    it.
    """
    cell = original(cell)
    parameters = inspect.signature(cell.forward).parameters
    if "replay" in parameters:
        return True
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        return False
    code = getattr(inspect.unwrap(cell.forward), "__code__", None)
    return "replay" in getattr(code, "co_consts", ()) or any(map(takes_replay, cell.children()))


def call_cell(cell: Callable[..., Any], x: Any, h: Tensor, replay: Sparsity | None) -> tuple[Any, Tensor, Sparsity]:
    """Run one step and normalise the result to ``(y, h_next, Sparsity)``.

    Raises:
        CellError: the cell did not return two or three items of the right types.
    """
    out = cell(x, h) if replay is None else cell(x, h, replay=replay)
    if not isinstance(out, tuple) or len(out) not in (2, 3):
        raise CellError(f"a cell must return (y, h_next) or (y, h_next, Sparsity), got {type(out).__name__}")
    y, h_next = out[0], out[1]
    sparsity = out[2] if len(out) == 3 else _DENSE
    if not isinstance(h_next, Tensor):
        raise CellError(
            f"h_next must be a tensor, got {type(h_next).__name__}; pack a state of several tensors into one"
        )
    if not isinstance(sparsity, Sparsity):
        raise CellError(f"the third item a cell returns must be rtrl.Sparsity, got {type(sparsity).__name__}")
    return y, h_next, sparsity


def own_copy(sparsity: Sparsity) -> Sparsity:
    """Copy all index tensors; those that several parameters share stay shared."""
    if sparsity.reads is None and sparsity.writes is None and not sparsity.active:
        return Sparsity(None, None, {})
    copies: dict[int, Tensor] = {}

    def copy(index: Tensor) -> Tensor:
        if id(index) not in copies:
            copies[id(index)] = index.clone()
        return copies[id(index)]

    reads, writes = (None if rows is None else copy(rows) for rows in sparsity[:2])
    return Sparsity(reads, writes, {name: copy(index) for name, index in sparsity.active.items()})


OTHER_CHOICES = (
    "run a second time, the cell makes other choices than the first time; a cell that routes must take "
    "forward(x, h, replay=None) and make exactly the choices of a given Sparsity"
)


def same_choices(first: Sparsity, second: Sparsity) -> bool:
    """Whether two steps touched the same rows and slices, in the same order."""
    if first is second:
        return True
    if first.active.keys() != second.active.keys():
        return False
    pairs = [(first.reads, second.reads), (first.writes, second.writes)]
    pairs += [(index, second.active[name]) for name, index in first.active.items()]
    distinct = {(id(a), id(b)): (a, b) for a, b in pairs if a is not b}  # parameters of one expert share one tensor
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in distinct.values())


def under_vmap(tensor: Tensor) -> bool:
    """Whether a tensor is batched by ``torch.func.vmap``, so that Python code cannot branch on its values."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def check_indices(what: str, index: Any, batch_size: int, size: int, device: torch.device) -> None:
    """Refuse an index tensor that is not a LongTensor (B, k) on the state's device, in range and without repeats.

    Raises:
        SparsityError: it is not; the message says what is wrong and what is expected.
    """
    _check_form(what, index, batch_size, device)
    _check_values([(what, index, size)])


def check_sparsity(sparsity: Sparsity, h: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a malformed ``Sparsity`` for the state ``h`` and the named parameters.

    Raises:
        SparsityError: wrong type, shape, device or range, repeated indices, or an unknown parameter name.

    Cost: one synchronisation with the device for all index tensors together.
    """
    if not isinstance(sparsity.active, (dict, Mapping)):  # the check of a dict takes a tenth of the time
        raise SparsityError(
            f"Sparsity.active must map parameter names to LongTensors, got {type(sparsity.active).__name__}"
        )
    if sparsity.reads is None and sparsity.writes is None and not sparsity.active:
        return
    (batch_size, n), device = h.shape[:2], h.device
    found: dict[tuple[int, int], tuple[str, Tensor, int]] = {}  # many parameters of one expert share one index tensor
    for what, rows in (("Sparsity.reads", sparsity.reads), ("Sparsity.writes", sparsity.writes)):
        if rows is not None:
            _check_form(what, rows, batch_size, device)
            found.setdefault((id(rows), n), (what, rows, n))
    for name, slices in sparsity.active.items():
        if name not in parameters:
            raise SparsityError(f"Sparsity.active names {name!r}, which is not a parameter of the cell")
        shape = parameters[name].shape
        if not shape:
            raise SparsityError(f"Sparsity.active[{name!r}]: a scalar parameter has no slices")
        if (id(slices), shape[0]) not in found:
            what = f"Sparsity.active[{name!r}]"
            _check_form(what, slices, batch_size, device)
            found[id(slices), shape[0]] = what, slices, shape[0]
    _check_values(list(found.values()))


def _check_form(what: str, index: Any, batch_size: int, device: torch.device) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise SparsityError(f"{what} must be a LongTensor of shape (B, k), got {kind}")
    if index.ndim != 2 or index.shape[0] != batch_size:
        raise SparsityError(f"{what} must have shape ({batch_size}, k), got {tuple(index.shape)}")
    if index.device != device:
        raise SparsityError(
            f"{what} is on {index.device}, the state on {device}; declare sparsity on the state's device"
        )


_FEW = 256  # up to this many indices, a loop in Python is faster than sorting and comparing


def _check_values(indices: list[tuple[str, Tensor, int]]) -> None:
    """Refuse indices (B, k) outside 0 … size − 1, or repeated within a sample."""
    indices = [(what, index, size) for what, index, size in indices if index.numel()]
    if sum(index.numel() for _, index, _ in indices) <= _FEW:
        if len(indices) > 1 and not indices[0][1].is_cpu:  # one copy from the device, not several
            flat = torch.cat([index.flatten() for _, index, _ in indices]).cpu()
            parts = flat.split([index.numel() for _, index, _ in indices])
            samples = [part.reshape(index.shape).tolist() for part, (_, index, _) in zip(parts, indices, strict=True)]
        else:
            samples = [index.tolist() for _, index, _ in indices]
        valid = all(_valid_lists(rows, size) for rows, (_, _, size) in zip(samples, indices, strict=True))
    else:
        valid = bool(torch.stack([_valid(index, size) for _, index, size in indices]).all())
    if valid:
        return
    for what, index, size in indices:  # which one: only on the way to an error
        ordered = index.sort(dim=1).values
        if bool((ordered[:, 0] < 0).any()) or bool((ordered[:, -1] >= size).any()):
            raise SparsityError(f"{what} must lie in 0 … {size - 1}, got {int(ordered.min())} … {int(ordered.max())}")
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            sample = int((ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()[0])
            raise SparsityError(f"{what} repeats an index within sample {sample}: {index[sample].tolist()}")


def _valid_lists(rows: list[list[int]], size: int) -> bool:
    return all(len(set(row)) == len(row) and min(row) >= 0 and max(row) < size for row in rows)


def _valid(index: Tensor, size: int) -> Tensor:
    ordered = index.sort(dim=1).values
    inside = (ordered[:, 0] >= 0) & (ordered[:, -1] < size)
    return inside.all() & (ordered[:, 1:] > ordered[:, :-1]).all()


def check_input(what: str, tensor: Tensor, batch_size: int, like: Tensor) -> None:
    """Refuse an input tensor whose batch, floating-point dtype or device does not match the state's.

    Raises:
        ShapeError: it does not match; the message says what is wrong and what is expected.
    """
    if tensor.ndim == 0 or tensor.shape[0] != batch_size:
        raise ShapeError(f"{what} must have the batch of {batch_size} as dimension 0, got shape {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ShapeError(f"{what} is on {tensor.device}, the state on {like.device}; move one of them")
    if tensor.is_floating_point() and tensor.dtype != like.dtype:
        raise ShapeError(f"{what} is {tensor.dtype}, the state {like.dtype}; convert one of them")
