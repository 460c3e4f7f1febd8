"""A baseline's state as tensors, numbers and containers of such, and back: all of it, so that a loaded learner goes on
bit for bit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtrl._utils import pytrees
from rtrl.cells.protocol import Sparsity, check_sparsity
from rtrl.errors import ConfigError, RTRLError
from rtrl.learners.replayed_step import Step, Values

if TYPE_CHECKING:  # the learners import this module
    from rtrl.learners.base import Baseline

FORMAT = 1


def save(learner: "Baseline") -> dict[str, Any]:
    """Everything that a baseline holds, in copies; parameters that steps share are saved once."""
    kept, newest = learner._kept_steps(), learner._open
    steps = kept if newest is None else [*kept, newest]
    values = {id(step.values): step.values for step in steps}
    places = {key: place for place, key in enumerate(values)}
    return {
        "format": FORMAT,
        "layout": _layout(learner),
        "state": learner._state.clone(),
        "cut": learner._cut.clone(),
        "taken": learner._taken,
        "values": [value.copies() for value in values.values()],
        "steps": [_step_state(step, places[id(step.values)]) for step in steps],
        "open": newest is not None,
        "earned": {name: gradient.clone() for name, gradient in learner._earned.items()},
        "carried": {name: value.clone() for name, value in learner._memory().items()},
        "draws": learner._draws(),
    }


def load(learner: "Baseline", saved: Any) -> None:
    """Give a baseline what ``save`` gave.

    Raises:
        ConfigError: it is no saved baseline, is damaged, or was taken of another learner, of another cell or with other
            arguments. Nothing has changed then.
    """
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
        raise ConfigError("this is no saved baseline of a format that is known; pass what state_dict() returned")
    try:
        _load(learner, saved)
    except (RTRLError, KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the saved baseline is damaged: {type(error).__name__}: {error}") from error


def _load(learner: "Baseline", saved: Mapping[str, Any]) -> None:
    layout = saved["layout"]
    for name, mine in _layout(learner).items():
        if layout[name] != mine:
            raise ConfigError(f"the saved baseline has {name}={layout[name]!r}, this one {mine!r}")
    taken = saved["taken"]
    if type(taken) is not int or taken < 0:
        raise ConfigError(f"'taken' of the saved baseline must be a count, got {taken!r}")
    like = learner._state
    state, cut = _same("state", saved["state"], like), _same("cut", saved["cut"], learner._cut)
    memory = learner._memory()
    if saved["carried"].keys() != memory.keys():
        raise ConfigError("what the saved baseline carries is not what this one does")
    carried = {name: _same(name, saved["carried"][name], mine) for name, mine in memory.items()}
    earned = {
        name: _same(f"gradient of {name!r}", gradient, learner._parameters[name])
        for name, gradient in saved["earned"].items()
    }
    held = [Values.of(learner.cell, copies) for copies in saved["values"]]
    steps = [_step_from_state(step, held, like) for step in saved["steps"]]
    for step in steps:
        _same("h of a step", step.h, like)
        if any(len(leaf) != learner.batch_size for leaf in [*pytrees.tensors(step.x), *step.outputs]):
            raise ConfigError(f"the saved step {step.number} does not fit the batch of this learner")
        if step.replay is not None:
            check_sparsity(step.replay, step.h, dict(learner.cell.named_parameters()))
    if [step.number for step in steps] != list(range(taken - len(steps), taken)):
        raise ConfigError("the steps of the saved baseline do not fit its count")
    draws = saved["draws"]
    if draws is not None:
        torch.Generator().set_state(draws)  # raises if it is no such state

    learner._give_up_step()
    newest = steps.pop() if saved["open"] else None
    learner._state, learner._cut, learner._taken = state, cut, taken
    learner._values, learner._open, learner._earned = (held[-1] if held else None), newest, earned
    learner._keep_steps(steps)
    learner._remember(carried)
    if draws is not None:
        learner._set_draws(draws)


def _same(what: str, value: Tensor, like: Tensor) -> Tensor:
    """A copy where ``like`` is, if it has its shape and dtype."""
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ConfigError(
            f"the saved {what} is {tuple(value.shape)} {value.dtype}, here {tuple(like.shape)} {like.dtype}"
        )
    return value.detach().to(like.device, copy=True)


def _layout(learner: "Baseline") -> dict[str, Any]:
    """What a saved baseline and the one that loads it must have in common."""
    return {
        "learner": type(learner).__name__,
        "batch_size": learner.batch_size,
        **learner._arguments(),
        "state": f"{tuple(learner._state.shape)} {learner._state.dtype}",
        "parameters": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in learner._parameters.items()},
    }


def _step_state(step: Step, values: int) -> dict[str, Any]:
    copy = torch.clone
    return {
        "number": step.number,
        "values": values,
        "x": pytrees.map_tensors(copy, step.x),
        "h": step.h.clone(),
        "h_next": step.h_next.clone(),
        "replay": None if step.replay is None else pytrees.map_tensors(copy, step.replay._asdict()),
        "cut": step.cut.clone(),
        "outputs": [leaf.detach().clone() for leaf in step.outputs],
        "grads": [None if leaf.grad is None else leaf.grad.clone() for leaf in step.outputs],
        "adjoints": [None if adjoint is None else adjoint.clone() for adjoint in step.adjoints],
    }


def _step_from_state(saved: Mapping[str, Any], values: list[Values], like: Tensor) -> Step:
    def move(value: Tensor) -> Tensor:
        return value.to(like.device, copy=True)

    outputs = [move(value).requires_grad_() for value in saved["outputs"]]
    for leaf, grad in zip(outputs, saved["grads"], strict=True):
        leaf.grad = None if grad is None else move(grad)
    replay = None if saved["replay"] is None else Sparsity(**pytrees.map_tensors(move, saved["replay"]))
    adjoints = [None if adjoint is None else move(adjoint) for adjoint in saved["adjoints"]]
    x, h, h_next, cut = (pytrees.map_tensors(move, saved[name]) for name in ("x", "h", "h_next", "cut"))
    return Step(saved["number"], x, h, h_next, replay, values[saved["values"]], cut, outputs, adjoints)
