"""Every learner of the package against every check of a learner, by the law that its spec declares.

The gate runs all checks on one learner per law, and on the others those in which they differ from it; the rest of the
matrix is nightly. All checks of a BlockRTRL are in the gate by ``tests/bugs``, which needs each of them to pass.
"""

from collections.abc import Callable
from typing import Any

import pytest
import third_party

import rtrl
from rtrl.testing import LearnerSpec, bound_checks, cell_checks, check_learner, learner_checks
from rtrl.testing.own_specs import ALL, BASELINES, BLOCK_RTRL

OTHERS = [
    LearnerSpec(third_party.textbook, name="somebody's textbook RTRL"),
    LearnerSpec(gradients=third_party.backpropagation, name="somebody's function of the whole stream"),
]

DIFFERENT_BLOCKS = {
    "sparse rows",
    "dormant slices",
    "long dormancy",
    "long stream",
    "resets at block borders",
    "drawn mixtures",
    "save and load",
    "constant memory",
}
"""Checks whose outcome may depend on the block, the window and on being lazy."""

STATEFUL = {
    "interface",
    "dense cell",
    "unusual parameters",
    "long stream",
    "drawn mixtures",
    "save and load",
    "cell unchanged",
    "constant memory",
    "error inputs",
}
"""Checks of what a learner keeps, which each class of learners keeps in its own way."""

OWN = {"own streams", "influence", "drawn mixtures"}
"""Checks of a learner that differs from another one, which is checked in full, in a number only."""

IN_THE_GATE = {
    "BlockRTRL(block=1, window=3)": DIFFERENT_BLOCKS - {"constant memory"},
    "BlockRTRL(block=4, window=2)": DIFFERENT_BLOCKS,
    "BlockRTRL(block=64)": DIFFERENT_BLOCKS - {"constant memory", "long dormancy"},
    "BlockRTRL(block=3, lazy=False)": DIFFERENT_BLOCKS - {"constant memory", "long dormancy"},
    "BPTT": STATEFUL,
    "TBPTT(3), sliding": STATEFUL | {"sparse rows", "changed parameters", "resets", "resets at block borders"},
    "TBPTT(3), in chunks": STATEFUL - {"constant memory"} | {"losses at some steps", "resets"},
    "DenseRTRL": STATEFUL - {"constant memory"} | {"shared parameters", "partly trained", "layers", "sparse rows"},
    "SnAp-2": OWN,
    "SnAp-3 within 3 steps": {"dense cell", "sparse rows", "influence"},
    "SnAp-4 of 4 units": OWN,
    "UORO": STATEFUL - {"unusual parameters", "long stream"} | {"resets of several samples", "float32"},
    "DiagonalRTRL": OWN | {"save and load", "error inputs"},
    "LayerLocal": OWN | {"save and load", "error inputs", "changed parameters"},
    "somebody's textbook RTRL": {"interface", "dense cell", "sparse rows", "losses over two steps"},
}
"""Name of a spec → the checks that the gate runs; all of them for a spec that is not named."""


def cases() -> list[Any]:
    """One test per check of a spec."""
    found = []
    for check in bound_checks([*ALL, *OTHERS]):
        chosen = IN_THE_GATE.get(check.spec.name)
        nightly = chosen is not None and check.name not in chosen
        found.append(pytest.param(check, id=check.id, marks=[pytest.mark.nightly] if nightly else []))
    return found


@pytest.mark.parametrize("check", cases())
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("spec", [*BLOCK_RTRL, *BASELINES], ids=lambda spec: spec.name)
def test_drawn_mixtures_of_other_seeds(spec: LearnerSpec, seed: int) -> None:
    check_learner(spec, checks=["drawn mixtures"], seed=seed)


def test_every_learner_of_the_package_has_a_spec() -> None:
    names = {spec.name for spec in BASELINES}
    for learner in rtrl.learners.__all__:
        if learner not in ("Learner", "BlockRTRL", "Audits", "audits_in_this_process"):
            assert any(name.startswith(learner) for name in names), learner
    assert len(BLOCK_RTRL) >= 4


def test_no_spec_expects_a_failure_and_every_check_is_judged_somewhere() -> None:
    assert not any(spec.expected_failures for spec in ALL)
    assert {check.name for check in bound_checks(ALL)} == {*learner_checks(), *cell_checks()}


def test_the_gate_names_specs_and_checks_that_exist_and_runs_every_check() -> None:
    specs = {spec.name: spec for spec in [*ALL, *OTHERS]}
    for name, chosen in IN_THE_GATE.items():
        assert name in specs
        assert chosen <= set(learner_checks()), name
