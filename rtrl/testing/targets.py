"""Turn a user's object into specs, and guess inputs for a cell without any."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rtrl._utils.import_target import load
from rtrl.cells.example_input import WIDTHS, guessed_input
from rtrl.cells.protocol import first_state
from rtrl.errors import ConfigError
from rtrl.testing.pytest_nodes import Spec
from rtrl.testing.spec import CellSpec, LearnerSpec

_STEPS, _BATCH = 3, 4

__all__ = ["cell_spec", "guessed_inputs", "load", "specs_of"]


def specs_of(found: Any, target: str, name: str = "") -> list[Spec]:
    """Turn an object into specs.

    It is a spec, a list of specs, or a function. The number of its arguments says what a function returns: a cell
    without arguments, a learner with two ``(cell, batch_size)``, gradients with three ``(cell, xs, loss_fn)``.

    Raises:
        ConfigError: it is none of these.
    """
    name = name or target.partition(":")[2]
    if isinstance(found, LearnerSpec | CellSpec):
        return [found]
    if isinstance(found, Sequence) and not isinstance(found, str):
        if not found:
            raise ConfigError(f"{target} is empty: there is nothing to check")
        return [spec for item in found for spec in specs_of(item, target, getattr(item, "__name__", ""))]
    if isinstance(found, nn.Module):
        raise ConfigError(f"{target} is a module; give a function that makes it, so that each check has its own")
    if not callable(found):
        raise ConfigError(f"{target} must be a spec, a list of specs or a function, got {type(found).__name__}")
    needed = _needed(found, target)
    if isinstance(found, type) and issubclass(found, nn.Module) and needed:
        raise ConfigError(f"{target} is a class of modules that must be given arguments; give a function without any")
    if needed == 0:
        return [cell_spec(found, name)]
    if needed == 2:
        return [LearnerSpec(found, name=name)]
    if needed == 3:
        return [LearnerSpec(gradients=found, name=name)]
    raise ConfigError(
        f"{target} must be given {needed} arguments; make_cell() takes none, make_learner(cell, batch_size) two, "
        "gradients(cell, xs, loss_fn) three"
    )


def _needed(function: Callable[..., Any], target: str) -> int:
    """The number of arguments that a function requires."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target} does not say what arguments it takes; give a LearnerSpec or a CellSpec") from error
    variadic = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    if variadic and not isinstance(function, type):
        raise ConfigError(f"{target} takes *{variadic[0]}, so it does not say what it makes; give a spec")
    keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if keyword:
        raise ConfigError(f"{target} must be given {keyword[0]}=; wrap it in a function that does")
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def cell_spec(make_cell: Callable[[], Any], name: str) -> CellSpec:
    """Make the spec of a function that returns a cell, or a pair of a cell and the inputs of some steps.

    Raises:
        ConfigError: it returns something else, or a cell whose inputs cannot be guessed.
    """
    try:
        made = make_cell()
    except Exception as error:
        raise ConfigError(f"{name}() raised {type(error).__name__}: {error}") from error
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return CellSpec(lambda: make_cell()[0], made[1], name=name)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name}() must give a cell, or a pair (cell, inputs), got {type(made).__name__}")
    return CellSpec(make_cell, guessed_inputs(made), name=name)


def guessed_inputs(cell: nn.Module) -> Sequence[Tensor]:
    """Draw random inputs for a few steps, as wide as the cell or one of its modules declares.

    Raises:
        ConfigError: no declared width fits the cell.
    """
    draw = guessed_input(cell, first_state(cell, _BATCH))
    if draw is not None:
        return [draw() for _ in range(_STEPS)]
    raise ConfigError(
        f"what {type(cell).__name__} takes cannot be guessed: {', '.join(WIDTHS)} of the cell and of the modules in "
        "it were tried; let the function return the pair (cell, inputs), inputs being the x of some steps"
    )
