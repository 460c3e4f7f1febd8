"""What a user wants checked, as specs, and inputs for a cell that comes without any."""

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
    """The specs that an object stands for: a spec or a list of them; else a function, told apart by how many arguments
    it must be given: none makes a cell, two a learner ``(cell, batch_size)``, three are ``(cell, xs, loss_fn)``.

    Raises:
        ConfigError: it stands for none.
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
        raise ConfigError(f"{target} is no spec, no list of specs and no function, but {type(found).__name__}")
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
    """How many arguments a function must be given."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target} does not say what arguments it takes; give a LearnerSpec or a CellSpec") from error
    several = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    if several and not isinstance(function, type):
        raise ConfigError(f"{target} takes *{several[0]}, so it does not say what it makes; give a spec")
    keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if keyword:
        raise ConfigError(f"{target} must be given {keyword[0]}=; wrap it in a function that does")
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def cell_spec(make_cell: Callable[[], Any], name: str) -> CellSpec:
    """The spec of a function that gives a cell, or a pair of a cell and the inputs of some steps.

    Raises:
        ConfigError: it gives something else, or a cell whose inputs cannot be guessed.
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
    """Random inputs of a few steps, as wide as the cell or a module in it says that it takes.

    Raises:
        ConfigError: it says nothing that the cell then takes.
    """
    draw = guessed_input(cell, first_state(cell, _BATCH))
    if draw is not None:
        return [draw() for _ in range(_STEPS)]
    raise ConfigError(
        f"what {type(cell).__name__} takes cannot be guessed: {', '.join(WIDTHS)} of the cell and of the modules in "
        "it were tried; let the function return the pair (cell, inputs), inputs being the x of some steps"
    )
