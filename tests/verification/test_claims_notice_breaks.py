"""Every claim is measured in its small form, alone and with a fault that must change its verdict."""

from typing import Any

import pytest

from rtrl.verification import breaks, matrix, record, registry, runner
from rtrl.verification.claim import Claim, Settings

SMALL = Settings(small=True)
ELSEWHERE = {"gradient-equivalence"}  # test_gradient_equivalence.py, which computes its references once
CLAIMS = [claim for claim in registry.claims() if claim.noticed_breaks and claim.id not in ELSEWHERE]


def alone(claim: Claim[Any, Any]) -> Any:
    (outcome,) = runner.measure([claim], SMALL)
    found = record.entry(outcome)
    assert found.failures == []
    for table in found.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows), table.title
    for plot in found.plots:
        assert all(len(series.x) == len(series.y) > 0 for series in plot.series), plot.title
    return found


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_notices_the_first_of_its_breaks(claim: Claim[Any, Any]) -> None:
    found = alone(claim)
    for name in claim.noticed_breaks[:1] if found.verdict != "not measured" else ():
        assert matrix.attempt(claim, found, name, SMALL).noticed


@pytest.mark.nightly
@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.noticed_breaks[1:]], ids=lambda claim: claim.id)
def test_a_claim_notices_all_of_its_breaks(claim: Claim[Any, Any]) -> None:
    found = alone(claim)
    for name in claim.noticed_breaks[1:] if found.verdict != "not measured" else ():
        assert matrix.attempt(claim, found, name, SMALL).noticed, name


@pytest.mark.xfail(strict=False, reason="some claims do not name theirs yet")
@pytest.mark.parametrize("claim", registry.claims(), ids=lambda claim: claim.id)
def test_every_claim_names_breaks_or_says_why_none_can_change_it(claim: Claim[Any, Any]) -> None:
    assert bool(claim.noticed_breaks) != bool(claim.no_break)
    assert set(claim.noticed_breaks) <= set(breaks.BREAKS)


@pytest.mark.xfail(strict=False, reason="some claims do not name theirs yet")
def test_every_break_must_change_a_claim() -> None:
    named = {name for claim in registry.claims() for name in claim.noticed_breaks}
    assert set(breaks.BREAKS) - named == set()
