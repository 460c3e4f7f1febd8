"""Run learners in lockstep, each on its own copy of the cell and with its own random states."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import as_real, is_continuous, real_numbers
from rtrl.errors import ConfigError, LossError, NonFiniteError, ParameterChangedError
from rtrl.testing.cell_checks.compare import same_bits
from rtrl.testing.cell_checks.points import copied
from rtrl.testing.driver import Driver, trainable

MakeLearner = Callable[[nn.Module, int], Any]


def item_of(item: Any, step: int) -> tuple[Any, Any, int]:
    """Check an item of the stream; return the x, the loss and the batch size of the step."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(f"step {step}: the stream must consist of pairs (x, loss), got {type(item).__name__}")
    x, loss = item
    if loss is not None and not callable(loss):
        raise ConfigError(f"step {step}: a loss must be a function of y, or None, got {type(loss).__name__}")
    tensors = pytrees.tensors(x)
    if not tensors or any(t.ndim == 0 for t in tensors):
        raise ConfigError(f"step {step}: x must be a tree of tensors with the batch as dimension 0")
    return x, loss, tensors[0].shape[0]


class RngState:
    """The global random states of one learner: inside ``with`` they are in force, and continue where they stopped."""

    def __init__(self, seed: int, devices: set[torch.device]) -> None:
        self._devices = devices
        self._outside = self._read()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (a learner may draw from the legacy generator)
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
        for device, cuda_state in state[3].items():
            torch.cuda.set_rng_state(cuda_state, device)

    def __enter__(self) -> None:
        self._outside = self._read()
        self._write(self.state)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.state = self._read()
        self._write(self._outside)


def seed_for(seed: int, name: str, repeat: int) -> int:
    """A seed that depends on the name of the learner and the repeat; the repeats of a learner have different seeds."""
    first = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")
    return (first + 0x9E3779B1 * repeat) % 2**32


class LearnerRun(Driver):
    """One learner on its own copy of the cell, with random states of its own.

    Attributes:
        parameters: those with a gradient, by name.
        sizes: their numbers of entries, twice that of complex ones.
        total: (P,) float64, the sum of all gradients so far.
    """

    def __init__(
        self, name: str, repeat: int, make: MakeLearner, cell: nn.Module, batch: int, rng_state: RngState
    ) -> None:
        self._label = f"learner {name!r}, repeat {repeat}" if name else "the exact learner"
        self._original, self._rng_state = cell, rng_state
        own_cell = copied(cell)
        with self._running(0):
            super().__init__(make, own_cell, batch)
        for method in ("step", "backward", "sync"):
            if not callable(getattr(self.learner, method, None)):
                raise ConfigError(f"{self._label}: a {type(self.learner).__name__} has no method {method}")
        self.parameters = {name: p for name, p in trainable(self.cell).items() if p.numel()}
        self.sizes = [real_numbers(p) for p in self.parameters.values()]
        self.take_gradients()
        self.total = self._flat({})

    @contextmanager
    def _running(self, step: int) -> Iterator[None]:
        """Put the random states of the learner in force, and name the learner and the step in what it raises."""
        with self._rng_state:
            try:
                yield
            except Exception as error:
                error.add_note(f"{self._label}, step {step}")
                raise

    def advance(self, x: Any, loss: Any, rng_state: RngState, step: int) -> bool:
        """Take a step on a copy of x; return whether the step has a loss. The loss draws from ``rng_state``."""
        before = self.n_losses
        with self._running(step):
            own_x = pytrees.map_tensors(lambda t: t.detach().clone(), x)
            self.step(own_x, lambda y: None if loss is None else through_y(loss, y, rng_state, step))
        return self.n_losses > before

    def sync_and_take(self, step: int) -> Tensor:
        """Sync; return the gradient (P,) since the last sync, and clear ``.grad``."""
        with self._running(step):
            self.sync()
        originals = dict(self._original.named_parameters())
        for name, p in self.parameters.items():
            if not same_bits(p.detach(), originals[name].detach()):
                raise ParameterChangedError(
                    f"{self._label} has changed parameter {name!r} by step {step}; gradients can only be compared at "
                    "the same parameters, so a learner must not change them"
                )
            if p.grad is not None and not checks.finite(p.grad.to_dense()):
                raise NonFiniteError(
                    f"{self._label}: NaN or infinity in the gradient of parameter {name!r} delivered at step {step}"
                )
        gradient = self._flat(self.take_gradients())
        self.total += gradient
        return gradient

    def _flat(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """Gradients as one vector (P,) in float64, complex ones as pairs; zeros where there is none."""
        parts = []
        for name, p in self.parameters.items():
            gradient = gradients.get(name)
            parts.append(torch.zeros_like(p) if gradient is None else gradient.to_dense())
        return torch.cat([as_real(part.detach()).reshape(-1).to(torch.float64) for part in parts])


def through_y(loss: Any, y: Any, rng_state: RngState, step: int) -> Tensor | None:
    """A loss with the same value and the same gradient at y that is linear in y and depends on nothing else.

    So no tensor of the caller receives a gradient, and the loss has the same effect on every learner.
    """
    copies = pytrees.map_tensors(lambda t: t.detach().requires_grad_(is_continuous(t)), y)
    with rng_state:
        value = loss(copies)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"step {step}: a loss must be a scalar tensor, or None, got {kind}")
    leaves = [leaf for leaf in pytrees.tensors(copies) if leaf.requires_grad]
    grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad and leaves else []
    pairs = zip((leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)), grads, strict=False)
    terms = [(as_real(leaf) * as_real(grad)).sum() for leaf, grad in pairs if grad is not None]
    if not terms:
        raise LossError(
            f"the loss of step {step} does not depend on y; compute it from the argument of the loss function"
        )
    linear: Tensor = torch.stack(terms).sum()
    rest: Tensor = value.detach().reshape(()) - linear.detach()
    return linear + rest
