"""One training run: a stream, a cell, a learner and an optimizer, a step at a time, to be left and taken up again."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rtrl._utils import validation
from rtrl.cells.protocol import call_cell, first_state
from rtrl.errors import ConfigError, NonFiniteError, RTRLError
from rtrl.learners import Learner
from rtrl.tasks.protocol import Task
from rtrl.training.curve import Curve, Progress, Row, Tally
from rtrl.training.evaluation import check_answer, parameter_of

FORMAT = 1


class Trainer:
    """A training run, one step at a time.

    A step takes the next moment of the task's stream, starts the samples anew whose episode begins, takes one step of
    the learner, and gives the loss if any sample is asked. Whenever an update is due, the learner delivers its
    gradients, they are clipped, and the optimizer changes the parameters. An update before which no loss was given is
    left out, and a parameter that no loss has reached gets a gradient of zeros: so learners that earn the same
    gradients change the parameters in the same way.

    Args:
        cell: a cell with ``init_state(batch_size)``; it is trained in place, and its gradients are cleared first.
        task: what it is to learn. learner: makes the learner, ``make(cell, batch_size)``; anything with the methods of
            ``rtrl.learners.Learner`` will do.
        optimizer: makes the optimizer of the cell's parameters.
        batch_size: B. every: an update is due after so many steps; None for once a block of the learner, which is
            every step for learners without blocks.
        clip: gradients are scaled down to at most this norm, all parameters together; None for no limit.
        seed: of the stream. log_every: how many steps a row of the curve covers.

    Attributes:
        curve: the rows so far. steps_taken: how many steps there were.

    Raises:
        ConfigError: a number is out of range, or the cell or learner cannot be used. ShapeError: the cell does not take
            the task's x, or y does not have the shape that the task needs.

    Cost: a step of the learner and of the stream; an update, the learner's ``sync`` and the optimizer's step.
    """

    def __init__(
        self,
        cell: nn.Module,
        task: Task,
        *,
        learner: Callable[[nn.Module, int], Learner],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        batch_size: int,
        every: int | None = None,
        clip: float | None = None,
        seed: int = 0,
        log_every: int = 100,
    ) -> None:
        self.batch_size = validation.integer("batch_size", batch_size)
        self.every = None if every is None else validation.integer("every", every)
        self.clip = None if clip is None else validation.positive("clip", clip)
        self.seed = validation.integer("seed", seed, least=0)
        self.log_every = validation.integer("log_every", log_every)
        self.cell, self.task = cell, task
        like = parameter_of(cell)
        self._stream = task.stream(batch_size, seed=seed, dtype=like.dtype, device=like.device)
        self._try_out(task.stream(batch_size, seed=seed, dtype=like.dtype, device=like.device))
        self._learner = learner(cell, batch_size)
        self._parameters = [p for p in cell.parameters() if p.requires_grad]
        self._optimizer = optimizer(self._parameters)
        self._optimizer.zero_grad()
        self.steps_taken = 0
        self.curve = Curve()
        self._tally = Tally()
        self._since_update, self._owed = 0, False  # steps since the last update; whether a loss was given since

    def _try_out(self, stream: Any) -> None:
        """One step forward, so that what does not fit is refused before anything is learned."""
        moment = next(stream)
        h = first_state(self.cell, self.batch_size)
        try:
            with torch.no_grad():
                y = call_cell(self.cell, moment.x, h.clone(), None)[0]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, RTRLError):
                raise
            raise ConfigError(
                f"the cell does not take the x of the task {self.task.name!r}, {tuple(moment.x.shape)} "
                f"{moment.x.dtype}: {error}"
            ) from error
        check_answer(y, self.task, self.batch_size)

    @property
    def learner(self) -> Learner:
        """The learner, for looking at; stepping it outside the trainer would put them out of step."""
        return self._learner

    def step(self) -> Row | None:
        """Take one step, with the update if one is due; the new row of the curve if this step completes one.

        Raises:
            NonFiniteError: NaN or infinity in the loss, the state or a gradient; the step is named.
            And whatever the learner raises.
        """
        moment = next(self._stream)
        number = self.steps_taken
        if number and bool(moment.fresh.any()):
            self._learner.reset(moment.fresh)
        y = self._learner.step(moment.x)
        loss = self.task.loss(y, moment)
        value = 0.0 if loss is None else float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of step {number} is {value}; the parameters have gone astray: take a smaller learning rate, "
                "or clip the gradients"
            )
        self._tally.add(self.task, y, moment, value)
        if loss is not None:
            self._learner.backward(loss)
            self._owed = True
        self._since_update += 1
        if self._due():
            self._update()
        self.steps_taken += 1
        if self.steps_taken % self.log_every:
            return None
        row = self.unfinished()
        self.curve.rows.append(row)
        self._tally = Tally()
        return row

    def unfinished(self) -> Row:
        """The row that the steps since the last one would make."""
        return self._tally.row(self.steps_taken, sum(self._learner.retained_bytes().values()))

    def _due(self) -> bool:
        if self.every is not None:
            return self._since_update >= self.every
        # A reset closes a block early; where samples are reset at different steps, no block may ever be full.
        block = getattr(self._learner, "block", None)
        return self._learner.at_block_end or (isinstance(block, int) and self._since_update >= block)

    def _update(self) -> None:
        self._since_update = 0
        if not self._owed:
            return
        self._learner.sync()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._owed = False

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit, between any two steps, as tensors, numbers and containers of such:
        the cell's parameters and buffers, the learner, the optimizer, the stream, the curve.

        PyTorch's global random numbers are not in it; the learners and tasks of this package do not draw from them,
        unless UORO is made without a generator.

        Raises:
            ConfigError: the learner cannot be saved.
        """
        if not hasattr(self._learner, "state_dict") or not hasattr(self._learner, "load_state_dict"):
            raise ConfigError(
                f"{type(self._learner).__name__} has no state_dict and load_state_dict; it cannot be saved"
            )
        return {
            "format": FORMAT,
            "layout": self._layout(),
            "steps": self.steps_taken,
            "since_update": self._since_update,
            "owed": self._owed,
            "tally": [self._tally.loss, self._tally.score, self._tally.asked],
            "rows": [[row.step, row.loss, row.score, row.bytes_held] for row in self.curve.rows],
            "stream": self._stream.state_dict(),
            "learner": self._learner.state_dict(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "cell": {name: value.detach().clone() for name, value in self.cell.state_dict().items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken, with the same cell, task, learner and arguments.

        Raises:
            ConfigError: it was taken of another run, or is damaged. The cell is then as it was; make a new trainer.
        """
        if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
            raise ConfigError("this is no saved trainer of a format that is known; pass what state_dict() returned")
        if not hasattr(self._learner, "load_state_dict"):
            raise ConfigError(f"{type(self._learner).__name__} has no load_state_dict; it cannot go on")
        before = {name: value.detach().clone() for name, value in self.cell.state_dict().items()}
        try:
            for name, mine in self._layout().items():
                if saved["layout"][name] != mine:
                    raise ConfigError(f"the saved trainer has {name}={saved['layout'][name]!r}, this one {mine!r}")
            rows = [Row(*row) for row in saved["rows"]]
            tally = Tally(*saved["tally"])
            steps, since, owed = saved["steps"], saved["since_update"], saved["owed"]
            self.cell.load_state_dict(saved["cell"])
            self._optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
            self._stream.load_state_dict(saved["stream"])
            self._learner.load_state_dict(saved["learner"])
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            self.cell.load_state_dict(before)
            if isinstance(error, RTRLError):
                raise
            raise ConfigError(f"the saved trainer does not fit or is damaged: {error}") from error
        self._optimizer.zero_grad()
        self.steps_taken, self._since_update, self._owed = steps, since, owed
        self.curve, self._tally = Curve(rows), tally

    def _layout(self) -> dict[str, Any]:
        """What a saved run and the one that goes on must have in common."""
        return {
            "task": self.task.name,
            "widths": [self.task.d_in, self.task.d_out],
            "learner": type(self._learner).__name__,
            "optimizer": type(self._optimizer).__name__,
            "batch_size": self.batch_size,
            "every": self.every,
            "clip": self.clip,
            "seed": self.seed,
            "log_every": self.log_every,
        }


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
    """Train a cell on a task for so many steps.

    Args:
        cell: a cell with ``init_state(batch_size)``; it is trained in place, on its own device and in its own dtype.
        task: what it is to learn. learner: makes the learner, ``make(cell, batch_size)``; anything with the methods of
            ``rtrl.learners.Learner`` will do.
        optimizer: makes the optimizer of the cell's parameters.
        batch_size: B. steps: how many steps of the stream.
        every: the parameters are updated after every so many steps; None for once a block of the learner, which is
            every step for learners without blocks.
        clip: gradients are scaled down to at most this norm, all parameters together; None for no limit.
        seed: of the stream. log_every: how many steps a row of the curve covers.
        watch: called after every row.

    Returns:
        One row for every ``log_every`` steps, and one for those that are left over.

    Raises:
        ConfigError, ShapeError: something is out of range or does not fit together; nothing has been trained then.
        NonFiniteError: NaN or infinity in the loss, the state or a gradient; the step is named.
        And whatever the learner raises.

    Cost: see ``Trainer``.

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
    >>> [row.step for row in curve.rows]
    [100, 200]
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
    started, counted = time.perf_counter(), 0
    for _ in range(steps):
        row = trainer.step()
        if trainer.steps_taken == steps and row is None:
            row = trainer.unfinished()
            trainer.curve.rows.append(row)
        if row is not None and watch is not None:
            now = time.perf_counter()
            watch(Progress(row, steps, (row.step - counted) / max(now - started, 1e-9)))
            started, counted = now, row.step
    return trainer.curve
