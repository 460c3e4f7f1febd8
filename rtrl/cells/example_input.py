"""Example inputs for a cell that comes without any."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from rtrl.cells.protocol import call_cell

WIDTHS = ("d_in", "input_size", "in_features")
"""The attributes of a module that tell how wide its x is."""


def guessed_input(cell: nn.Module, state: Tensor) -> Callable[[], Tensor] | None:
    """Return a function that draws a random x for ``state`` (B, n, ...), the same ones every time.

    x is as wide as an attribute of the cell, or of a module in it, says; None if the cell takes no such x.
    """
    generator = torch.Generator().manual_seed(0)
    for draw in _candidates(cell, state, generator):
        try:
            with torch.no_grad():
                call_cell(cell, draw(), state.clone(), None)
        except Exception:
            continue
        return draw
    return None


def _candidates(cell: nn.Module, state: Tensor, generator: torch.Generator) -> Iterator[Callable[[], Tensor]]:
    """Functions that draw an x, the likeliest first."""
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
