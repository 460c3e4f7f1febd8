"""What all baselines share: the checks of a step and of a loss, the step run again, and delivery to ``.grad``."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, contract, losses
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._utils import pytrees, validation
from rtrl.cells.protocol import Cell, call_cell, check_input, first_state, own_copy, takes_replay
from rtrl.errors import CellError, ConfigError, LossError, NonFiniteError, RTRLError, ShapeError
from rtrl.learners import baseline_state
from rtrl.learners.replayed_step import Step, Values


class Baseline(ABC):
    """A learner with the interface of ``rtrl.BlockRTRL``, for cells of the same protocol; a ``Sparsity`` is replayed
    and otherwise ignored.

    A step takes losses until the next ``step``, ``sync`` or ``reset``. Parameters may change at any moment: each step
    counts with the values it was taken with, of which the learner keeps a copy.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``. batch_size: B, each sample a stream.
        state: (B, n, ...), the first state; ``cell.init_state(batch_size)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.
    """

    def __init__(self, cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> None:
        validation.integer("batch_size", batch_size)
        if not isinstance(cell, nn.Module):
            raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
        self.cell, self.batch_size = cell, batch_size
        self._guard = ParameterGuard(cell)
        self._parameters = self._guard.parameters
        parameter = next(iter(self._parameters.values()))
        first = first_state(cell, batch_size) if state is None or isinstance(cell, Cell) else None
        if first is not None:
            first = checks.checked_state(first, batch_size, parameter)
        self._state = checks.checked_state(first if state is None else state, batch_size, parameter, first)
        self._cut = torch.ones(batch_size, dtype=torch.bool, device=self._state.device)  # whose state is a constant
        self._values: Values | None = None
        self._taken = 0
        self._open: Step | None = None  # the newest step, as long as it takes losses
        self._earned: dict[str, Tensor] = {}  # not yet delivered to .grad

    @property
    def state(self) -> Tensor:
        """The present state (B, n, ...), a copy without a graph."""
        return self._state.clone()

    @property
    def steps_taken(self) -> int:
        """How many steps have been taken since the beginning."""
        return self._taken

    @property
    def at_block_end(self) -> bool:
        """Whether now is a natural moment to ``sync``: after every step, unless a learner says otherwise."""
        return self._open is not None

    @torch.inference_mode(False)
    def step(self, x: Any) -> Any:
        """Take one step and return ``y``, cut off from any graph: its floating-point tensors are leaves that require
        grad.

        Args:
            x: the input, a tensor (B, ...) or any tree of such.

        Raises:
            ShapeError: x has the wrong batch, dtype or device, or the cell does not take it.
            CellError: the cell breaks its contract. NonFiniteError: NaN or infinity in x, y or the next state.
            ParameterChangedError: the cell has other trainable parameters than it had. Nothing has changed then.

        Cost: one forward pass without a graph, and the working off of the last step.
        """
        number = self._taken
        self._guard.check([])
        if not pytrees.tensors(x):
            raise ShapeError("x holds no tensor")
        for leaf in pytrees.tensors(x):
            check_input("x", leaf, self.batch_size, self._state)
            checks.check_finite("x", leaf, number)
        with torch.no_grad():
            x = pytrees.map_tensors(lambda leaf: leaf.detach().clone(), x)
            h = self._state.clone()
            try:
                if number == 0:
                    contract.check_purity(self.cell, x, h, None)
                y, h_next, sparsity = call_cell(self.cell, x, h, None)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                if isinstance(error, RTRLError):
                    raise
                raise ShapeError(f"step {number}: the cell does not take this x with this state: {error}") from error
            if h._version:
                raise CellError(f"step {number}: the cell changes the state h in place; it must return a new one")
            checks.check_output(y, self._state, h_next, number)
        self._close()

        replay = own_copy(sparsity) if takes_replay(self.cell) else None
        if self._values is None or not self._values.current(self.cell):
            self._values = Values(self.cell)
        taken = Step(number, x, self._state, h_next.detach().clone(), replay, self._values, self._cut)

        def leaf_of(value: Tensor) -> Tensor:
            value = value.detach().clone()
            if value.is_floating_point():
                value.requires_grad_()
                losses.refuse_when_closed(value, number, taken.open_)
                taken.outputs.append(value)
            return value

        y = pytrees.map_tensors(leaf_of, y)
        self._open, self._state, self._cut = taken, taken.h_next, torch.zeros_like(self._cut)
        self._taken += 1
        return y

    def backward(self, loss: Tensor) -> None:
        """Give a loss of the newest step; several are summed. Whatever else it depends on gets its gradient at once.

        Args:
            loss: a scalar tensor computed from what the last ``step`` returned.

        Raises:
            LossError: not a scalar of this step's y, or already given. NonFiniteError. Nothing has changed then.

        Cost: the loss's own backward pass.
        """
        number = self._taken - 1
        outputs, given = (self._open.outputs, self._open.given) if self._open is not None else ([], [])
        leaves = losses.check_loss(loss, outputs, given, number)
        try:
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError as error:
            raise LossError(f"the loss of step {number} could not be pulled back: {error}") from error
        for gradient in gradients:
            if gradient is not None:
                checks.check_finite("the gradient of the loss", gradient, number)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                kept = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                leaf.grad = (kept + gradient).detach()
        given.append(weakref.ref(loss))

    @torch.inference_mode(False)
    def sync(self, dormant: bool = True) -> None:
        """Add to every ``.grad`` what all losses not yet delivered have earned, each loss once.

        Args:
            dormant: taken so that a learner can stand in for ``rtrl.BlockRTRL``; nothing sleeps here.

        Raises:
            CellError: run again, the cell does not do what it did. NonFiniteError. Nothing has been delivered then.

        Cost: the working off of the last step; the learner says what more.
        """
        self._close()
        self._settle()
        for name, gradient in self._earned.items():
            if not checks.finite(gradient):
                raise NonFiniteError(f"NaN or infinity in the gradient of {name!r} up to step {self._taken - 1}")
        for name, gradient in self._earned.items():
            parameter = self._parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._earned = {}

    @torch.inference_mode(False)
    def reset(self, rows: Tensor | None = None, *, state: Tensor | None = None) -> None:
        """Start samples anew in mid-stream; what their losses earned so far is kept.

        Args:
            rows: Boolean (B,), the samples to start anew; None for all.
            state: (B, n, ...), where to take their first states from; ``cell.init_state(batch_size)`` by default.

        Raises:
            ShapeError: ``rows`` or ``state`` has the wrong form. And whatever ``sync`` raises.
        """
        rows = torch.ones_like(self._cut) if rows is None else rows
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or tuple(rows.shape) != (self.batch_size,):
            kind = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ShapeError(f"rows must be a Boolean tensor of shape ({self.batch_size},), got {kind}")
        if rows.device != self._state.device:
            raise ShapeError(f"rows is on {rows.device}, the state on {self._state.device}; move one of them")
        first = first_state(self.cell, self.batch_size) if state is None else state
        first = checks.checked_state(first, self.batch_size, self._state, self._state)
        self._close()
        self._forget(rows)
        self._state = torch.where(rows.reshape(-1, *[1] * (first.ndim - 1)), first, self._state)
        self._cut = self._cut | rows

    def retained_bytes(self) -> dict[str, int]:
        """Bytes held between steps, by part; the copies of the parameters are not counted."""
        kept = self._kept_steps() + ([] if self._open is None else [self._open])
        return {
            "influence": self._influence_bytes(),
            "steps": sum(step.n_bytes for step in kept),
            "gradient": pytrees.n_bytes(self._earned),
            "state": pytrees.n_bytes(self._state),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit, as tensors, numbers and containers of such; save the cell's
        parameters beside it.

        Losses of a step must be given before it is saved: the ``y`` of steps taken before the save takes no more
        losses after a load.
        """
        return baseline_state.save(self)

    @torch.inference_mode(False)
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken, with the same cell, parameters and arguments.

        Raises:
            ConfigError: it was taken of a learner with other arguments or another cell. Nothing has changed then.
        """
        baseline_state.load(self, saved)

    def _give_up_step(self) -> None:
        """Let the newest step take no more losses."""
        if self._open is not None:
            self._open.open_.now = False
        self._open = None

    def _close(self) -> None:
        """Work off the newest step. It takes no more losses then."""
        if self._open is None:
            return
        self._open.take_adjoints()
        self._work_off(self._open)
        self._give_up_step()

    def _earn(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if not checks.finite(gradient):
                raise NonFiniteError(f"NaN or infinity in the gradient of {name!r} earned by step {self._taken - 1}")
        self._earned = {
            **self._earned,
            **{n: self._earned[n] + g if n in self._earned else g for n, g in gradients.items()},
        }

    @abstractmethod
    def _work_off(self, step: Step) -> None:
        """Take in a step that gets no more losses. What can fail comes before the first change."""

    def _settle(self) -> None:
        """Earn what is due before a delivery."""
        return

    def _forget(self, rows: Tensor) -> None:
        """Drop what is carried for the samples that start anew."""
        return

    def _kept_steps(self) -> list[Step]:
        return []

    def _keep_steps(self, steps: list[Step]) -> None:
        """Take over what ``_kept_steps`` gave."""
        return

    def _memory(self) -> dict[str, Tensor]:
        """The tensors that are carried from step to step, by name."""
        return {}

    def _remember(self, memory: dict[str, Tensor]) -> None:
        """Take over what ``_memory`` gave."""
        return

    def _arguments(self) -> dict[str, Any]:
        """The arguments beside cell and batch_size, as plain values."""
        return {}

    def _draws(self) -> Tensor | None:
        """The state of the learner's own generator, if it has one."""
        return None

    def _set_draws(self, state: Tensor) -> None:
        return

    def _influence_bytes(self) -> int:
        return 0
