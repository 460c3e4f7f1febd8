"""A short form of ``soak.py``, which runs for hours in ``tox -e soak``."""

import warnings

from reliability import soak


def test_a_short_stream_in_which_everything_happens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = soak.run(2000, cells=("rows", "one step"))
    assert found["steps"] >= 2000 and found["worst_error"] <= 1e-10
    assert found["faults"] > 20 and found["saves"] > 2
    held = [row["bytes_held"] for row in found["rows"]]
    assert max(held[2:]) <= 1.2 * max(held[:2])
