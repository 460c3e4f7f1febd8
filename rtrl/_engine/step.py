"""One step of a cell without a graph: what goes in is checked and copied, what comes out is checked and cut off."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.linearization import Step
from rtrl._utils import pytrees
from rtrl.cells.protocol import Sparsity, call_cell, check_input, check_sparsity, own_copy, same_choices
from rtrl.errors import CellError, ConfigError, RTRLError, ShapeError, SparsityError


def check_replay(replay: Any, taken: bool, h: Tensor, named: Mapping[str, Tensor]) -> None:
    """Refuse choices that cannot be made in the state ``h``.

    Args:
        taken: whether the cell's forward takes such an argument. named: its parameters.

    Raises:
        SparsityError, ConfigError: saying what was wrong.
    """
    if not isinstance(replay, Sparsity):
        raise SparsityError(f"replay must be rtrl.Sparsity, got {type(replay).__name__}")
    if not taken:
        raise ConfigError("replay was given, but the cell's forward takes no replay argument")
    check_sparsity(replay, h, named)


def take(
    cell: nn.Module, x: Any, h: Tensor, replay: Sparsity | None, number: int, first: bool, named: Mapping[str, Tensor]
) -> tuple[Step, Any, Tensor]:
    """Take the step ``number`` from the state ``h``, of which the cell gets a copy.

    Args:
        first: run the cell twice, and refuse it if it is impure. named: its parameters.

    Returns:
        What is to be kept of the step; a copy of y, its floating-point tensors leaves that require grad; and the next
        state.

    Raises:
        ShapeError, CellError, SparsityError, NonFiniteError: see ``BlockRTRL.step``.

    Cost: one forward pass; elsewhere than on a CPU, one look at x and one at y and the next state, and two more where
        there is sparsity.
    """
    grad = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # a torch.no_grad() block costs several times as much
    try:
        x = _own_input(x, h, number)
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
        outputs = [leaf.requires_grad_() for leaf in pytrees.tensors(y) if leaf.is_floating_point()]
        return Step(x, h, own_copy(sparsity), outputs, number), y, h_next
    finally:
        torch._C._set_grad_enabled(grad)


def _own_input(x: Any, h: Tensor, number: int) -> Any:
    leaves = pytrees.tensors(x)
    if not leaves:
        raise ShapeError("x holds no tensor")
    for leaf in leaves:
        check_input("x", leaf, h.shape[0], h)
        if not pytrees.finite(leaf):
            checks.check_finite("x", leaf, number)
    return pytrees.map_tensors(torch.clone, x)


def _run(
    cell: nn.Module, x: Any, h: Tensor, replay: Sparsity | None, number: int, first: bool
) -> tuple[Any, Tensor, Sparsity]:
    """Run the cell on a copy of the state, so that nothing it does can reach the learner's own."""
    h = h.clone()
    try:
        if first:
            checks.check_purity(cell, x, h, replay)
        y, h_next, sparsity = call_cell(cell, x, h, replay)
    except RTRLError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shapes = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in pytrees.tensors(x))
        raise ShapeError(
            f"step {number}: the cell does not take this x ({shapes}) with a state {tuple(h.shape)} {h.dtype}: {error}"
        ) from error
    if h._version:
        raise CellError(f"step {number}: the cell changes the state h in place; it must return a new one")
    return y, h_next.detach() if h_next.requires_grad else h_next, sparsity
