"""Calls of a learner: one at a time, and however one ends, the process stays as it was."""

from collections.abc import Callable
from functools import wraps
from threading import get_ident
from traceback import clear_frames
from typing import Concatenate, ParamSpec, TypeVar

import torch

from rtrl._engine.surroundings import function_modes, switch_back
from rtrl._utils.undo import CHANGES
from rtrl.errors import RTRLError
from rtrl.learners.rule import LearningRule

_Learner = TypeVar("_Learner", bound=LearningRule)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _close_contexts(error: BaseException | None) -> None:
    """Close what Ctrl-C left half left: now, and not when its frames are freed. Other errors keep their frames."""
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__context__
    if not all(isinstance(each, Exception) for each in chain):
        for each in chain:
            clear_frames(each.__traceback__)


def exclusive(
    method: Callable[Concatenate[_Learner, _Arguments], _Result],
) -> Callable[Concatenate[_Learner, _Arguments], _Result]:
    """Let a method of a learner run in one thread at a time.

    If it is broken off, by Ctrl-C for example, gradients, modes and hooks are switched back to what they were; and if
    that happened while the learner changed what it carries, the learner says in its refusals what broke it off.

    Raises:
        RTRLError: the learner is in use by another thread.

    Cost: some calls of C functions, about 1 % of a small step.
    """

    @wraps(method)
    def call(self: _Learner, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        thread, grad, modes, number = get_ident(), torch.is_grad_enabled(), function_modes(), CHANGES.number
        damage, entered = self._damage, False
        try:
            if self._thread is None:  # no call lies between this and the next line, so that no thread does
                self._thread, entered = thread, True
            elif self._thread != thread:
                raise RTRLError(
                    "the learner is in use by another thread. A learner serves one thread at a time: share it behind "
                    "a lock, or make one for each thread"
                )
            return method(self, *args, **kwargs)
        except BaseException as error:
            if entered:
                _close_contexts(error)
                switch_back(grad, modes, number)
                if self._damage is not None and self._damage is not damage:
                    self._broken_off_by = f"{type(error).__name__}: {error}"
            raise
        finally:
            if entered:
                self._thread = None

    return call  # type: ignore[return-value]
