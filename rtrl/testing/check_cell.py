"""Check a cell."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._utils import pytrees, validation
from rtrl._utils.real_pairs import as_real, is_continuous
from rtrl.cells.complex_state import RealState
from rtrl.cells.protocol import first_state
from rtrl.cells.supported import check_supported, original
from rtrl.errors import ConfigError
from rtrl.testing.cell_checks.core import run_checks
from rtrl.testing.cell_checks.points import copied, probe
from rtrl.testing.isolation import preserve_global_state
from rtrl.testing.report import Report


def check_cell(
    cell: nn.Module,
    inputs: Sequence[Any],
    *,
    state: Tensor | None = None,
    seed: int = 0,
    on_fail: Literal["raise", "return"] = "raise",
) -> Report:
    """Run every check of ``cell_checks()`` on a cell, and collect all failures.

    The cell runs on the given inputs, and at a perturbed point beside each of them: with perturbed state and parameters
    in float64, a value that is zero by chance (a first state, a gate that starts at zero) cannot hide a dependence.
    Only copies are used: the cell, its buffers, its ``.grad`` and the global random states stay as they are.

    Args:
        cell: ``forward(x, h)`` returns ``(y, h_next)`` or ``(y, h_next, rtrl.Sparsity)``; it may take ``replay=``.
        inputs: the x of at least one step, each a tree of tensors with the batch as dimension 0; best two samples or
            more, and two steps or more. A single sample is doubled, with two different states.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.
        seed: of the perturbed points.
        on_fail: ``"raise"`` or ``"return"``.

    Returns:
        The report of all checks.

    Raises:
        ConfigError: an argument is of the wrong kind, or no learner takes this cell (a lazy parameter, a scripted
            part, a sparse embedding).
        CheckFailed: something failed and ``on_fail`` is ``"raise"``; its ``report`` has all failures.

    Cost:
        Per step, some tens of forward passes, and about ten forward and backward passes per sample.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4))
        >>> check_cell(cell, [torch.ones(2, 3)]).passed
        True
    """
    steps = _checked(cell, inputs, seed, on_fail)
    with preserve_global_state(seed):
        own = copied(original(cell))
        first = _first_state(own, steps[0], state)
        if first.is_complex():
            own, first = RealState(own), as_real(first)
        call = f"check_cell(make_cell(), inputs, {'' if state is None else 'state=state, '}seed={seed})"
        script = f"from rtrl.testing import check_cell\n{call}"
        report = run_checks(probe(own, steps, first, seed), Report(seed=seed, script=script))
    if on_fail == "raise":
        report.raise_for_failures()
    return report


def _checked(cell: Any, inputs: Any, seed: Any, on_fail: Any) -> list[Any]:
    """Check the arguments but the state, and return the inputs as a list of detached copies."""
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
    check_supported(cell)
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes):
        raise ConfigError(
            f"inputs must be a sequence of the x of each step, got {type(inputs).__name__}; for one step give [x]"
        )
    if not inputs:
        raise ConfigError("inputs must hold the x of at least one step, got none")
    check_options(seed, on_fail)
    sizes = set()
    for step, x in enumerate(inputs):
        tensors = pytrees.tensors(x)
        if not tensors or any(t.ndim == 0 for t in tensors):
            raise ConfigError(f"inputs[{step}] must be a tree of tensors with the batch as dimension 0")
        sizes |= {t.shape[0] for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ConfigError(f"all inputs must share one batch of at least 1, got batches of {sorted(sizes)}")
    return [pytrees.map_tensors(lambda t: t.detach().clone(), x) for x in inputs]


def check_options(seed: Any, on_fail: Any) -> None:
    """Check the options of all checks.

    Raises:
        ConfigError: the seed is not an integer of 32 bits, or ``on_fail`` has another value.
    """
    validation.integer("seed", seed, 0, 2**32 - 1)
    validation.choice("on_fail", on_fail, ("raise", "return"))


def _first_state(cell: nn.Module, x: Any, state: Any) -> Tensor:
    """Check the first state, and return a copy of it."""
    batch = pytrees.tensors(x)[0].shape[0]
    if state is None:
        if inspect.isroutine(getattr(cell, "init_state", None)):
            state = first_state(cell, batch)
        else:
            raise ConfigError(f"{type(cell).__name__} has no init_state(batch_size); pass its first state as state=")
    if not isinstance(state, Tensor) or not is_continuous(state):
        kind = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise ConfigError(f"a state must be a floating-point or complex tensor (B, n, ...), got {kind}")
    if state.ndim < 2 or state.shape[0] != batch or not state.numel():
        raise ConfigError(f"a state must have shape ({batch}, n, ...) with n ≥ 1, got {tuple(state.shape)}")
    if not checks.finite(state):
        raise ConfigError("NaN or infinity in the first state")
    return state.detach().clone()
