"""Checks of complex numbers, and of learners that keep a part of the influence."""

from functools import partial

import torch
from helpers.complex_cells import ComplexCell, complex_loss
from helpers.running import run
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal
from torch import Tensor

import oracles
import rtrl
from rtrl.learners import DenseRTRL
from rtrl.testing import check_learner
from rtrl.testing.own_specs import BASELINES


def complex_numbers() -> None:
    """Gradients by real and imaginary parts, of losses of real and complex outputs."""
    cell, xs = ComplexCell(learned=True), normal(5, 4, 2, 2)
    expected = _in_pairs(oracles.bptt(cell, xs, complex_loss))
    for make in (partial(rtrl.BlockRTRL, block=2), DenseRTRL):
        found = run(cell, xs, complex_loss, influences=False, make=make)
        assert_gradients_equal(_in_pairs(found.gradients), expected)


def influence_of_layers() -> None:
    """A learner within layers obeys its law."""
    (spec,) = (spec for spec in BASELINES if spec.name == "LayerLocal")
    assert check_learner(spec, checks=["own streams"]).passed


def _in_pairs(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.view_as_real(g) if g.is_complex() else g for name, g in gradients.items()}


COMPLEX_CHECKS = {check.__name__: check for check in (complex_numbers, influence_of_layers)}
