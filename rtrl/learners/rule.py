"""What all learning rules share, and what each of them supplies."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import losses
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.surroundings import linearizing
from rtrl._utils.real_pairs import real_numbers
from rtrl.errors import ConfigError, RTRLError
from rtrl.learners.state import LearnerState


class LearningRule(ABC):
    """The block of open steps, its parameters, and how it is closed; ``Learner`` is built on it.

    Attributes:
        cell: the cell.
        batch_size: B, the number of samples.
        block: the number of steps that are processed together.
    """

    cell: nn.Module
    batch_size: int
    block: int = 1
    _keeps_x: bool = False  # whether an x that requires grad is taken, and gets its gradient
    _guards_values: bool = True  # whether parameters must keep their values inside a block

    _guard: ParameterGuard
    _parameters: dict[str, nn.Parameter]  # the trainable ones, by name
    _state: Tensor
    _first_influence: dict[str, Tensor]  # of the first state, if that depends on parameters
    _restarting: Tensor | None  # samples, Boolean (B,), that restarted after the newest step, which is open
    _steps_taken: int
    _open_steps: list[RecordedStep]  # these still accept losses
    _seen_losses: list[weakref.ref[Tensor]]  # of the newest step
    _pending_grads: dict[str, Tensor]  # by parameter, not yet delivered to .grad
    _finite_grads: dict[str, Tensor] | None = None  # the same object, as long as its gradients are known to be finite
    _damage: str | None  # what was not finished: set before the first change to what is carried, until the last one
    _broken_off_by: str | None = None  # the error that left ``_damage``
    on_nonfinite: str = "raise"  # what is done about NaN and infinity: "raise", or "skip" the step
    _thread: int | None = None  # the thread in which a public method runs

    # ------------------------------------------------------------------ what all rules share

    @property
    def _reached(self) -> Tensor:
        """The state that the newest of the open steps reached, of samples that have restarted since, too."""
        reached = self._open_steps[-1].reached
        return self._state if reached is None else reached

    def _check_parameters(self) -> None:
        """Refuse parameters that were replaced, or that changed while steps are open."""
        steps = self._open_steps
        self._guard.check([step.number for step in (*steps[:1], *steps[-1:])])

    def _first_influence_of(self, name: str) -> Tensor:
        """Return the influence (B, H, P) of one parameter on first states from which no step was taken yet."""
        if name in self._first_influence:
            return self._first_influence[name].clone()
        return self._state.new_zeros(self.batch_size, self._state[0].numel(), real_numbers(self._parameters[name]))

    def _check_intact(self) -> None:
        """Refuse to go on from values that a failure or an interrupt has left half changed."""
        if self._damage is not None:
            cause = "" if self._broken_off_by is None else f" (broken off by {self._broken_off_by})"
            raise RTRLError(
                f"{self._damage}, and what the learner carries was left half changed. Load a saved learner, or start "
                f"again by reset(discard=True){cause}"
            )

    def _check_name(self, name: str) -> None:
        if name not in self._parameters:
            raise ConfigError(f"no trainable parameter is called {name!r}; there are {', '.join(self._parameters)}")

    def _close_for(self, name: str) -> None:
        """Process the open steps, to look at one parameter; an unknown name is refused before and after."""
        if name not in self._guard.trainable():
            self._check_name(name)
        self._close()
        self._check_name(name)

    def _adopt_parameters(self) -> None:
        """Take note that parameters were frozen or unfrozen, at the end of a block.

        The gradient of a frozen one that is not yet delivered is dropped with its influence; the influence of an
        unfrozen one begins at zero.
        """
        before = {name: real_numbers(parameter) for name, parameter in self._parameters.items()}
        damage = self._damage
        self._damage = damage or "parameters that were frozen or unfrozen were not taken note of as a whole"
        for name in self._guard.adopt():
            self._pending_grads.pop(name, None)
            self._first_influence.pop(name, None)
        self._adopt(before)
        self._damage = damage

    def _close(self) -> None:
        """Process the open steps. They accept no more losses then."""
        self._check_intact()
        self._check_parameters()
        if self._guard.toggled:
            self._adopt_parameters()
        if self._open_steps:
            losses.check_none_was_removed(self._open_steps)
            if not self._process_at_once():
                with torch.no_grad(), linearizing(self._parameters.values()):
                    self._process()
            self._damage = self._damage or "a block was not closed as a whole"
            restarting = self._restarting
            self._give_up_block()
            if restarting is not None:
                self._clear(restarting, False)
            self._damage = None

    def _give_up_block(self) -> None:
        """Let the open steps accept no more losses, and forget them."""
        last = {id(leaf): (leaf, step.number) for step in self._open_steps for leaf in step.leaves}
        self._open_steps, self._seen_losses, self._restarting = [], [], None
        losses.close_leaves(last.values())  # of a sequence, with the number of its last step

    # ------------------------------------------------------------------ what a rule supplies

    _adaptable: Collection[str] = ()  # arguments in which a learner and the saved one that it loads may differ
    _rebuilt: tuple[str, ...] = (  # attributes that a copy does not take over: it loads what the original saves
        *("_guard", "_parameters", "_open_steps", "_seen_losses", "_pending_grads", "_first_influence", "_restarting"),
        *("_finite_grads", "_thread"),
    )

    def _prepare(self) -> None:
        """Make what depends on which parameters are trainable, and on their dtype and device."""
        return

    def _check_dtype_may_change(self) -> None:
        """Refuse another dtype, if what is held depends on the present one."""
        return

    def _adapt(self) -> None:
        """Carry on after loading what a learner with other ``_adaptable`` arguments saved, at the end of a block."""
        return

    def _begin_block(self, step: RecordedStep) -> None:
        """Prepare for a block, of which this is the first step."""
        self._guard.begin()

    @abstractmethod
    def _process(self) -> None:
        """Process the open steps, of which there is at least one.

        Everything that can fail comes before the first change. Just before that, ``_damage`` is set to what would be
        left half done; ``_close`` clears it.
        """

    def _process_at_once(self) -> bool:
        """Process the open steps in a quicker way than ``_process``, if there is one for them; return whether it was
        done. For changes, the same holds."""
        return False

    def _adopt(self, before: Mapping[str, int]) -> None:
        """Carry on with the present ``_parameters``; before they were these, by name and size."""
        return

    def _flush(self, dormant: bool) -> None:
        """Accumulate gradients that are still pending elsewhere, before a delivery."""
        return

    def _clear(self, samples: Tensor, discard: bool) -> None:
        """Clear what is carried for these samples, Boolean (B,); unless ``discard``, their gradients are accumulated
        first."""
        return

    def _start_clean(self) -> None:
        """Carry what a new learner of the present ``_parameters`` carries; what was left half changed is dropped."""
        self._clear(torch.ones(self.batch_size, dtype=torch.bool, device=self._state.device), True)

    def _held_bytes(self) -> dict[str, int]:
        """Bytes held, by part, of what the rule carries and of the open steps."""
        return {}

    def _arguments(self) -> dict[str, Any]:
        """The arguments beside cell and batch_size, as plain values."""
        return {}

    def _buffers(self) -> dict[str, Any]:
        """What a saved learner contains beside the common part: plain values and copies of tensors, by name."""
        return {}

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        """Check the buffers of a saved learner and return new values of attributes, by name; change nothing."""
        return {}
