"""What a process takes as a whole, and a process that does nothing but what is to be measured."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rtrl


def rss_bytes() -> int | None:
    """The resident memory of this process; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def launch(module: str, told: Mapping[str, Any]) -> Any:
    """What ``python -m module '{...}'`` writes as JSON, in a new interpreter with one thread.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    home = str(Path(rtrl.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(told)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process of its own ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout)
