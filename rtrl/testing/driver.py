"""Drive a learner along a stream: its losses, and the resets, syncs, parameter changes and saves on the way."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Offsets = Sequence[Mapping[str, Tensor]]


def trainable(cell: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in cell.named_parameters() if p.requires_grad}


class Driver:
    """Run one learner on its cell, one step or one stream at a time.

    Args:
        make: ``make(cell, batch_size)`` returns a new learner.
        cell: the cell of the learner. It is used itself; its ``.grad`` receives the gradients.
        batch_size: B.

    Attributes:
        learner: the learner. After a save it is the one that loaded.
        step_index: the number of the current step; None outside a stream.
        n_losses: the number of losses that the learner has received.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4))
        >>> driver = Driver(rtrl.BlockRTRL, cell, batch_size=2)
        >>> driver.run(torch.ones(6, 2, 3), lambda t, y: y.square().sum(), syncs={1, 3})
        >>> driver.sync()
        >>> driver.gradients()["cell.weight_hh"].shape
        torch.Size([12, 4])
    """

    def __init__(self, make: Callable[[nn.Module, int], Any], cell: nn.Module, batch_size: int) -> None:
        self.cell, self.batch_size = cell, batch_size
        self.step_index: int | None = None
        self.n_losses = 0
        self._make = make
        self._start: dict[str, Tensor] = {}
        self._offset: Mapping[str, Tensor] = {}
        with self.during("make_learner"):
            self.learner: Any = make(cell, batch_size)

    def during(self, action: str) -> AbstractContextManager[None]:
        """Return the context in which an ``action`` of the learner runs; subclasses override it to handle errors."""
        return nullcontext()

    def along(
        self,
        xs: Sequence[Any] | Tensor,
        loss_fn: Callable[[int, Any], Tensor | None],
        *,
        first: int = 0,
        syncs: Collection[int] | Mapping[int, bool] = (),
        resets: Tensor | None = None,
        offsets: Offsets | None = None,
        saves: Collection[int] = (),
    ) -> Iterator[tuple[int, Any]]:
        """Drive the learner along a stream, and yield the number and the y of each step when the step is complete.

        Args:
            xs: the input of every step.
            loss_fn: ``loss_fn(t, y)`` returns the loss of step t, or None.
            first: the step to begin with.
            syncs: the steps after which ``sync`` is called. A mapping gives the argument ``dormant`` of each call.
            resets: Boolean (T, B); these samples are reset before a step. Every fifth step, ``reset`` is called even
                with a mask that selects none.
            offsets: one dict of constants per step. Where it differs from the last one, the parameters are changed to
                θ + offset, after a sync.
            saves: the steps after which the learner is saved, and a new learner continues from there.
        """
        with_dormant = isinstance(syncs, Mapping)
        for t in range(first, len(xs)):
            self.step_index = t
            if offsets is not None and offsets[t] is not self._offset and (offsets[t] or self._offset):
                self.change_parameters(offsets[t], dormant=t % 2 == 0 if with_dormant else None)
            if resets is not None and (bool(resets[t].any()) or t % 5 == 3):
                self.reset(resets[t].clone())
            y = self.step(xs[t], lambda y, t=t: loss_fn(t, y))  # type: ignore[misc]
            if t in syncs:
                self.sync(dormant=syncs[t] if isinstance(syncs, Mapping) else None)
            if t in saves:
                self.save_and_load()
            yield t, y

    def run(self, xs: Sequence[Any] | Tensor, loss_fn: Callable[[int, Any], Tensor | None], **events: Any) -> None:
        """Drive the learner along a whole stream; ``xs``, ``loss_fn`` and the ``events`` are as in ``along``."""
        for _ in self.along(xs, loss_fn, **events):
            pass

    def step(self, x: Any, loss_fn: Callable[[Any], Tensor | None]) -> Any:
        """Take one step on ``x``, pass the loss ``loss_fn(y)`` to the learner unless it is None, and return y."""
        with self.during("step"):
            y = self.learner.step(x)
        self.add_loss(loss_fn, y)
        return y

    def add_loss(self, loss_fn: Callable[[Any], Tensor | None], y: Any) -> None:
        """Compute the loss ``loss_fn(y)``, and pass it to the learner unless it is None."""
        with self.during("the loss of this y"):
            loss = loss_fn(y)
        if loss is not None:
            with self.during("backward"):
                self.backward(loss)
            self.n_losses += 1

    def backward(self, loss: Tensor) -> None:
        """Pass one ``loss`` to the learner."""
        self.learner.backward(loss)

    def reset(self, samples: Tensor | None) -> None:
        """Reset the ``samples`` that a Boolean (B,) mask selects."""
        with self.during("reset"):
            self.learner.reset(samples)

    def sync(self, *, dormant: bool | None = None) -> None:
        """Call ``sync``, with the argument ``dormant`` if it is given."""
        with self.during("sync"):
            if dormant is None:
                self.learner.sync()
            else:
                self.learner.sync(dormant=dormant)

    def change_parameters(self, offset: Mapping[str, Tensor], *, dormant: bool | None = None) -> None:
        """Sync, with ``dormant`` if it is given, and set the parameters to their first values plus ``offset``."""
        self.sync(dormant=dormant)
        self._offset = offset
        self._start = self._start or {name: p.detach().clone() for name, p in trainable(self.cell).items()}
        with torch.no_grad():
            for name, p in trainable(self.cell).items():
                p.copy_(self._start[name] + offset.get(name, 0.0))

    def restore_parameters(self) -> None:
        """Set the parameters to their first values, without a sync."""
        self._offset = {}
        with torch.no_grad():
            for name, value in self._start.items():
                self.cell.get_parameter(name).copy_(value)

    def save_and_load(self) -> None:
        """Replace the learner by a new one that has loaded its ``state_dict``."""
        with self.during("state_dict"):
            saved = self.learner.state_dict()
        with self.during("load_state_dict"):
            self.learner = self._make(self.cell, self.batch_size)
            self.learner.load_state_dict(saved)

    def fork(self, cell: nn.Module | None = None) -> "Driver":
        """Return a driver whose new learner has loaded this one's state, on a copy of the cell with empty ``.grad``.

        Args:
            cell: what is copied, and then loads the values of the driver's cell; the driver's cell by default.
        """
        twin = copy.deepcopy(self.cell if cell is None else cell)
        twin.load_state_dict(self.cell.state_dict())
        twin.zero_grad()
        forked = type(self)(self._make, twin, self.batch_size)
        forked.learner.load_state_dict(self.learner.state_dict())
        return forked

    def gradients(self) -> dict[str, Tensor]:
        """Return a copy of the ``.grad`` of each trainable parameter; zeros where it is None."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense().clone()
            for name, p in trainable(self.cell).items()
        }

    def take_gradients(self) -> dict[str, Tensor | None]:
        """Return the ``.grad`` of each trainable parameter, None included, and clear it."""
        taken: dict[str, Tensor | None] = {}
        for name, p in trainable(self.cell).items():
            taken[name], p.grad = p.grad, None
        return taken

    def influences(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the influence (B, H, P) of each parameter in ``names``; of all trainable ones by default."""
        return {name: self.learner.influence(name) for name in (trainable(self.cell) if names is None else names)}

    @property
    def state(self) -> Tensor:
        """The state of the learner."""
        state: Tensor = self.learner.state
        return state
