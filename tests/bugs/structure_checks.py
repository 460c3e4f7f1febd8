"""Checks of cells whose rows are independent, of layers of them, and of structure that does not last."""

from collections.abc import Callable

import pytest
import torch
from helpers.strategies import normal
from helpers.structured_cases import LAYERS, D, check, drawn, placed, stack
from torch import Tensor

import rtrl
from rtrl.errors import ConfigError


def rows_of_states() -> None:
    """Rows of one number and of two, one of which begins as what another learns."""
    for kind in ("peephole", "rolled start"):
        check(drawn(LAYERS[kind](D, 3), steps=6, block=2))


def layers_of_rows() -> None:
    """Three layers: the upper two are fed, the uppermost directly and through the one between."""
    check(drawn(stack(["minGRU", "complex pairs", "minGRU"], 2), steps=6, block=4))


def weights_of_several_rows() -> None:
    """A gain and a norm reach all rows, and layers below a bend feed them."""
    check(drawn(stack(["normed", "minGRU"], 3), steps=6, block=2))


def resets_of_rows() -> None:
    flags = torch.zeros(7, 2, dtype=torch.bool)
    flags[2, 0] = flags[4, 1] = True
    check(drawn(stack(["minGRU", "peephole"], 2), steps=7, block=4), resets=flags)


def _opening(what: str, place: str) -> None:
    """From step 3 on, in the middle of a block, for one sample of two."""
    xs = normal(5, 6, 2, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[3:, 1, 0] *= -1
    check(drawn(placed(what, place, 3), steps=6, xs=xs, block=2))


def rows_that_open() -> None:
    _opening("state", "alone")


def single_steps_that_open() -> None:
    """From step 6 on, when steps are processed at once."""
    xs = normal(5, 9, 1, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[6:, 0, 0] *= -1
    check(drawn(placed("state", "alone", 3), steps=9, xs=xs, block=1))


def weights_that_reach_other_rows() -> None:
    _opening("weight", "alone")


def outputs_above_that_reach_other_rows() -> None:
    _opening("moved", "above")


def saved_structures() -> None:
    """A structure with the form of the learner's and rows that its state does not have is refused."""
    learner = rtrl.BlockRTRL(drawn(LAYERS["minGRU"](D, 3)).cell, 2)
    for x in normal(1, 3, 2, D):
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    saved = learner.state_dict()
    del saved["digest"]
    for damage in (_beyond, _twice):
        with pytest.raises(ConfigError):
            rtrl.BlockRTRL(learner.cell, 2).load_state_dict(_changed(saved, damage))


def _beyond(index: Tensor) -> Tensor:
    return index + 1


def _twice(index: Tensor) -> Tensor:
    return index.clamp(max=1)


def _changed(saved: object, change: Callable[[Tensor], Tensor]) -> object:
    """The groups of the structure in a saved learner, changed."""
    if isinstance(saved, dict):
        groups = saved.get("groups")
        if isinstance(groups, list):
            return {**saved, "groups": [change(group) for group in groups]}
        return {name: _changed(value, change) for name, value in saved.items()}
    return saved


STRUCTURE_CHECKS = {
    each.__name__: each
    for each in (
        rows_of_states,
        layers_of_rows,
        weights_of_several_rows,
        resets_of_rows,
        rows_that_open,
        single_steps_that_open,
        weights_that_reach_other_rows,
        outputs_above_that_reach_other_rows,
        saved_structures,
    )
}
