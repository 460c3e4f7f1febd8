"""How well a cell does a task, run forward alone."""

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.cells.protocol import call_cell, first_state
from rtrl.errors import ConfigError, ShapeError
from rtrl.tasks.protocol import Task


@torch.no_grad()
def evaluate(
    cell: nn.Module, task: Task, *, batch_size: int, steps: int, seed: int = 0, held_out: bool = True
) -> float:
    """The mean score of a cell over all samples that a stream asks, without a learner and without learning.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with ``init_state(batch_size)``.
        task: what it is asked. batch_size: B. steps: how many steps of the stream it is run.
        seed: of the stream. held_out: take what no training stream gives.

    Returns:
        The score in the task's measure; compare it with ``task.chance`` and ``task.solved``.

    Raises:
        ConfigError: a size is out of range, the cell has no first state, or no sample is asked within ``steps``.
        ShapeError: y does not have the shape that the task needs.

    Cost: ``steps`` forward passes; one state is held.
    """
    validation.integer("batch_size", batch_size)
    validation.integer("steps", steps)
    like = parameter_of(cell)
    stream = task.stream(batch_size, seed=seed, held_out=held_out, dtype=like.dtype, device=like.device)
    first = first_state(cell, batch_size).detach()
    h, total, asked = first, 0.0, 0
    for _ in range(steps):
        moment = next(stream)
        h = torch.where(moment.fresh.reshape(-1, *[1] * (h.ndim - 1)), first, h)
        y, h, _ = call_cell(cell, moment.x, h, None)
        check_answer(y, task, batch_size)
        score, count = task.score(y, moment)
        total, asked = total + score, asked + count
    if not asked:
        raise ConfigError(f"the task {task.name!r} asks nothing within {steps} steps; evaluate over more steps")
    return total / asked


def parameter_of(cell: nn.Module) -> nn.Parameter:
    """The first parameter that learns; its dtype and device are those of the inputs.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
    for parameter in cell.parameters():
        if parameter.requires_grad:
            return parameter
    raise ConfigError("the cell has no parameter that requires a gradient")


def check_answer(y: object, task: Task, batch_size: int) -> None:
    """Refuse a y that is no tensor (B, d_out).

    Raises:
        ShapeError: saying what it is.
    """
    if not isinstance(y, Tensor) or tuple(y.shape) != (batch_size, task.d_out):
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"the task {task.name!r} needs a y of shape ({batch_size}, {task.d_out}) for x of width {task.d_in}, "
            f"the cell gives {found}"
        )
