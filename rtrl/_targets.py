"""``package.module:name`` → the object, and example inputs for a cell that comes without any."""

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtrl.cells.protocol import call_cell
from rtrl.errors import ConfigError

WIDTHS = ("d_in", "input_size", "in_features")
"""The attributes by which a cell, or a module in it, says how wide its x is."""


def load(target: str) -> Any:
    """The object that ``package.module:name`` stands for; the present folder is looked in, too.

    Raises:
        ConfigError: there is no such thing.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{target!r} must have the form package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module_name} has no {name!r}")
        found = getattr(found, part)
    return found


def guessed_input(cell: nn.Module, state: Tensor) -> Callable[[], Tensor] | None:
    """Draws a random x for ``state`` (B, n, ...), as wide as the cell or a module in it says that it takes; None if it
    says nothing that the cell then takes. The generator is its own, so the draws are the same every time."""
    generator = torch.Generator().manual_seed(0)
    for draw in _candidates(cell, state, generator):
        try:
            with torch.no_grad():
                call_cell(cell, draw(), state.clone(), None)
        except Exception:
            continue  # not its input; the next
        return draw
    return None


def _candidates(cell: nn.Module, state: Tensor, generator: torch.Generator) -> Iterator[Callable[[], Tensor]]:
    """Ways to draw an x, the likeliest first."""
    batch = state.shape[0]

    def numbers(width: int) -> Tensor:
        return torch.randn(batch, width, generator=generator, device="cpu").to(state)

    def symbols(count: int) -> Tensor:
        return torch.randint(0, count, (batch,), generator=generator, device="cpu").to(state.device)

    for module in cell.modules():
        widths = [getattr(module, name) for name in WIDTHS if isinstance(getattr(module, name, None), int)]
        yield from (partial(numbers, width) for width in widths)
        if isinstance(module, nn.Embedding):
            yield partial(symbols, module.num_embeddings)
