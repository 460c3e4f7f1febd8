"""A small results file with one of everything that a report shows."""

import copy
import json
from pathlib import Path
from typing import Any

NASTY = "<script>alert(1)</script> & \"quotes\" 'n' | pipes | $x$ _a_ [l](http://e.x/) {{ 7 * 7 }} `c` \x00\x1b[31m"

MEMORY = {
    "title": "Memory against T",
    "x_label": "T, steps",
    "y_label": "held, bytes",
    "kind": "line",
    "log_x": True,
    "log_y": True,
    "series": [
        {"name": "rtrl", "x": [10, 100, 1000], "y": [5e5, 5.1e5, 5e5], "dashed": False},
        {"name": "_BPTT", "x": [10, 100, 1000], "y": [0, 1e5, None], "dashed": False},
        {"name": "T·B", "x": [10, 1000], "y": [1e4, 1e6], "dashed": True},
    ],
}
RASTER = {
    "title": "Experts and slots over time",
    "x_label": "step",
    "y_label": "expert or slot",
    "kind": "raster",
    "log_x": False,
    "log_y": False,
    "series": [
        {"name": "experts", "x": [0, 1, 2, 5, 6, 6], "y": [1, 1, 1, 0, 0, 3], "dashed": False},
        {"name": "slots", "x": [0, 3], "y": [1, 2], "dashed": False},
    ],
}
CURVE = {
    "title": "Learning",
    "x_label": "step",
    "y_label": "loss, bits a byte",
    "series": [
        {"name": f"seed {i}", "x": list(range(300)), "y": [8 / (1 + t) + i for t in range(300)]} for i in range(7)
    ],
}


def claim(name: str, verdict: str = "holds", **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "claimed": f"what {name} claims",
        "result": f"3.1 × of {name}",
        "threshold": "≥ 2.72 ×",
        "verdict": verdict,
        "condition": "",
        "failures": [],
        "duration_s": 1.5,
        "tables": [],
        "plots": [],
        "data": {"free": [1, {"form": None}]},
        **changes,
    }


def sample() -> dict[str, Any]:
    """A whole record, new at every call."""
    grid = {
        "title": "Costs",
        "columns": ["side", "H", "multiply-adds", "exact"],
        "rows": [["rtrl", 16, 131072, True], ["dense", 16, 1.5e9, None]],
    }
    long_grid = {"title": "Every row", "columns": ["n", "n²"], "rows": [[n, n * n] for n in range(40)]}
    whole = {
        "schema": 2,
        "created": "2026-01-31T12:00:00+00:00",
        "command": "rtrl verify --json results.json",
        "mode": "quick",
        "seed": 0,
        "machine": {"cpu": "A processor", "cores": 2, "threads": 1, "memory_bytes": 2**34, "os": "Linux", "gpu": None},
        "versions": {"rtrl": "0.1.0", "torch": "2.13.0", "commit": None},
        "duration_s": 75.0,
        "code": "0123456789abcdef",
        "claims": [
            claim(
                "memory",
                tables=[grid, long_grid],
                plots=[MEMORY],
                explanation="Claim: memory **stays** as *it is*.\n\n    S = J S + B\n\n"
                "Bytes of ``rtrl.BlockRTRL`` (:func:`sync`).\n\n- one\n- two\n\n**What it leaves open.** The bytes\nof "
                "``optimizers``.\n\n**More.** Of it.",
                question="memory",
                headline="It holds 500 kB at every T",
                model="GRU, P = 3.2 k, H = 32, T = 1000, seeds 0–2",
                tried=["leak", "truncate"],
                noticed=["leak"],
            ),
            claim("depends", "holds when", condition="B ≤ 4; from H = 64 on", plots=[RASTER, CURVE], question="memory"),
            claim(
                "slow_thing",
                "does not hold",
                condition="it is slower",
                failures=["gradients differ at step 3"],
                question="clock",
                tried=["leak"],
                kept=True,
                measured="2026-01-30T11:00:00+00:00",
            ),
            claim("absent", "not measured", result="", condition="no device", no_break="nothing is measured"),
        ],
    }
    return copy.deepcopy(whole)


def nasty() -> dict[str, Any]:
    """The record with every text in it replaced by one that means something to HTML, Markdown, SVG and matplotlib."""

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: spoil(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [spoil(item, key) for item in value]
        kept = key in ("id", "verdict", "kind", "created", "question", "measured")
        return NASTY if isinstance(value, str) and not kept else value

    return spoil(sample())  # type: ignore[no-any-return]


def written(path: Path, record: Any) -> Path:
    path.write_text(json.dumps(record), encoding="utf-8")
    return path
