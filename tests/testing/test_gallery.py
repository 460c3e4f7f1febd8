"""The gallery names checks that exist, and every kind of bug that was seen in other people's code."""

import re
from pathlib import Path

from rtrl.testing import learner_checks

PAGE = (Path(__file__).parents[2] / "docs" / "results" / "gallery.md").read_text(encoding="utf-8")


def test_the_gallery_has_all_28_kinds_and_names_checks_that_exist() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 29))
    named = {name for _, caught in rows for name in re.findall(r"`([^`]+)`", caught)}
    assert named <= {*learner_checks(), "check_cell", "check_aggregator"}
    assert len(named) >= 12
