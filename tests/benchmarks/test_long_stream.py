"""A stream without end: what the learner holds, and what the process holds, do not grow.

The memory of the process is taken in a process of its own, which has run nothing else before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stream
from agreement import check_agreement
from bars import LONG_STREAM_STEPS
from measuring import Measurement, curve
from problems import dense
from rivals import Ours

HERE = Path(__file__).parent


def in_a_fresh_process(kind: str, steps: int) -> dict[str, list[Any]]:
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, str(HERE / "stream.py"), kind, str(steps)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.long)], ids=["short", "long"])
def test_a_long_stream(measurement: Measurement, benchmark: Any, long: bool) -> None:
    check_agreement("gru")
    steps = LONG_STREAM_STEPS if long else measurement.sizes.stream_steps
    alone = measurement.clock or long
    run = in_a_fresh_process if alone else stream.measure
    ours, control = run("ours", steps), run("bptt", min(steps, 20_000))
    measured = {
        "stream.bytes": ours["held_bytes"][-1] / ours["held_bytes"][0],
        "stream.bytes.control": control["held_bytes"][-1] / control["held_bytes"][0],
    }
    series = []
    if alone and None not in ours["rss_bytes"]:
        measured["stream.rss"] = max(ours["rss_bytes"]) / ours["rss_bytes"][0]
        measured["stream.rss.control"] = max(control["rss_bytes"]) / control["rss_bytes"][0]
        resident = {"ours": ours["rss_bytes"]}
        if control["steps"] == ours["steps"]:
            resident["BPTT"] = control["rss_bytes"]
        series = [curve("GRU, H = 16: the process", "steps", ours["steps"], "bytes resident", resident)]
    problem = dense("gru", stream.HIDDEN)
    benchmark.pedantic(Ours(problem, block=stream.BLOCK).advance, args=(stream.BLOCK,), rounds=3)
    measurement.settle(measured, *series, steps=ours["steps"][-1], **{"bytes held": ours["held_bytes"][-1]})
