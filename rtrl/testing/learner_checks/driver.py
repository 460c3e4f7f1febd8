"""Drive a learner along a stream of the checks, and report what it raises with the step and the action."""

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import pytrees
from rtrl._utils.formatting import first_line
from rtrl.testing.driver import Driver, trainable
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_TESTING = Path(__file__).parent.parent
_CALLS = 6  # the number of innermost calls in a report


class LearnerFailed(Exception):
    """A learner raised, or returned what cannot be judged.

    Attributes:
        step: the step at which it did; None outside a stream.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step

    @property
    def traceback(self) -> str:
        """Where the exception of the learner was raised; empty if there was none."""
        return "" if self.__cause__ is None else calls_of(self.__cause__)


def calls_of(error: BaseException) -> str:
    """The calls in which an exception was raised, the innermost one last; those of these checks are left out."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not Path(frame.filename).is_relative_to(_TESTING)] or frames[-1:]
    return "\n".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in outside[-_CALLS:])


@dataclass(eq=False)
class Outcome:
    """What a run leaves behind: gradients by name, zero where there are none; the learner, if there is one, and its
    copy of the cell; the y of every step."""

    gradients: dict[str, Tensor]
    cell: nn.Module
    learner: Any = None
    outputs: list[Any] = field(default_factory=list)


class StreamDriver(Driver):
    """A driver for a new learner of a spec, on a copy of the stream's cell; what the learner raises is a
    ``LearnerFailed``."""

    def __init__(self, spec: LearnerSpec, stream: Stream) -> None:
        assert spec.make_learner is not None
        cell = in_dtype(copy.deepcopy(stream.cell), spec)
        cell.zero_grad()
        self._spec, self._stream = spec, stream
        super().__init__(spec.make_learner, cell, stream.batch_size)

    @contextmanager
    def during(self, action: str) -> Iterator[None]:
        """Turn an exception into a ``LearnerFailed`` that names the action and the step."""
        try:
            yield
        except Exception as error:
            raise LearnerFailed(f"{action} raised {first_line(error)}", self.step_index) from error

    def steps(self, first: int = 0) -> Iterator[tuple[int, Any]]:
        """Drive the learner along the stream, from step ``first`` on; yield the number and the y of each step."""
        s = self._stream
        if s.unrolled:
            return self._parts()
        events: dict[str, Any] = {"syncs": s.syncs, "resets": s.resets, "offsets": s.offsets, "saves": s.saves}
        return self.along(s.xs, s.loss, first=first, **events)

    def _parts(self) -> Iterator[tuple[int, Any]]:
        """Take several steps at once, as many as the open block takes, up to the next reset."""
        stream, block, opened, start = self._stream, int(getattr(self.learner, "block", 1)), 0, 0
        restarts = [] if stream.resets is None else stream.resets.any(dim=1).nonzero().flatten().tolist()
        while start < stream.steps:
            self.step_index = start
            if stream.resets is not None and start in restarts:
                self.reset(stream.resets[start].clone())
            opened %= block
            following = min([stream.steps, *(t for t in restarts if t > start)])
            count = min(block - opened, following - start, 2 + start % 3)
            with self.during("unroll"):
                ys = self.learner.unroll(in_dtype(stream.xs[start : start + count].clone(), self._spec))
            steps = [(start + k, pytrees.map_tensors(itemgetter(k), ys)) for k in range(count)]

            def total(ys: Any, steps: list[tuple[int, Any]] = steps) -> Tensor | None:
                losses = [loss for t, y in steps if (loss := stream.loss(t, y)) is not None]
                return torch.stack(losses).sum() if losses else None

            self.add_loss(total, ys)
            opened, start = opened + count, start + count
            yield from steps

    def finish(self, first: int = 0) -> dict[str, Tensor]:
        """Drive the learner to the end of the stream, and return its gradients."""
        for _ in self.steps(first):
            pass
        return self.sync_and_read()

    def step(self, x: Tensor, loss_fn: Callable[[Any], Tensor | None]) -> Any:
        """Take a step on a copy of x, in the form that the stream asks for."""
        own_x = in_dtype(_not_contiguous(x) if self._stream.scattered else x.clone(), self._spec)
        y = super().step(own_x, loss_fn)
        if self._stream.overwritten and own_x.is_floating_point():
            own_x.fill_(torch.nan)
        return y

    def reset(self, samples: Tensor | None) -> None:
        """Reset the samples, by one call each if the stream asks for it; the mask may change afterwards like x."""
        if samples is None or self.step_index not in self._stream.split_resets:
            super().reset(samples)
            if samples is not None and self._stream.overwritten:
                samples.logical_not_()
            return
        for b in samples.nonzero().flatten().tolist():
            super().reset(torch.arange(len(samples), device=samples.device) == b)

    def add_loss(self, loss_fn: Callable[[Any], Tensor | None], y: Any) -> None:
        """Pass the loss in as many parts as the stream asks for."""
        if self._stream.pieces == 1:
            super().add_loss(loss_fn, y)
            return
        for weight in (0.7, 0.3):
            super().add_loss(lambda y, weight=weight: _scaled(loss_fn(y), weight), y)  # type: ignore[misc]

    def backward(self, loss: Tensor) -> None:
        """Pass the loss by its own ``backward`` if the stream asks for it."""
        if self._stream.plain:
            loss.backward()
        else:
            super().backward(loss)

    def load(self, saved: Any, gradients: Mapping[str, Tensor | None]) -> None:
        """Load a state that was saved at the first parameters, when ``.grad`` held these gradients."""
        self.restore_parameters()
        for name, p in self.cell.named_parameters():
            held = gradients[name]
            p.grad = None if held is None else held.clone()
        with self.during("load_state_dict(...)"):
            self.learner.load_state_dict(saved)

    def sync_and_read(self) -> dict[str, Tensor]:
        """Sync, and return the ``.grad`` of every trainable parameter."""
        self.sync()
        return _checked({name: p.grad for name, p in self.cell.named_parameters()}, self.cell)


def drive(spec: LearnerSpec, stream: Stream) -> Outcome:
    """Run a new learner of a spec, or its function, along a whole stream, and read its gradients.

    Raises:
        LearnerFailed: the learner raised, or what it returned has the wrong form.
    """
    if spec.gradients is None:
        driver = StreamDriver(spec, stream)
        outputs = [pytrees.map_tensors(lambda leaf: leaf.detach().clone(), y) for _, y in driver.steps()]
        return Outcome(driver.sync_and_read(), driver.cell, driver.learner, outputs)
    cell = in_dtype(copy.deepcopy(stream.cell), spec)
    try:
        found = spec.gradients(cell, in_dtype(stream.xs.clone(), spec), stream.loss)
    except Exception as error:
        raise LearnerFailed(f"gradients(cell, xs, loss_fn) raised {first_line(error)}") from error
    if not isinstance(found, Mapping):
        raise LearnerFailed(f"gradients(cell, xs, loss_fn) must return a mapping by name, got {type(found).__name__}")
    return Outcome(_checked(dict(found), cell), cell)


def in_dtype(value: Any, spec: LearnerSpec) -> Any:
    """A cell or an x, which are in float64, in the dtype that the spec's learner is for."""
    if spec.dtype == torch.float64 or (isinstance(value, Tensor) and not value.is_floating_point()):
        return value
    return value.to(spec.dtype)


def _scaled(loss: Tensor | None, weight: float) -> Tensor | None:
    return None if loss is None else weight * loss


def _not_contiguous(x: Tensor) -> Tensor:
    """A copy of x that is not contiguous."""
    if x.ndim == 1:
        return torch.stack([x, x], dim=1)[:, 0]
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def _checked(found: dict[str, Tensor | None], cell: nn.Module) -> dict[str, Tensor]:
    """Gradients of all trainable parameters, in the form of the parameter; zeros for None."""
    parameters = trainable(cell)
    gradients = {}
    for name, p in parameters.items():
        value = found.get(name)
        if value is None:
            gradients[name] = torch.zeros_like(p)
            continue
        if not isinstance(value, Tensor) or value.shape != p.shape or value.dtype != p.dtype:
            form = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise LearnerFailed(f"the gradient of {name!r} must be {tuple(p.shape)} {p.dtype}, got {form}")
        gradients[name] = value.detach().to_dense().clone()
    unknown = sorted(str(name) for name, value in found.items() if name not in parameters and value is not None)
    if unknown:
        raise LearnerFailed(f"there is a gradient of {', '.join(unknown)}, which the cell does not train")
    return gradients
