"""A learner's state as tensors, numbers and containers of such, and back: all of it, so that a loaded learner goes "
"on bit for bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtrl._engine import checks
from rtrl._engine.recorded import RecordedStep
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._utils import pytrees
from rtrl.cells.protocol import Sparsity, check_sparsity
from rtrl.errors import ConfigError, RTRLError

if TYPE_CHECKING:  # the learner imports this module
    from rtrl.learners.block_rtrl import BlockRTRL

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parts of a saved learner, checked against the one that is to take them over."""

    state: Tensor
    taken: int
    paid: int
    steps: list[RecordedStep]
    influences: dict[str, ParameterInfluence]
    history: History | None
    earned: dict[str, Tensor]


def save(learner: "BlockRTRL") -> dict[str, Any]:
    """Everything that a learner holds, in copies."""
    return {
        "format": FORMAT,
        "layout": _layout(learner),
        "state": learner._state.clone(),
        "taken": learner._taken,
        "paid": learner._paid,
        "steps": [_step_state(step) for step in learner._steps],
        "influences": {name: influence.state_dict() for name, influence in learner._influences.items()},
        "history": None if learner._history is None else learner._history.state_dict(),
        "earned": {name: gradient.clone() for name, gradient in learner._earned.items()},
    }


def load(learner: "BlockRTRL", saved: Any) -> Loaded:
    """What ``save`` gave, checked against ``learner``, which is not touched.

    Raises:
        ConfigError: it is no saved learner, is damaged, or was taken of another cell or with other arguments.
    """
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
        raise ConfigError("this is no saved learner of a format that is known; pass what state_dict() returned")
    try:
        return _load(learner, saved)
    except ConfigError:
        raise
    except (RTRLError, KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise ConfigError(f"the saved learner is damaged: {type(error).__name__}: {error}") from error


def _load(learner: "BlockRTRL", saved: Mapping[str, Any]) -> Loaded:
    for name, mine in _layout(learner).items():
        value = saved["layout"][name]
        if isinstance(value, Mapping):  # say only which parameters differ
            value, mine = (
                {k: v for k, v in one.items() if two.get(k) != v} for one, two in ((value, mine), (mine, value))
            )
        if value != mine:
            raise ConfigError(f"the saved learner has {name}={value!r}, this one {mine!r}")
    for name in ("taken", "paid"):
        if type(saved[name]) is not int or saved[name] < 0:
            raise ConfigError(f"{name!r} of the saved learner must be a count, got {saved[name]!r}")
    parameters, like = learner._parameters, learner._state
    if saved["influences"] and saved["influences"].keys() != parameters.keys():
        raise ConfigError("the saved influences are not those of this learner's parameters")
    influences = {}
    for name, held in saved["influences"].items():
        influences[name] = learner._empty_influence(name, held["sliced"])
        influences[name].load_state_dict(held)
    history = None if saved["history"] is None else History.from_state_dict(saved["history"], like)
    if saved["paid"] > (0 if history is None else history.now) or bool(influences) != (history is not None):
        raise ConfigError("the parts of the saved learner do not fit together")
    if history is not None:
        _check_clocks(influences, history, learner.window if any(i.sliced for i in influences.values()) else 1)
    steps = [_step_from_state(held, like) for held in saved["steps"]]
    for step in steps:
        batched = [*pytrees.tensors(step.x), *step.outputs]
        if (
            step.h.shape != like.shape
            or step.h.dtype != like.dtype
            or any(len(t) != learner.batch_size for t in batched)
        ):
            raise ConfigError(f"the saved step {step.number} does not fit the state and batch of this learner")
        check_sparsity(step.sparsity, step.h, dict(learner.cell.named_parameters()))
    if [step.number for step in steps] != list(range(saved["taken"] - len(steps), saved["taken"])):
        raise ConfigError("the open steps of the saved learner do not fit its count")
    earned = {name: gradient.to(like, copy=True) for name, gradient in saved["earned"].items()}
    for name, gradient in saved["earned"].items():
        if gradient.shape != parameters[name].shape or gradient.dtype != parameters[name].dtype:
            raise ConfigError(f"the saved gradient of {name!r} does not have the parameter's shape and dtype")
    if not checks.finite(saved["state"]):
        raise ConfigError("NaN or infinity in the saved state")
    if saved["state"].shape != like.shape or saved["state"].dtype != like.dtype:
        raise ConfigError(f"the saved state is {tuple(saved['state'].shape)} {saved['state'].dtype}")
    state = saved["state"].to(like, copy=True)
    return Loaded(state, saved["taken"], saved["paid"], steps, influences, history, earned)


def _check_clocks(influences: Mapping[str, ParameterInfluence], history: History, window: int) -> None:
    """Every influence must lie within what the history can lead on from."""
    if history.capacity not in (1, window):
        raise ConfigError(f"the saved history holds {history.capacity} blocks, this learner's {window}")
    for name, influence in influences.items():
        clocks = influence.last_block[influence.active_rows()]
        if clocks.numel() and (int(clocks.max()) > history.now or int(clocks.min()) < history.oldest):
            raise ConfigError(f"the saved influence of {name!r} is of a time that the saved history does not reach")


def _layout(learner: "BlockRTRL") -> dict[str, Any]:
    """What a saved learner and the one that loads it must have in common."""
    return {
        "batch_size": learner.batch_size,
        "block": learner.block,
        "window": learner.window,
        "lazy": learner.lazy,
        "state": f"{tuple(learner._state.shape)} {learner._state.dtype}",
        "parameters": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in learner._parameters.items()},
    }


def _step_state(step: RecordedStep) -> dict[str, Any]:
    return {
        "x": pytrees.map_tensors(torch.clone, step.x),
        "h": step.h.clone(),
        **pytrees.map_tensors(torch.clone, step.sparsity._asdict()),
        "outputs": [leaf.detach().clone() for leaf in step.outputs],
        "grads": [None if leaf.grad is None else leaf.grad.clone() for leaf in step.outputs],
        "number": step.number,
    }


def _step_from_state(saved: Mapping[str, Any], like: Tensor) -> RecordedStep:
    def move(value: Tensor) -> Tensor:
        return value.to(like.device, copy=True)

    outputs = [move(value).requires_grad_() for value in saved["outputs"]]
    for leaf, grad in zip(outputs, saved["grads"], strict=True):
        leaf.grad = None if grad is None else move(grad)
    reads, writes = (None if saved[k] is None else move(saved[k]) for k in ("reads", "writes"))
    sparsity = Sparsity(reads, writes, {name: move(index) for name, index in saved["active"].items()})
    return RecordedStep(pytrees.map_tensors(move, saved["x"]), move(saved["h"]), sparsity, outputs, saved["number"])
