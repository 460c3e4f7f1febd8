"""Every claim is measured in its small form, alone and with a fault that must change its verdict."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from rtrl.report import plain
from rtrl.report.model import ClaimResult
from rtrl.verification import breaks, matrix, record, registry, runner
from rtrl.verification.claim import Claim, Settings

SMALL = Settings(small=True)
UNNOTICED = {"frozen-router", "slow"}  # no verdict depends on how a router learns, or on milliseconds of a small form
ELSEWHERE = {"gradient-equivalence"}  # test_gradient_equivalence.py, which computes its references once
LONG = {"anbn-speed", "haystack-speed", "memory-table", "long-stream", "per-step", "equal-memory"}
"""They take several seconds each: nightly."""
CLAIMS = [
    pytest.param(claim, marks=pytest.mark.nightly if claim.id in LONG else (), id=claim.id)
    for claim in registry.claims()
    if claim.id not in ELSEWHERE
]


def alone(claim: Claim[Any, Any]) -> ClaimResult:
    """What a claim comes to without a break; all that is shown of it is whole."""
    (outcome,) = runner.measure([claim], SMALL)
    found = record.entry(outcome)
    assert found.failures == []
    assert found.result and found.threshold
    assert found.verdict == "holds" or found.condition
    assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
    json.dumps(plain(asdict(found)), allow_nan=False)
    return found


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_notices_the_first_of_its_breaks(claim: Claim[Any, Any]) -> None:
    found = alone(claim)
    for name in matrix.missing(found, claim.noticed_breaks[:1]):
        assert matrix.attempt(claim, found, name, SMALL).noticed


@pytest.mark.nightly
@pytest.mark.parametrize("claim", registry.claims(), ids=lambda claim: claim.id)
def test_a_claim_notices_all_of_its_breaks(claim: Claim[Any, Any]) -> None:
    found = alone(claim)
    for name in matrix.missing(found, claim.noticed_breaks):
        assert matrix.attempt(claim, found, name, SMALL).noticed, name


@pytest.mark.parametrize("claim", registry.claims(), ids=lambda claim: claim.id)
def test_every_claim_names_breaks_or_says_why_none_can_change_it(claim: Claim[Any, Any]) -> None:
    assert bool(claim.noticed_breaks) != bool(claim.no_break)
    assert set(claim.noticed_breaks) <= set(breaks.BREAKS)


def test_every_other_break_is_named_by_a_claim() -> None:
    named = {name for claim in registry.claims() for name in claim.noticed_breaks}
    assert set(breaks.BREAKS) - named == UNNOTICED
