"""Streams of one cell, for a learner that is made for this cell only."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtrl.cells.example_input import WIDTHS, guessed_input
from rtrl.cells.protocol import first_state
from rtrl.errors import ConfigError
from rtrl.testing.streams import Loss, Stream, squares


def streams_for(
    make_cell: Callable[[], nn.Module],
    make_xs: Callable[[int, int], Tensor] | None = None,
    *,
    loss: Loss = squares,
    batch: int | None = None,
) -> list[Stream]:
    """Make streams of one cell: of three samples, wide ones of five and of one, one with resets, and a long one.

    Args:
        make_cell: returns the cell, with ``init_state``; it is converted to float64.
        make_xs: ``make_xs(steps, batch_size)`` returns the inputs (T, B, ...) of a stream, in float64 or integers. By
            default they are normal numbers, as wide as the cell or a module in it declares.
        loss: ``loss(t, y)`` returns the scalar loss of step t, a sum over samples, or None.
        batch: the batch size of all streams, for a learner of one batch size.

    Returns:
        Five streams, three if the batch size is given. Those with resets are left out for a learner without ``reset``.

    Raises:
        ConfigError: ``make_cell`` does not return a cell, or what it takes cannot be guessed.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.testing import LearnerSpec, check_learner, streams_for
        >>> streams = streams_for(lambda: rtrl.cells.from_torch(torch.nn.GRUCell(3, 4)))
        >>> [(stream.name, stream.steps, stream.batch_size) for stream in streams][:2]
        [('TorchCell', 14, 3), ('TorchCell, five samples', 8, 5)]
        >>> check_learner(LearnerSpec(rtrl.BlockRTRL, streams=streams), checks=["own streams"]).passed
        True
    """
    if isinstance(make_cell, nn.Module) or not callable(make_cell):
        raise ConfigError(f"make_cell must be a function that returns a cell, got {type(make_cell).__name__}")
    cell = make_cell()
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"make_cell() must return a torch.nn.Module, got {type(cell).__name__}")
    cell = cell.double()
    name = type(cell).__name__

    def stream(words: str, steps: int, batch_size: int, **events: object) -> Stream:
        size = batch_size if batch is None else batch
        xs = _guessed(cell, steps, size) if make_xs is None else make_xs(steps, size)
        return Stream(cell, xs, **{"loss": loss, "name": name + words, **events})  # type: ignore[arg-type]

    def now_and_then(t: int, y: object) -> Tensor | None:
        return loss(t, y) if t % 10 == 9 or t < 3 else None

    flags = torch.zeros(34, 2 if batch is None else batch, dtype=torch.bool)
    for number, t in enumerate((1, 2, 4, 8, 12, 16, 20, 24, 32)):
        flags[t, number % flags.shape[1]] = True
    found = [
        stream("", 14, 3),
        stream(", five samples", 8, 5),
        stream(", one sample", 8, 1),
        stream(", with resets", 34, 2, resets=flags),
        stream(", long", 150, 2, loss=now_and_then, syncs=frozenset({50, 130})),
    ]
    return found if batch is None else [found[0], *found[3:]]


def _guessed(cell: nn.Module, steps: int, batch: int) -> Tensor:
    draw = guessed_input(cell, first_state(cell, batch))
    if draw is None:
        raise ConfigError(
            f"what {type(cell).__name__} takes cannot be guessed: {', '.join(WIDTHS)} of the cell and of the modules "
            "in it were tried; give make_xs(steps, batch_size), which returns the inputs (T, B, ...)"
        )
    return torch.stack([draw() for _ in range(steps)])
