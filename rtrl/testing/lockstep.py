"""Learners walked along one stream side by side, each on its own copy of the cell and with its own random states."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._utils import pytrees
from rtrl.errors import ConfigError, LossError, NonFiniteError, ParameterChangedError
from rtrl.testing.cell_checks.compare import same_bits
from rtrl.testing.cell_checks.points import copied

MakeLearner = Callable[[nn.Module, int], Any]


def item_of(item: Any, step: int) -> tuple[Any, Any, int]:
    """The x and the loss of a step, and its batch."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(f"step {step}: the stream must give pairs (x, loss), got {type(item).__name__}")
    x, loss = item
    if loss is not None and not callable(loss):
        raise ConfigError(f"step {step}: a loss must be a function of y, or None, got {type(loss).__name__}")
    tensors = pytrees.tensors(x)
    if not tensors or any(t.ndim == 0 for t in tensors):
        raise ConfigError(f"step {step}: x must be a tree of tensors with the batch as dimension 0")
    return x, loss, tensors[0].shape[0]


class Draws:
    """Global random states of somebody's own: who draws inside ``with`` goes on where it stopped the last time."""

    def __init__(self, seed: int, devices: set[torch.device]) -> None:
        self._devices = devices
        self._outside = self._read()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (a learner may draw from the old one)
        for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)):
            generator.manual_seed(seed)
        self.state = self._read()
        self._write(self._outside)

    def _read(self) -> tuple[Any, ...]:
        cuda = {d: torch.cuda.get_rng_state(d) for d in self._devices}
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002

    def _write(self, state: tuple[Any, ...]) -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.set_rng_state(state[2])
        for device, own in state[3].items():
            torch.cuda.set_rng_state(own, device)

    def __enter__(self) -> None:
        self._outside = self._read()
        self._write(self.state)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.state = self._read()
        self._write(self._outside)


def seed_for(seed: int, name: str, repeat: int) -> int:
    """A seed for each learner, whatever the others are called; of its repeats, no two share one."""
    first = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")
    return (first + 0x9E3779B1 * repeat) % 2**32


class Run:
    """One learner on its own copy of the cell.

    Attributes:
        total: (P,) float64, what it has delivered so far. parameters: name → those with a gradient.
        sizes: their numbers of entries.
    """

    def __init__(self, name: str, repeat: int, make: MakeLearner, cell: nn.Module, batch: int, draws: Draws) -> None:
        self._label = f"learner {name!r}, repeat {repeat}" if name else "the exact learner"
        self._cell, self._draws = cell, draws
        mine = copied(cell)
        self.parameters = {n: p for n, p in mine.named_parameters() if p.requires_grad and p.numel()}
        self.sizes = [p.numel() for p in self.parameters.values()]
        with self._turn(0):
            self._learner = make(mine, batch)
        for method in ("step", "backward", "sync"):
            if not callable(getattr(self._learner, method, None)):
                raise ConfigError(f"{self._label}: a {type(self._learner).__name__} has no method {method}")
        self._clear()
        self.total = torch.zeros_like(self._piece())

    @contextmanager
    def _turn(self, step: int) -> Iterator[None]:
        with self._draws:
            try:
                yield
            except Exception as error:
                error.add_note(f"{self._label}, step {step}")
                raise

    def walk(self, x: Any, loss: Any, draws: Draws, step: int) -> bool:
        """Take a step, and give its loss, if there is one."""
        with self._turn(step):
            y = self._learner.step(pytrees.map_tensors(lambda t: t.detach().clone(), x))
            if loss is None:
                return False
            value = through_y(loss, y, draws, step)
            if value is not None:
                self._learner.backward(value)
            return value is not None

    def deliver(self, step: int) -> Tensor:
        """The piece of gradient (P,) since the last delivery; ``.grad`` is empty afterwards."""
        with self._turn(step):
            self._learner.sync()
        kept = dict(self._cell.named_parameters())
        for name, p in self.parameters.items():
            if not same_bits(p.detach(), kept[name].detach()):
                raise ParameterChangedError(
                    f"{self._label} has changed parameter {name!r} by step {step}; gradients can be compared along one "
                    "trajectory alone, so a learner must leave the parameters as they are"
                )
            if p.grad is not None and not checks.finite(p.grad.to_dense()):
                raise NonFiniteError(
                    f"{self._label}: NaN or infinity in the gradient of parameter {name!r} delivered at step {step}"
                )
        piece = self._piece()
        self._clear()
        self.total += piece
        return piece

    def _piece(self) -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.parameters.values()]
        return torch.cat([grad.detach().reshape(-1).to(torch.float64) for grad in grads])

    def _clear(self) -> None:
        for p in self.parameters.values():
            p.grad = None


def through_y(loss: Any, y: Any, draws: Draws, step: int) -> Tensor | None:
    """The loss, linear in y and reaching nothing else: same value, same gradient at y. So nothing of the caller's gets
    a gradient, and a loss counts for all learners by the same rule."""
    copies = pytrees.map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), y)
    with draws:
        value = loss(copies)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"step {step}: a loss must be a scalar tensor, or None, got {kind}")
    leaves = [leaf for leaf in pytrees.tensors(copies) if leaf.requires_grad]
    grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad and leaves else []
    pairs = zip((leaf for leaf in pytrees.tensors(y) if leaf.is_floating_point()), grads, strict=False)
    terms = [(leaf * grad).sum() for leaf, grad in pairs if grad is not None]
    if not terms:
        raise LossError(f"the loss of step {step} does not depend on y; compute it from what it is called with")
    linear: Tensor = torch.stack(terms).sum()
    rest: Tensor = value.detach().reshape(()) - linear.detach()
    return linear + rest
