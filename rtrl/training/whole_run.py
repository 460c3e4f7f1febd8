"""A training run from its first step to its last."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from rtrl._utils import validation
from rtrl.learners import Learner
from rtrl.tasks.protocol import Task
from rtrl.training.curve import Curve, Progress
from rtrl.training.trainer import Trainer


def train(
    cell: nn.Module,
    task: Task,
    *,
    learner: Callable[[nn.Module, int], Learner],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    batch_size: int,
    steps: int,
    every: int | None = None,
    clip: float | None = None,
    seed: int = 0,
    log_every: int = 100,
    watch: Callable[[Progress], None] | None = None,
) -> Curve:
    """Train a cell on a task for a number of steps.

    Args:
        cell: a cell with ``init_state(batch_size)``; it is trained in place, on its own device and in its own dtype.
        task: the task.
        learner: makes the learner, as for ``Trainer``.
        optimizer: makes the optimizer of the trainable parameters.
        batch_size: B.
        steps: the number of steps.
        every: the number of steps between two updates, as for ``Trainer``.
        clip: the largest norm of the gradients, as for ``Trainer``.
        seed: of the stream.
        log_every: the number of steps of a row of the curve.
        watch: called after every row.

    Returns:
        The curve, with one row for every ``log_every`` steps, and one for the remaining steps.

    Raises:
        ConfigError: a number is out of range, or the cell or learner cannot be used; nothing has been trained then.
        ShapeError: the cell does not fit the task; nothing has been trained then.
        NonFiniteError: NaN or infinity in the loss, the state or a gradient; the message names the step.
        RTRLError: the learner raised it.

    Cost:
        As ``Trainer``.

    Example:
        >>> import torch, rtrl
        >>> from rtrl import tasks, training
        >>> task = tasks.make("copy", delay=2)
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(task.d_in, 8), torch.nn.Linear(8, task.d_out))
        >>> curve = training.train(
        ...     cell,
        ...     task,
        ...     learner=training.make_learner("block", block=8),
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        ...     batch_size=4,
        ...     steps=200,
        ... )
        >>> tuple(row.step for row in curve.rows)
        (100, 200)
    """
    validation.integer("steps", steps)
    trainer = Trainer(
        cell,
        task,
        learner=learner,
        optimizer=optimizer,
        batch_size=batch_size,
        every=every,
        clip=clip,
        seed=seed,
        log_every=log_every,
    )
    curve = Curve()
    for row, speed in trainer.run(steps):
        if trainer.steps_taken == steps and row is None:
            row = trainer.unfinished()
        if row is not None:
            curve.rows.append(row)
            if watch is not None:
                watch(Progress(row, steps, speed))
    return curve
