"""Evaluate a cell on a task, by forward passes only."""

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
    """Compute the mean score of a cell over all targets of a stream, without a learner.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with ``init_state(batch_size)``.
        task: the task.
        batch_size: B.
        steps: the number of steps.
        seed: of the stream.
        held_out: use episodes that are in no training stream.

    Returns:
        The score in the task's measure; compare it with ``task.chance`` and ``task.solved``.

    Raises:
        ConfigError: a size is out of range, the cell has no first state, or there is no target within ``steps``.
        ShapeError: y does not have the shape that the task needs.

    Cost:
        ``steps`` forward passes; one state is held.
    """
    validation.integer("batch_size", batch_size)
    validation.integer("steps", steps)
    like = parameter_of(cell)
    stream = task.stream(batch_size, seed=seed, held_out=held_out, dtype=like.dtype, device=like.device)
    first = first_state(cell, batch_size).detach()
    h, total, n_targets = first, 0.0, 0
    for _ in range(steps):
        step = next(stream)
        h = torch.where(step.is_first.reshape(-1, *[1] * (h.ndim - 1)), first, h)
        y, h, _ = call_cell(cell, step.x, h, None)
        check_answer(y, task, batch_size)
        score, count = task.score(y, step)
        total, n_targets = total + score, n_targets + count
    if not n_targets:
        raise ConfigError(f"the task {task.name!r} has no target within {steps} steps; evaluate over more steps")
    return total / n_targets


def parameter_of(cell: nn.Module) -> nn.Parameter:
    """The first trainable parameter; its dtype and device are those of the inputs.

    Raises:
        ConfigError: the cell has none.
    """
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
    for parameter in cell.parameters():
        if parameter.requires_grad:
            return parameter
    raise ConfigError("the cell has no parameter that requires a gradient")


def check_answer(y: object, task: Task, batch_size: int) -> None:
    """Check that y is a tensor (B, d_out).

    Raises:
        ShapeError: it is not.
    """
    if not isinstance(y, Tensor) or tuple(y.shape) != (batch_size, task.d_out):
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"the task {task.name!r} needs a y of shape ({batch_size}, {task.d_out}) for x of width {task.d_in}, "
            f"the cell returns {found}"
        )
