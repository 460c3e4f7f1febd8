"""Every learner of the package against every check of a learner, by the law that its spec declares."""

from collections.abc import Callable

import third_party

import rtrl
from rtrl.testing import LearnerSpec, bound_checks, cell_checks, learner_checks, parametrize_with_checks
from rtrl.testing.own_specs import ALL, BASELINES, BLOCK_RTRL

OTHERS = [
    LearnerSpec(third_party.textbook, name="somebody's textbook RTRL"),
    LearnerSpec(gradients=third_party.backpropagation, name="somebody's function of the whole stream"),
]


@parametrize_with_checks([*ALL, *OTHERS])
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_every_learner_of_the_package_has_a_spec() -> None:
    names = {spec.name for spec in BASELINES}
    for learner in rtrl.learners.__all__:
        assert any(name.startswith(learner) for name in names), learner
    assert len(BLOCK_RTRL) >= 4


def test_no_spec_expects_a_failure_and_every_check_is_judged_somewhere() -> None:
    assert not any(spec.expected_failures for spec in ALL)
    assert {check.name for check in bound_checks(ALL)} == {*learner_checks(), *cell_checks()}
