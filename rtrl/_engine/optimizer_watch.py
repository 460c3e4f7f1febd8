"""Hears of every optimizer step on some parameters: fused optimizers change values without a trace in the tensors."""

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rtrl._utils.stack_level import users_level

_LOST = 3  # deliveries without use, before a warning
_IDLE = 100  # optimizer steps without a gradient, before a warning


class OptimizerWatch:
    """What optimizers of ``torch.optim``, and subclasses of these, did with a learner's parameters.

    Args:
        parameters: name → parameter; the mapping is kept, and may change.

    Attributes:
        updated: names of the parameters that an optimizer stepped with a gradient since they were cleared.
        lost: how often gradients were delivered and erased before the next optimizer step; None once some were used.
        idle: the number of optimizer steps since the last ``sync`` that found no gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._delivered = self._found = self._seen = False
        self.updated: set[str] = set()
        self.lost: int | None = 0
        self.idle = 0
        _WATCHES.append(weakref.ref(self, _WATCHES.remove))
        if not _HANDLES:
            _HANDLES.append(register_optimizer_step_pre_hook(_before_step))
            _HANDLES.append(register_optimizer_step_post_hook(_after_step))

    def delivered(self) -> None:
        """Take note that gradients were delivered just now; warn if no optimizer ever finds them.

        Cost: nothing, unless an optimizer has found no gradient before; then a pass over the gradients.
        """
        if self.lost is None or not self._seen:
            return
        self._delivered = self._any_gradient()
        if self.lost >= _LOST:
            self._warn(
                f"the gradients that sync() delivered were erased {self.lost} times before the optimizer stepped: "
                "it found none, and the parameters do not learn. Call sync(), then optimizer.step(), then zero_grad()"
            )

    def check_idle(self) -> None:
        """Warn if an optimizer steps again and again while gradients wait for a ``sync``."""
        if self.lost is not None and self.idle >= _IDLE:
            self._warn(
                f"an optimizer has stepped {self.idle} times without a gradient, while losses of this learner wait: "
                "call sync() before optimizer.step()"
            )

    def _warn(self, text: str) -> None:
        self.lost = None  # once
        warnings.warn(text, stacklevel=users_level())

    def step(self, optimizer: torch.optim.Optimizer, *, done: bool) -> None:
        """Take note of an optimizer that is about to step, or has done so."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for name, p in self._parameters.items() if id(p) in held]
        self.updated.update([name for name in names if self._parameters[name].grad is not None])
        if self.lost is None or not names:
            return
        self._seen = True
        self._found = (done and self._found) or self._any_gradient()  # a closure may bring it, or the step erase it
        if not done:
            return
        if self._found:
            self.lost = None
        elif self._delivered:
            self.lost += 1
        else:
            self.idle += 1
        self._delivered = False

    def _any_gradient(self) -> bool:
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        return any(bool((grad != 0).any()) for grad in grads)


_WATCHES: list["weakref.ref[OptimizerWatch]"] = []
_HANDLES: list[Any] = []  # of the two hooks, once there is a watch


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for reference in [*_WATCHES]:
        if (watch := reference()) is not None:
            watch.step(optimizer, done=False)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    closure = bool(args or kwargs)  # which brings gradients that were not there before
    for reference in [*_WATCHES]:
        if (watch := reference()) is not None and (closure or watch.lost is not None):
            watch.step(optimizer, done=True)
