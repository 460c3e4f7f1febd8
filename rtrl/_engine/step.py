"""One step of a cell without a graph: the input is checked and copied, the results are checked and detached."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rtrl._engine import checks, deferred
from rtrl._engine.contract import check_purity
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.surroundings import any_autocast, check_surroundings
from rtrl._utils import pytrees
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.protocol import Sparsity, call_cell, check_input, check_sparsity, own_copy, same_choices
from rtrl.errors import CellError, ConfigError, RTRLError, ShapeError, SparsityError

NOT_TAKEN = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What a cell raises that does not take its input."""


def check_replay(replay: Any, taken: bool, h: Tensor, named: Mapping[str, Tensor]) -> None:
    """Refuse choices that cannot be made in the state ``h``, or of a cell that takes no ``replay``.

    Raises:
        SparsityError: ``replay`` is not a well-formed Sparsity.
        ConfigError: the cell takes no ``replay``.
    """
    if not isinstance(replay, Sparsity):
        raise SparsityError(f"replay must be rtrl.Sparsity, got {type(replay).__name__}")
    if not taken:
        raise ConfigError("replay was given, but the cell's forward takes no replay argument")
    check_sparsity(replay, h, named)


def take(
    cell: nn.Module,
    x: Any,
    h: Tensor,
    replay: Sparsity | None,
    number: int,
    first: bool,
    named: Mapping[str, Tensor],
    input_grad: bool = False,
) -> tuple[RecordedStep, Any, Tensor]:
    """Take the step ``number`` from the state ``h``.

    Args:
        first: run the cell twice, and refuse it if it is impure.
        named: the cell's parameters by name.
        input_grad: record the tensors of an x that requires grad as its ``sources``, which is refused otherwise.

    Returns:
        The record of the step; a copy of y, its floating-point tensors leaves that require grad; and the next state.

    Raises:
        ConfigError, ShapeError, CellError, SparsityError, NonFiniteError: see ``BlockRTRL.step``.

    Cost: one forward pass. Elsewhere than on a CPU, the host waits for no value, so that NaN and infinity are found
        when the block closes; where there is sparsity, it waits twice.
    """
    if any_autocast() or parametrize._cache_enabled:  # tested here, because a call costs several times as much
        check_surroundings()
    grad = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)  # a torch.no_grad() block costs several times as much
        plain = isinstance(x, Tensor) and not x.requires_grad  # the usual x, for which a call would take longer
        sources = tensors_with_graph(x, number, input_grad) if grad and not plain else []
        x = _checked_copy(x, h, number)
        y, h_next, sparsity = _run(cell, x, h, replay, number, first)
        checks.check_output(y, h, h_next, number)
        check_sparsity(sparsity, h, named)
        if replay is not None and not same_choices(replay, sparsity):
            raise CellError(
                f"step {number}: the cell was given a replay and made other choices; it must return exactly those"
            )
        if sparsity.writes is not None:
            checks.check_copied(h, h_next, sparsity.writes, number)
        y = pytrees.map_tensors(torch.clone, y)
        outputs = [leaf.requires_grad_() for leaf in pytrees.tensors(y) if is_continuous(leaf)]
        return RecordedStep(x, h, own_copy(sparsity), outputs, number, sources=sources), y, h_next
    except (ShapeError, CellError) as error:
        check_state_beside_parameters(h, named, error)
        raise
    finally:
        torch._C._set_grad_enabled(grad)


def _run(
    cell: nn.Module, x: Any, h: Tensor, replay: Sparsity | None, number: int, first: bool
) -> tuple[Any, Tensor, Sparsity]:
    """Run the cell on a copy of the state, so that it cannot change the learner's own."""
    h = h.clone()
    try:
        if first:
            check_purity(cell, x, h, replay)
        y, h_next, sparsity = call_cell(cell, x, h, replay)
    except RTRLError:
        raise
    except NOT_TAKEN as error:
        if is_out_of_memory(error):
            raise
        raise not_taken(error, x, h, number) from error
    if h._version:
        raise CellError(f"step {number}: the cell changes the state h in place; it must return a new one")
    if h_next.requires_grad or h_next._is_view():  # a parameter, for example, or a part of one, which will change
        h_next = h_next.detach().clone()
    return y, h_next, sparsity


def not_taken(error: Exception, x: Any, h: Tensor, number: int) -> ShapeError:
    """Say that the cell does not take x, or the state."""
    shapes = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in pytrees.tensors(x))
    return ShapeError(
        f"step {number}: the cell does not take this x ({shapes}) with a state {tuple(h.shape)} {h.dtype}: {error}"
    )


def tensors_with_graph(x: Any, number: int, input_grad: bool) -> list[Tensor]:
    """Return the tensors of x if one of them requires grad; refuse it if no gradient is to be delivered there."""
    leaves = pytrees.tensors(x)
    if not any(leaf.requires_grad for leaf in leaves):
        return []
    if not input_grad:
        raise ConfigError(
            f"step {number}: x requires grad, but no gradient is delivered to it. Pass x.detach(); or make what "
            "computes x a part of the cell, where its gradient is exact; or use BlockRTRL(..., input_grad='block'), "
            "which gives x the gradient of the losses inside the block"
        )
    return leaves


def check_state_beside_parameters(h: Tensor, named: Mapping[str, Tensor], error: Exception) -> None:
    """Say so if the parameters were converted or moved since the learner was made: no x would do."""
    forms = {(p.dtype, p.device) for p in named.values() if p.is_floating_point()}
    if forms and (h.dtype, h.device) not in forms:
        found = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in forms))
        raise ShapeError(
            f"the learner's state is {h.dtype} on {h.device}, the cell's parameters are {found}: make a new learner, "
            "or convert this one by learner.to(...)"
        ) from error


def _checked_copy(x: Any, h: Tensor, number: int) -> Any:
    """Check and copy each tensor of x, in one pass."""
    if type(x) is Tensor:  # the usual x
        return _checked_leaf(x, h, number)
    count = 0

    def copy(leaf: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return _checked_leaf(leaf, h, number)

    copied = pytrees.map_tensors(copy, x)
    if not count:
        raise ShapeError("x holds no tensor")
    return copied


def _checked_leaf(leaf: Tensor, h: Tensor, number: int) -> Tensor:
    check_input("x", leaf, h.shape[0], h)
    if deferred.on_host(h) and not checks.finite(leaf):
        checks.check_finite("x", leaf, number)
    return leaf.clone()
