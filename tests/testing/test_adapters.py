"""Learners on arrays of NumPy and JAX pass the checks, or fail them with the mistake, as learners in PyTorch do."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from array_learners import TanhUnits, functions
from helpers.toy_cells import seeded

from rtrl.errors import ConfigError
from rtrl.testing import LearnerSpec, Report, Stream, check_learner
from rtrl.testing.adapters import jax_learner, numpy_learner
from rtrl.testing.streams import normal

STREAM = Stream(seeded(TanhUnits(), 0), normal(1, 7, 2, 2), name="tanh units")
CHECKS = ["interface", "own streams", "resets", "changed parameters", "several losses per step", "no loss"]


def checked(spec: LearnerSpec, *checks: str) -> Report:
    return check_learner(spec, checks=checks or CHECKS, on_fail="return")


def numpy_spec(**changed: Any) -> LearnerSpec:
    return numpy_learner(**{**functions(np), "streams": [STREAM], **changed})


def test_a_learner_in_numpy_passes() -> None:
    report = checked(numpy_spec(name="mine", constant_memory=True), *CHECKS, "cell unchanged", "early syncs")
    assert report.passed, str(report)
    assert set(CHECKS) < set(report.checks)
    assert report.name == "mine"


def test_a_wrong_learner_in_numpy_is_refused_with_its_values_per_parameter() -> None:
    report = checked(numpy_learner(**functions(np, before=True), streams=[STREAM]), "own streams")
    (failure,) = report.failures
    assert failure.step == 0
    assert [p.name for p in failure.parameters if p.step is None] == ["readout"]
    assert report.name == "learner of step"


def test_without_reset_there_is_no_reset() -> None:
    report = checked(numpy_spec(reset=None), "resets")
    assert "no reset" in report.skipped["resets"]


def _not_a_pair(*args: Any) -> Any:
    return 3


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"step": _not_a_pair}, r"step\(params, state, x\) must return \(state, y\), got int"),
    ({"gradients": _not_a_pair}, r"gradients\(params, state\) must return \(gradients, state\), got int"),
    ({"gradients": lambda params, state: ({"W": np.ones(3)}, state)}, "there is a gradient of W; the cell has recur"),
    ({"gradients": lambda params, state: ({"readout": np.ones(3)}, state)}, r"must be \(2, 3\), got \(3,\)"),
]


@pytest.mark.parametrize(("changed", "message"), BROKEN)
def test_what_functions_return_is_checked(changed: dict[str, Any], message: str) -> None:
    report = checked(numpy_spec(**changed), "own streams")
    assert len(report.failures) == 1
    with pytest.raises(AssertionError, match=message):
        report.raise_for_failures()


def test_gradients_that_are_not_delivered_are_zero() -> None:
    def some(params: Any, state: Any) -> Any:
        return {"recurrent": state["grads"]["recurrent"]}, state

    (failure,) = checked(numpy_spec(gradients=some), "own streams").failures
    assert [p.name for p in failure.parameters if p.step is None] == ["recurrent"]


@pytest.mark.parametrize("what", ["init", "step", "backward", "gradients", "reset", "parameters"])
def test_arguments_must_be_functions(what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what} must be a function, got int"):
        numpy_spec(**{what: 3})


def test_a_learner_in_jax_passes_and_a_wrong_one_fails() -> None:
    jax = pytest.importorskip("jax")
    setting = jax.config.jax_enable_x64
    stream = replace(STREAM.prefix(3).alone(0), resets=torch.tensor([[False], [False], [True]]))
    for before in (False, True):
        parts = functions(jax.numpy, before=before)
        for name in ("step", "backward", "gradients", "reset"):
            parts[name] = jax.jit(parts[name])
        report = checked(jax_learner(**parts, streams=[stream]), "own streams")
        assert report.passed != before, str(report)
        assert report.name == "learner of step"
    assert [p.name for p in report.failures[0].parameters if p.step is None] == ["readout"]
    assert jax.config.jax_enable_x64 == setting


def test_without_jax_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    assert numpy_learner(**functions(np)).name == "learner of step"
    with pytest.raises(ConfigError, match=r"needs JAX .*pip install 'rtrl\[jax\]'"):
        jax_learner(**functions(np))
