"""A learner's state as tensors, numbers and containers of these, and back: all of it, so that a loaded learner
continues bit for bit."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtrl._engine import checks
from rtrl._engine.recorded import RecordedStep
from rtrl._influence.saved_checks import LARGEST_COUNT
from rtrl._utils import pytrees
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import real_numbers
from rtrl.cells.protocol import Sparsity, check_sparsity
from rtrl.errors import ConfigError, RTRLError
from rtrl.learners.saved_forms import check_chain, check_layout

FORMAT = 2
_WRITTEN_BY = {1: "rtrl 0.1.0"}  # older formats
_DAMAGE = (RTRLError, KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError)


@dataclass(frozen=True, slots=True)
class LearnerState:
    """Everything that a learner holds.

    Attributes:
        layout: what a saved learner and the one that loads it must have in common, as plain values.
        state: (B, n, ...), the present state.
        first_influence: of samples that have restarted since the last step, by parameter that their state depends on.
        steps_taken: the number of steps so far.
        open_steps: the newest steps, which still accept losses.
        pending_grads: gradients not yet delivered, by parameter.
        buffers: what the learning rule holds besides, by name: plain values and copies of tensors.
        restarting: Boolean (B,), the samples that restarted after the newest of the open steps; None for none.
    """

    layout: Mapping[str, Any]
    state: Tensor
    first_influence: dict[str, Tensor]
    steps_taken: int
    open_steps: list[RecordedStep]
    pending_grads: dict[str, Tensor]
    buffers: Mapping[str, Any]
    restarting: Tensor | None = None


def to_plain(learner: LearnerState) -> dict[str, Any]:
    """Return the state as containers of plain values and copies of tensors."""
    return {
        "format": FORMAT,
        "layout": learner.layout,
        "state": learner.state.clone(),
        "first_influence": {name: influence.clone() for name, influence in learner.first_influence.items()},
        "steps_taken": learner.steps_taken,
        "open_steps": [step_to_plain(step) for step in learner.open_steps],
        "pending_grads": {name: gradient.clone() for name, gradient in learner.pending_grads.items()},
        "buffers": learner.buffers,
        "restarting": None if learner.restarting is None else learner.restarting.clone(),
    }


def from_plain(
    saved: Any, present: LearnerState, named: Mapping[str, Tensor], adaptable: Collection[str] = ()
) -> LearnerState:
    """Return the state that ``to_plain`` gave, checked against the learner that is to load it.

    Args:
        saved: what ``to_plain`` returned, of this format. Its buffers are passed on unchecked.
        present: the state of the learner that is to load it, without buffers; it is not changed.
        named: all parameters of the cell, by name.
        adaptable: parts of the layout that may differ as long as no step is open.

    Returns:
        The state, with the layout of the saved learner.

    Raises:
        ConfigError: it does not fit the learner.
        RTRLError: it is damaged; so do the errors of Python that ``damage_reported`` turns into a ``ConfigError``.
    """
    check_layout(saved["layout"], present.layout, adaptable)
    _check_layout(saved["layout"], present.layout, () if saved["open_steps"] else adaptable, adaptable)
    taken = saved["steps_taken"]
    if type(taken) is not int or not 0 <= taken <= LARGEST_COUNT:
        raise ConfigError(f"'steps_taken' of the saved learner must be a count, got {taken!r}")
    steps = [step_from_plain(step, present.state, named) for step in saved["open_steps"]]
    check_numbers(steps, taken)
    gradients = saved["pending_grads"]
    if not gradients.keys() <= present.layout["parameters"].keys():
        raise ConfigError("the saved gradients are not those of this learner's parameters")
    gradients = {name: copy_like(f"gradient of {name!r}", gradients[name], named[name]) for name in gradients}
    state = copy_like("state", saved["state"], present.state)
    if not checks.finite(state):
        raise ConfigError("NaN or infinity in the saved state")
    first = first_from_plain(saved.get("first_influence", {}), state, named)
    if not first.keys() <= present.layout["parameters"].keys():
        raise ConfigError("the saved influence of first states is not that of this learner's parameters")
    restarting = mask_from_plain(saved.get("restarting"), state)
    if restarting is not None and not steps:
        raise ConfigError("samples of the saved learner restarted after an open step, but it has none")
    check_chain(steps, state, restarting)
    return LearnerState(saved["layout"], state, first, taken, steps, gradients, saved["buffers"], restarting)


@contextmanager
def damage_reported() -> Iterator[None]:
    """Turn every error that a damaged saved learner causes into a ``ConfigError`` that says so."""
    try:
        yield
    except ConfigError:
        raise
    except _DAMAGE as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"the saved learner is damaged: {type(error).__name__}: {error}") from error


def check_numbers(steps: Sequence[RecordedStep], stop: int) -> None:
    """Refuse steps that are not the last ones before step ``stop``, in order.

    Raises:
        ConfigError: they are not.
    """
    if any(type(step.number) is not int for step in steps) or [step.number for step in steps] != list(
        range(stop - len(steps), stop)
    ):
        raise ConfigError("the steps of the saved learner do not fit the number of steps that it has taken")


def copy_like(what: str, value: Tensor, like: Tensor) -> Tensor:
    """Return a copy on the device of ``like``.

    Raises:
        ConfigError: the value does not have the shape and dtype of ``like``.
    """
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ConfigError(
            f"the saved {what} is {tuple(value.shape)} {value.dtype}, this learner needs {tuple(like.shape)} "
            f"{like.dtype}"
        )
    return value.detach().to(like.device, copy=True)


def first_from_plain(saved: Mapping[str, Tensor], state: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a saved influence of first states, by parameter name.

    Raises:
        ConfigError: it does not fit the state and the parameters.
    """
    size, entries = len(state), state[0].numel()
    return {
        name: copy_like(
            f"first influence of {name!r}", value, state.new_empty(size, entries, real_numbers(named[name]))
        )
        for name, value in saved.items()
    }


def mask_from_plain(saved: Tensor | None, state: Tensor) -> Tensor | None:
    """Return a copy of a saved Boolean (B,), or None.

    Raises:
        ConfigError: it does not fit the state.
    """
    if saved is None:
        return None
    return copy_like("mask of samples that restarted", saved, state.new_empty(len(state), dtype=torch.bool))


def step_to_plain(step: RecordedStep) -> dict[str, Any]:
    """Return a step, with the gradients of its losses, as plain values and copies of tensors.

    Raises:
        ConfigError: its x carries a graph, which cannot be saved.
    """
    if step.sources:
        raise ConfigError(
            f"the x of step {step.number} of the open block waits for its gradient (input_grad='block'), and its graph "
            "cannot be saved or copied; call sync() first"
        )
    return {
        "x": pytrees.map_tensors(Tensor.clone, step.x),
        "h": step.h.clone(),
        **pytrees.map_tensors(Tensor.clone, step.sparsity._asdict()),
        "outputs": [leaf.detach().clone() for leaf in step.outputs],
        "grads": [None if grad is None else grad.clone() for grad in step.grads],
        "number": step.number,
        "restarted": None if step.restarted is None else step.restarted.clone(),
        "reached": None if step.reached is None else step.reached.clone(),
    }


def step_from_plain(saved: Mapping[str, Any], state: Tensor, named: Mapping[str, Tensor]) -> RecordedStep:
    """Return the step that ``step_to_plain`` gave.

    Args:
        saved: what ``step_to_plain`` returned.
        state: a state of the learner that is to load it.
        named: all parameters of the cell, by name.

    Raises:
        ConfigError: the step does not fit the state and batch.
        SparsityError: its index sets are malformed.
    """

    def move(value: Tensor) -> Tensor:
        return value.to(state.device, copy=True)

    outputs = [move(value).requires_grad_() for value in saved["outputs"]]
    for leaf, grad in zip(outputs, saved["grads"], strict=True):
        leaf.grad = None if grad is None else move(grad)
    sparsity = Sparsity(**pytrees.map_tensors(move, {name: saved[name] for name in Sparsity._fields}))
    x, h = pytrees.map_tensors(move, saved["x"]), copy_like("h of a step", saved["h"], state)
    if any(len(tensor) != len(state) for tensor in [*pytrees.tensors(x), *outputs]):
        raise ConfigError(f"the saved step {saved['number']} does not fit the batch of {len(state)} of this learner")
    check_sparsity(sparsity, h, named)
    restarted, reached = mask_from_plain(saved.get("restarted"), state), saved.get("reached")
    reached = None if reached is None else copy_like("state after a step", reached, state)
    return RecordedStep(x, h, sparsity, outputs, saved["number"], restarted=restarted, reached=reached)


def check_format(saved: Any) -> None:
    """Refuse what is not a saved learner of this format.

    Raises:
        ConfigError: it is not; the message says which version wrote it, if that is known.
    """
    number = saved.get("format") if isinstance(saved, Mapping) else None
    if type(number) is not int:
        raise ConfigError("this is not a saved learner; pass what state_dict() returned")
    if number in _WRITTEN_BY:
        raise ConfigError(
            f"this learner was saved by {_WRITTEN_BY[number]}, in format {number}; this version reads format {FORMAT} "
            "alone. Finish the run with that version, or make a new learner with the saved parameters of the cell"
        )
    if number != FORMAT:
        raise ConfigError(
            f"this learner was saved in format {number}, which this version does not know; it reads format {FORMAT}. "
            "Load it with the version of rtrl that saved it"
        )


def _check_layout(
    saved: Mapping[str, Any], present: Mapping[str, Any], free: Collection[str], adaptable: Collection[str]
) -> None:
    """Refuse a saved layout that differs, but for the parts that are ``free``."""
    for name, expected in present.items():
        value = saved[name]
        if isinstance(value, Mapping):  # name only the parameters that differ
            value, expected = (
                {key: one[key] for key in one if one[key] != other.get(key)}
                for one, other in ((value, expected), (expected, value))
            )
        if value == expected or name in free:
            continue
        remedy = ", and an open block; call sync() before saving it" if name in adaptable else ""
        raise ConfigError(f"the saved learner has {name}={value!r}, this one {expected!r}{remedy}")
