"""Several steps of a cell at once, without a graph: one copy and one check of all inputs, and of all results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rtrl._engine import checks, deferred
from rtrl._engine.contract import check_purity
from rtrl._engine.recorded import RecordedSequence, RecordedStep
from rtrl._engine.step import NOT_TAKEN, check_state_beside_parameters, not_taken, tensors_with_graph
from rtrl._engine.surroundings import any_autocast, check_surroundings
from rtrl._utils import pytrees
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.protocol import Sparsity, call_cell, check_input, check_sparsity, own_copy
from rtrl.cells.sequences import HasUnroll
from rtrl.errors import CellError, RTRLError, ShapeError

_Result = TypeVar("_Result")


def count_steps(xs: Any) -> int:
    """Return m, the first dimension of all tensors of ``xs``.

    Raises:
        ShapeError: there is no tensor, no step, or not one m.
    """
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in pytrees.tensors(xs)}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in pytrees.tensors(xs)) or "no tensor"
        raise ShapeError(f"xs must hold tensors (m, B, ...) with one m, at least 1, got {shapes}")
    return lengths.pop()


def take_sequence(
    cell: nn.Module, xs: Any, h: Tensor, number: int, named: Mapping[str, Tensor], input_grad: bool = False
) -> tuple[list[RecordedStep], Any, Tensor]:
    """Take the steps from ``number`` on, from the state ``h``.

    Args:
        xs: tensors (m, B, ...).
        named: the cell's parameters by name.
        input_grad: record the tensors of an x that requires grad as ``sources``, which is refused otherwise.

    Returns:
        The records of the steps; y, stacked, its continuous tensors leaves that require grad; and the next state.

    Raises:
        ConfigError, ShapeError, CellError, SparsityError, NonFiniteError: see ``Learner.unroll``.
    """
    if any_autocast() or parametrize._cache_enabled:
        check_surroundings()
    with_graph = tensors_with_graph(xs, number, input_grad) if torch.is_grad_enabled() else []
    sources = zip(*(leaf.unbind() for leaf in with_graph), strict=True) if with_graph else ()
    with torch.no_grad(), _naming_moved_parameters(h, named):
        xs = _checked_copy(xs, h, number)
        by_step = _unbind(xs)
        if number == 0:
            _called(check_purity, cell, by_step[0], h.clone(), None, number=number)
        found = _at_once(cell, xs, h, number, len(by_step))
        ys, states, sparsities = _one_by_one(cell, by_step, h, number, named) if found is None else found
        leaves = [leaf.requires_grad_() for leaf in pytrees.tensors(ys) if is_continuous(leaf)]
        rows = list(zip(*(leaf.detach().unbind() for leaf in leaves), strict=True)) or [()] * len(by_step)
        dense = found is not None or all(_is_dense(sparsity) for sparsity in sparsities)
        kind = RecordedStep(by_step[0], h, Sparsity(), [], number).kind() if dense else None
        sequence = RecordedSequence(xs, states, leaves, kind)
        steps = [
            RecordedStep(x, before, sparsity, list(row), number + k, sequence=sequence, index=k)
            for k, (x, before, sparsity, row) in enumerate(
                zip(by_step, states[:-1].unbind(), sparsities, rows, strict=True)
            )
        ]
    for step, of_step in zip(steps, sources, strict=False):
        step.sources = list(of_step)
    return steps, ys, states[-1].clone()


def _called(call: Callable[..., _Result], cell: Any, x: Any, h: Tensor, replay: None, *, number: int) -> _Result:
    """What a call of the cell returns.

    Raises:
        ShapeError: the cell does not take x, or the state.
    """
    try:
        return call(cell, x, h, replay)
    except RTRLError:
        raise
    except NOT_TAKEN as error:
        if is_out_of_memory(error):
            raise
        raise not_taken(error, x, h, number) from error


def _unrolled(cell: HasUnroll, xs: Any, h: Tensor, replay: None) -> Any:
    return cell.unroll(xs, h)


@contextmanager
def _naming_moved_parameters(h: Tensor, named: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        yield
    except (ShapeError, CellError) as error:
        check_state_beside_parameters(h, named, error)
        raise


def _checked_copy(xs: Any, h: Tensor, number: int) -> Any:
    """Check and copy each tensor of xs, all steps in one pass."""

    def copy(leaf: Tensor) -> Tensor:
        check_input("x", leaf[0], h.shape[0], h)
        if deferred.on_host(h) and not checks.finite(leaf):
            for k, row in enumerate(leaf):
                checks.check_finite("x", row, number + k)
        return leaf.clone(memory_format=torch.contiguous_format)

    return pytrees.map_tensors(copy, xs)


def _is_dense(sparsity: Sparsity) -> bool:
    return sparsity.reads is None and sparsity.writes is None and not sparsity.active


def _unbind(xs: Any) -> list[Any]:
    """Trees of tensors (m, B, ...) → m trees of tensors (B, ...)."""
    if isinstance(xs, Tensor):
        return list(xs.unbind())
    leaves, refill = pytrees.flatten(xs)
    count = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    columns = [leaf.unbind() if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
    return [refill(list(row)) for row in zip(*columns, strict=True)]


def _at_once(cell: nn.Module, xs: Any, h: Tensor, number: int, count: int) -> tuple[Any, Tensor, list[Sparsity]] | None:
    """All steps by the cell's own ``unroll``: y and the states, stacked; None if it has none for this call."""
    if not isinstance(cell, HasUnroll):
        return None
    out = _called(_unrolled, cell, xs, h.clone(), None, number=number)
    if out is None:
        return None
    kind = type(cell).__name__
    if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[1], Tensor):
        raise CellError(f"{kind}.unroll must return None or (ys, states), got {type(out).__name__}")
    ys, after = out
    if after.shape != (count, *h.shape) or after.dtype != h.dtype or after.device != h.device:
        raise CellError(
            f"{kind}.unroll must return states {(count, *h.shape)} {h.dtype} {h.device}, got {tuple(after.shape)} "
            f"{after.dtype} {after.device}"
        )
    for leaf in pytrees.tensors(ys):
        if leaf.shape[:2] != (count, h.shape[0]):
            raise CellError(
                f"{kind}.unroll must return y of shape ({count}, {h.shape[0]}, ...), got {tuple(leaf.shape)}"
            )
    states = torch.cat([h.unsqueeze(0), after])
    if deferred.on_host(h) and not checks.all_finite([*pytrees.tensors(ys), states]):
        for k, y in enumerate(_unbind(ys)):
            checks.check_output(y, h, states[k + 1], number + k)
    return pytrees.map_tensors(torch.clone, ys), states, [Sparsity(None, None, {})] * count


def _one_by_one(
    cell: nn.Module, xs: Sequence[Any], h: Tensor, number: int, named: Mapping[str, Tensor]
) -> tuple[Any, Tensor, list[Sparsity]]:
    """All steps one by one: y and the states, stacked, and what each step declares."""
    states = h.new_empty(len(xs) + 1, *h.shape)
    rows = states.unbind()
    rows[0].copy_(h)
    ys: list[Any] = []
    sparsities: list[Sparsity] = []

    def check_values() -> None:
        if not checks.all_finite([*(leaf for y in ys for leaf in pytrees.tensors(y)), states[: len(ys) + 1]]):
            for k, y in enumerate(ys):
                checks.check_output(y, h, rows[k + 1], number + k)

    try:
        for k, x in enumerate(xs):
            before, version = rows[k], states._version
            y, after, sparsity = _called(call_cell, cell, x, before, None, number=number + k)
            if states._version != version:
                raise CellError(f"step {number + k}: the cell changes the state h in place; it must return a new one")
            checks.check_output(y, h, after, number + k, known=True)
            check_sparsity(sparsity, before, named)
            if sparsity.writes is not None:
                checks.check_copied(before, after, sparsity.writes, number + k)
            rows[k + 1].copy_(after)
            ys.append(y)
            sparsities.append(own_copy(sparsity))
    except RTRLError:
        if deferred.on_host(h):
            check_values()  # NaN of an earlier step may be what is wrong
        raise
    stacked = _stacked(ys, number)
    if deferred.on_host(h) and not checks.all_finite([*pytrees.tensors(stacked), states]):
        check_values()
    return stacked, states, sparsities


def _stacked(ys: Sequence[Any], number: int) -> Any:
    """Stack the y of all steps.

    Raises:
        CellError: one has another form than that of the first step.
    """
    forms = {(y.shape, y.dtype) if isinstance(y, Tensor) else None for y in ys}
    if len(forms) > 1 or None in forms:
        form = pytrees.signature(ys[0])
        for k, y in enumerate(ys):
            if pytrees.signature(y) != form:
                raise CellError(
                    f"step {number + k}: y has another structure, shape or dtype than at step {number}, so that they "
                    "cannot be stacked; take these steps by step()"
                )
    return pytrees.stack(ys)
