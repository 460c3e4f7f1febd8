"""Checks for what users bring: a recurrent cell, which must keep the contract that exact online gradients rest on, and
a learner, which must deliver the gradients that it promises."""

from rtrl.testing.alignment import Alignment, Alignments, alignment
from rtrl.testing.cell_checks.core import cell_checks
from rtrl.testing.check_aggregator import check_aggregator
from rtrl.testing.check_cell import check_cell
from rtrl.testing.check_learner import check_learner
from rtrl.testing.check_monoid import check_monoid
from rtrl.testing.compare import (
    Difference,
    NotComparable,
    assert_gradients_equal,
    assert_influences_equal,
    worst_difference,
)
from rtrl.testing.driver import Driver
from rtrl.testing.laws import Exact, ExactWithin, Law, Truncated, Unbiased
from rtrl.testing.learner_checks.listing import learner_checks
from rtrl.testing.pytest_nodes import BoundCheck, bound_checks, parametrize_with_checks
from rtrl.testing.recursion_laws import LocalToLayers, Masked, Recursion, RecursionStep
from rtrl.testing.report import CheckFailed, Failure, ParameterVerdict, Report
from rtrl.testing.spec import CellSpec, ErrorInput, LearnerSpec
from rtrl.testing.streams import Stream
from rtrl.testing.streams_for import streams_for

__all__ = [
    "Alignment",
    "Alignments",
    "BoundCheck",
    "CellSpec",
    "CheckFailed",
    "Difference",
    "Driver",
    "ErrorInput",
    "Exact",
    "ExactWithin",
    "Failure",
    "Law",
    "LearnerSpec",
    "LocalToLayers",
    "Masked",
    "NotComparable",
    "ParameterVerdict",
    "Recursion",
    "RecursionStep",
    "Report",
    "Stream",
    "Truncated",
    "Unbiased",
    "alignment",
    "assert_gradients_equal",
    "assert_influences_equal",
    "bound_checks",
    "cell_checks",
    "check_aggregator",
    "check_cell",
    "check_learner",
    "check_monoid",
    "learner_checks",
    "parametrize_with_checks",
    "streams_for",
    "worst_difference",
]
