"""Saving, copying and moving a learner."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._utils import pytrees
from rtrl.errors import ConfigError, NonFiniteError
from rtrl.learners import state as saved_state
from rtrl.learners.exclusive import exclusive
from rtrl.learners.rule import LearningRule
from rtrl.learners.saved_forms import check_digest, in_dtype_of, with_digest
from rtrl.learners.state import LearnerState


class PortableLearner(LearningRule):
    """A learner that can be saved, copied, and moved to another device or dtype; ``Learner`` is built on it."""

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue bit for bit, as tensors, numbers and containers of these.

        Save the cell's parameters beside it. Add the losses of a step before saving it: the ``y`` of a step taken
        before the save accepts no more losses after a load. Its "digest" depends on every bit of it: what is damaged or
        changed is refused by ``load_state_dict``.
        """
        return with_digest(self._plain())

    def _plain(self) -> dict[str, Any]:
        """What ``state_dict`` returns, without its digest."""
        self._check_intact()
        if not self._open_steps and self._guard.find_toggled():
            self._adopt_parameters()
        return saved_state.to_plain(self._learner_state(self._buffers()))

    @exclusive
    @torch.inference_mode(False)
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken, with the same cell, parameters and arguments.

        If no step was open, after a ``sync``, the real dtype may differ, and so may ``block``, ``window`` and ``lazy``
        of ``BlockRTRL``: dormant slices are then brought up to date, and the gradient is the same up to rounding. The
        device may always differ.

        Args:
            saved: what ``state_dict`` returned.

        Raises:
            ConfigError: it is not a saved learner of this format, it is damaged, or it was taken of a learner with
                another cell or other arguments. Nothing has changed.
        """
        with saved_state.damage_reported():
            if not self._open_steps and self._guard.find_toggled():
                self._adopt_parameters()
            present = self._learner_state({})
            saved_state.check_format(saved)
            converted = in_dtype_of(saved, present.layout)
            loaded = saved_state.from_plain(converted, present, self._guard.named, self._adaptable)
            if len(loaded.open_steps) > self.block:
                raise ConfigError(f"the saved learner has {len(loaded.open_steps)} open steps, but block={self.block}")
            buffers = self._load_buffers(loaded)
            check_digest(saved)
        self._damage = "a saved learner was not loaded as a whole"
        self._give_up_block()
        self._state, self._steps_taken = loaded.state, loaded.steps_taken
        self._first_influence, self._restarting = loaded.first_influence, loaded.restarting
        self._open_steps, self._pending_grads, self._finite_grads = loaded.open_steps, loaded.pending_grads, None
        for attribute, value in buffers.items():
            setattr(self, attribute, value)
        self._guard.begin()
        if loaded.layout != present.layout:
            self._adapt()
        self._damage = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy.deepcopy`` and ``pickle`` need. A copy has a cell of its own, and continues bit for bit,
        an open block included; a y of the original does not reach it.

        Raises:
            ParameterChangedError: a parameter changed inside the open block.
            ConfigError: an x of the open block waits for its gradient, see ``input_grad`` of ``BlockRTRL``.
        """
        if self._open_steps:
            self._check_parameters()
        attributes = {name: value for name, value in vars(self).items() if name not in self._rebuilt}
        return {"attributes": attributes, "saved": self._plain()}

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state["attributes"])
        self._guard = ParameterGuard(self.cell, self._guards_values)
        self._parameters = self._guard.parameters
        self._open_steps, self._seen_losses, self._pending_grads, self._first_influence = [], [], {}, {}
        self._restarting = None
        self._prepare()
        self.load_state_dict(state["saved"])

    @exclusive
    @torch.inference_mode(False)
    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the learner and its cell to another device or floating-point dtype, in place.

        The open block is closed first, as by ``sync``. The cell is moved by ``cell.to``, so that its parameters stay
        the same objects for an optimizer. A cell that was moved before, when no step was open, stays as it is.

        Args:
            *args: as for ``torch.nn.Module.to``: a device, a dtype, both, or a tensor that has them.
            **kwargs: as for ``torch.nn.Module.to``.

        Returns:
            The learner itself.

        Raises:
            ConfigError: the dtype is not a real floating-point one, or would make a complex parameter real; or BPTT or
                TBPTT hold steps of another dtype.
            NonFiniteError: the state overflows in this dtype. Nothing has changed but that the block is closed.
            RTRLError: the open block cannot be closed; see ``sync``.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"a learner can only be moved to a real floating-point dtype, got {dtype}")
        complex_ones = [name for name, p in self._guard.named.items() if p.is_complex()]
        if complex_ones and dtype is not None:
            raise ConfigError(
                f"parameter {complex_ones[0]!r} is complex, and torch.nn.Module.to({dtype}) would drop its imaginary "
                "part; convert the cell by hand, and make a new learner"
            )

        def moved(value: Tensor) -> Tensor:
            if isinstance(value, nn.Parameter):
                return value
            to_dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
            return value.to(device or value.device, to_dtype, non_blocking)

        self._close()
        if dtype not in (None, self._state.dtype):
            self._check_dtype_may_change()
        if not checks.finite(moved(self._state)):
            raise NonFiniteError(f"the state has values that {dtype} cannot hold")
        saved = pytrees.map_tensors(moved, self._plain())
        self._damage = "the learner was not moved as a whole"
        self.cell.to(*args, **kwargs)
        for name, value in list(vars(self).items()):
            if name not in self._rebuilt:
                setattr(self, name, pytrees.map_tensors(moved, value))
        self._prepare()
        self.load_state_dict({**saved, "layout": self._learner_state({}).layout})
        return self

    def _learner_state(self, buffers: Mapping[str, Any]) -> LearnerState:
        ours = [kind for kind in type(self).__mro__ if kind.__module__.startswith("rtrl.learners.")]
        rules = [kind for kind in ours if not inspect.isabstract(kind)]  # a subclass of one loads what that one saved
        layout = {
            "learner": (rules or [type(self)])[0].__name__,
            "batch_size": self.batch_size,
            **self._arguments(),
            "state": f"{tuple(self._state.shape)} {self._state.dtype}",
            "parameters": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in self._parameters.items()},
        }
        held = self._state, self._first_influence, self._steps_taken, self._open_steps, self._pending_grads
        return LearnerState(layout, *held, buffers, self._restarting)
