"""One training run: a stream, a cell, a learner and an optimizer, which can be saved and continued at any step."""

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rtrl._utils import validation
from rtrl.cells.protocol import call_cell, first_state
from rtrl.errors import ConfigError, NonFiniteError, RTRLError
from rtrl.learners import Learner
from rtrl.tasks.protocol import Task
from rtrl.training.curve import Curve, Row, Tally
from rtrl.training.evaluation import check_answer, parameter_of
from rtrl.training.saved_trainer import (
    check_cell_values,
    check_like,
    check_optimizer,
    count_of,
    rows_from_plain,
    rows_to_plain,
    tally_from_plain,
)

FORMAT = 3
KEPT_ROWS = 1000
_DAMAGE = (RuntimeError, KeyError, TypeError, ValueError, IndexError, AttributeError)
_WRITTEN_BY = {2: "rtrl 0.2.0"}  # older formats


class Trainer:
    """A training run, one step at a time.

    A step resets the samples that begin an episode, takes one step of the learner, and passes the loss to it if a
    sample has a target. When an update is due, the learner syncs, its gradients are clipped, and the optimizer changes
    the parameters. An update without a loss since the last one is skipped, and a parameter without a gradient gets
    zeros: so learners with the same gradients change the parameters in the same way.

    Args:
        cell: a cell with ``init_state(batch_size)``; it is trained in place, and its gradients are cleared first.
        task: the task.
        learner: makes the learner, ``make(cell, batch_size)``: an object with the methods of ``rtrl.learners.Learner``.
        optimizer: makes the optimizer of the trainable parameters.
        batch_size: B.
        every: the number of steps between two updates; None for one update per block of the learner, which is one per
            step for learners without blocks.
        clip: the largest norm of the gradients of all parameters together; larger ones are scaled. None for no limit.
        seed: of the stream.
        log_every: the number of steps of a row of the curve.

    Attributes:
        steps_taken: the number of steps taken.

    Raises:
        ConfigError: a number is out of range, or the cell or learner cannot be used.
        ShapeError: the cell does not take the task's x, or y does not have the shape that the task needs.

    Cost:
        A step of the learner and of the stream; for an update, the learner's ``sync`` and the optimizer's step. The
        newest 1000 rows are held and saved: memory and the saved state do not grow with the number of steps.
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
        self._x = self._try_out(task.stream(batch_size, seed=seed, dtype=like.dtype, device=like.device))
        self._learner = learner(cell, batch_size)
        self._parameters = [p for p in cell.parameters() if p.requires_grad]
        self._optimizer = optimizer(self._parameters)
        self._optimizer.zero_grad()
        self.steps_taken = 0
        self._rows: deque[Row] = deque(maxlen=KEPT_ROWS)
        self._tally = Tally()
        self._since_update, self._has_loss = 0, False  # steps, and whether there was a loss, since the last update

    def _try_out(self, stream: Any) -> Tensor:
        """Take one step forward, so that parts that do not fit are refused before training; return its x."""
        task_step = next(stream)
        h = first_state(self.cell, self.batch_size)
        try:
            with torch.no_grad():
                y = call_cell(self.cell, task_step.x, h.clone(), None)[0]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, RTRLError):
                raise
            raise ConfigError(
                f"the cell does not take the x of the task {self.task.name!r}, {tuple(task_step.x.shape)} "
                f"{task_step.x.dtype}: {error}"
            ) from error
        check_answer(y, self.task, self.batch_size)
        x: Tensor = task_step.x
        return x

    @property
    def learner(self) -> Learner:
        """The learner; do not step it outside the trainer."""
        return self._learner

    @property
    def curve(self) -> Curve:
        """The newest rows, at most 1000; ``step`` and ``run`` give each of them to a caller who keeps more."""
        return Curve(list(self._rows))

    def step(self) -> Row | None:
        """Take one step, with an update if one is due; return the new row of the curve if this step completes one.

        Raises:
            NonFiniteError: NaN or infinity in the loss, the state or a gradient; the message names the step.
            RTRLError: the learner raised it.
        """
        task_step = next(self._stream)
        number = self.steps_taken
        if number and bool(task_step.is_first.any()):
            self._learner.reset(task_step.is_first)
        y = self._learner.step(task_step.x)
        loss = self.task.loss(y, task_step)
        value = 0.0 if loss is None else float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of step {number} is {value}; training diverged: use a smaller learning rate, or clip the "
                "gradients"
            )
        self._tally.add(self.task, y, task_step, value)
        if loss is not None:
            self._learner.backward(loss)
            self._has_loss = True
        self._since_update += 1
        if self._due():
            self._update()
        self.steps_taken += 1
        if self.steps_taken % self.log_every:
            return None
        row = self.unfinished()
        self._rows.append(row)
        self._tally = Tally()
        return row

    def run(self, steps: int) -> Iterator[tuple[Row | None, float]]:
        """Take steps until ``steps`` have been taken in all.

        Yields:
            After each step, the new row if the step completes one, and the steps per second since the last row.
        """
        started, counted = time.perf_counter(), self.steps_taken
        while self.steps_taken < steps:
            row = self.step()
            now = time.perf_counter()
            yield row, (self.steps_taken - counted) / max(now - started, 1e-9)
            if row is not None:
                started, counted = now, self.steps_taken

    def unfinished(self) -> Row:
        """Make a row of the steps since the last row."""
        return self._tally.row(self.steps_taken, sum(self._learner.retained_bytes().values()))

    def _due(self) -> bool:
        if self.every is not None:
            return self._since_update >= self.every
        # A reset to a learned first state closes a block early, and then it may never be full.
        block = getattr(self._learner, "block", None)
        return self._learner.at_block_end or (isinstance(block, int) and self._since_update >= block)

    def _update(self) -> None:
        self._since_update = 0
        if not self._has_loss:
            return
        self._learner.sync()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._has_loss = False

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue bit for bit: tensors, numbers and containers of them.

        PyTorch's global random states are not included. Of the learners and tasks of this package, only UORO without a
        generator draws from them.

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
            "has_loss": self._has_loss,
            "tally": [self._tally.loss, self._tally.score, self._tally.n_targets],
            "rows": rows_to_plain(self._rows),
            "learner": self._learner.state_dict(),
            **self._own_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from ``saved``, a ``state_dict``, with the same cell, task, learner and arguments.

        Raises:
            ConfigError: it is of another run, or is damaged. The trainer is unchanged then.
        """
        _check_format(saved)
        if not hasattr(self._learner, "load_state_dict"):
            raise ConfigError(f"{type(self._learner).__name__} has no load_state_dict; it cannot continue")
        before = self._own_state()
        try:
            for name, value in self._layout().items():
                if saved["layout"][name] != value:
                    raise ConfigError(f"the saved trainer has {name}={saved['layout'][name]!r}, this one {value!r}")
            steps, has_loss = count_of(saved, "steps"), saved["has_loss"]
            since = count_of(saved, "since_update", most=steps)
            if type(has_loss) is not bool:
                raise ConfigError(f"'has_loss' of the saved trainer must be True or False, got {has_loss!r}")
            rows = rows_from_plain(saved["rows"], steps, self.log_every, KEPT_ROWS)
            tally = tally_from_plain(saved["tally"])
            check_cell_values(saved["cell"], self.cell)
            check_optimizer(saved["optimizer"], self._optimizer)
            taken = saved["learner"].get("steps_taken", steps)
            if taken != steps:
                raise ConfigError(f"the saved trainer has taken {steps} steps, but its learner {taken!r}")
            for step in saved["learner"].get("open_steps", []):
                check_like("x of a saved step", step["x"], self._x)
            self._take_over(saved)
            self._learner.load_state_dict(saved["learner"])
        except BaseException as error:
            self._take_over(before)
            if isinstance(error, RTRLError) or not isinstance(error, _DAMAGE):
                raise
            raise ConfigError(f"the saved trainer does not fit or is damaged: {error}") from error
        self._optimizer.zero_grad()
        self.steps_taken, self._since_update, self._has_loss = steps, since, has_loss
        self._rows, self._tally = deque(rows, maxlen=KEPT_ROWS), tally

    def _own_state(self) -> dict[str, Any]:
        """Copies of the parts that are not the learner's."""
        return {
            "stream": self._stream.state_dict(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "cell": {name: value.detach().clone() for name, value in self.cell.state_dict().items()},
        }

    def _take_over(self, saved: Mapping[str, Any]) -> None:
        self.cell.load_state_dict(saved["cell"])
        self._optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        self._stream.load_state_dict(saved["stream"])

    def _layout(self) -> dict[str, Any]:
        """What a saved run and the one that continues it must have in common."""
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


def _check_format(saved: Any) -> None:
    number = saved.get("format") if isinstance(saved, Mapping) else None
    if type(number) is int and number in _WRITTEN_BY:
        raise ConfigError(
            f"this trainer was saved by {_WRITTEN_BY[number]}, in format {number}; this version reads format {FORMAT} "
            "alone. Finish the run with that version"
        )
    if type(number) is not int or number != FORMAT:
        raise ConfigError("this is not a saved trainer of a known format; pass what state_dict() returned")
