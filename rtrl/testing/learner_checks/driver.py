"""Walking a learner along a stream."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import pytrees
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream


class Stopped(Exception):
    """A learner raised, or gave what cannot be judged.

    Attributes:
        step: where; None if it was not at a step.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(eq=False)
class Outcome:
    """What a walk left behind: gradients by name, zero where none was delivered; the learner, if there is one, and its
    own copy of the cell; y of every step."""

    gradients: dict[str, Tensor]
    cell: nn.Module
    learner: Any = None
    outputs: list[Any] = field(default_factory=list)


def start(spec: LearnerSpec, stream: Stream) -> tuple[Any, nn.Module]:
    """A learner with a copy of the stream's cell."""
    cell = copy.deepcopy(stream.cell)
    cell.zero_grad()
    assert spec.make_learner is not None
    try:
        return spec.make_learner(cell, stream.batch_size), cell
    except Exception as error:
        raise Stopped(f"make_learner raised {said(error)}") from error


def walk(spec: LearnerSpec, stream: Stream) -> Outcome:
    """The whole stream, and a delivery at its end.

    Raises:
        Stopped: the learner raised, or what it delivered has the wrong form.
    """
    if spec.gradients is not None:
        cell = copy.deepcopy(stream.cell)
        try:
            found = spec.gradients(cell, stream.xs.clone(), stream.loss)
        except Exception as error:
            raise Stopped(f"gradients(cell, xs, loss_fn) raised {said(error)}") from error
        if not isinstance(found, Mapping):
            raise Stopped(f"gradients(cell, xs, loss_fn) must return a mapping by name, got {type(found).__name__}")
        return Outcome(_checked(dict(found), cell), cell)
    learner, cell = start(spec, stream)
    outputs: list[Any] = []
    for t in range(stream.steps):
        take_step(learner, cell, stream, t, outputs)
    return Outcome(deliver(learner, cell, stream.steps - 1), cell, learner, outputs)


def take_step(learner: Any, cell: nn.Module, stream: Stream, t: int, outputs: list[Any] | None = None) -> None:
    """Step t with all that belongs to it: changed parameters and resets before it, its losses, a delivery after it."""
    doing = "sync"
    try:
        if stream.offsets is not None and stream.offsets[t] and stream.offsets[t] is not stream.offsets[t - 1]:
            learner.sync()
            with torch.no_grad():
                base = dict(stream.cell.named_parameters())
                for name, p in cell.named_parameters():
                    p.copy_(base[name] + stream.offsets[t].get(name, 0.0))
        doing = "reset"
        if stream.resets is not None and (bool(stream.resets[t].any()) or t % 5 == 4):  # now and then nobody
            learner.reset(stream.resets[t].clone())
        doing = "step"
        x = _scattered(stream.xs[t]) if stream.scattered else stream.xs[t].clone()
        y = learner.step(x)
        for weight in [0.7] * (stream.pieces > 1) + [0.3 if stream.pieces > 1 else 1.0]:
            doing = "the loss of this y"
            loss = stream.loss(t, y)
            doing = "backward"
            if loss is not None and stream.plain:
                (weight * loss).backward()
            elif loss is not None:
                learner.backward(weight * loss)
        if stream.overwritten and x.is_floating_point():
            x.fill_(torch.nan)
        doing = "sync"
        if t in stream.syncs:
            learner.sync()
    except Exception as error:
        raise Stopped(f"{doing} raised {said(error)}", t) from error
    if outputs is not None:
        outputs.append(pytrees.map_tensors(lambda leaf: leaf.detach().clone(), y))


def _scattered(x: Tensor) -> Tensor:
    """A copy that is not contiguous."""
    if x.ndim == 1:
        return torch.stack([x, x], dim=1)[:, 0]
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def deliver(learner: Any, cell: nn.Module, step: int | None) -> dict[str, Tensor]:
    """``sync``, and what every ``.grad`` then holds."""
    try:
        learner.sync()
    except Exception as error:
        raise Stopped(f"sync raised {said(error)}", step) from error
    return _checked({name: p.grad for name, p in cell.named_parameters()}, cell)


def _checked(found: dict[str, Tensor | None], cell: nn.Module) -> dict[str, Tensor]:
    """Gradients of all trainable parameters in their own form; zero for None."""
    parameters = {name: p for name, p in cell.named_parameters() if p.requires_grad}
    gradients = {}
    for name, p in parameters.items():
        value = found.get(name)
        if value is None:
            gradients[name] = torch.zeros_like(p)
            continue
        if not isinstance(value, Tensor) or value.shape != p.shape or value.dtype != p.dtype:
            form = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise Stopped(f"the gradient of {name!r} must be {tuple(p.shape)} {p.dtype}, got {form}")
        gradients[name] = value.detach().to_dense().clone()
    strangers = sorted(str(name) for name, value in found.items() if name not in parameters and value is not None)
    if strangers:
        raise Stopped(f"a gradient is given for {', '.join(strangers)}, which the cell does not train, or not any more")
    return gradients


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
