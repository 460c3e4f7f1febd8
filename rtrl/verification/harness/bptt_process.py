"""How fast a process grows over backpropagation through time, as a line of JSON.

``python -m rtrl.verification.harness.bptt_process '{"configs": ["quick"], "moments": [100, 400], "seed": 0}'``
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rtrl.verification.harness.problems import CONFIGS, problem
from rtrl.verification.harness.subprocesses import launch, rss_bytes


def run(configs: Sequence[str], moments: Sequence[int], seed: int) -> dict[str, list[int | None]]:
    """The process's resident memory after so many steps of each configuration, by name, the graph held and no step
    gone back.

    The graph of one configuration is kept when the next begins, so that none lives in memory that another left.
    """
    found: dict[str, list[int | None]] = {}
    graphs = []
    for name in configs:
        stream = problem(CONFIGS[name], 64, seed)
        h = stream.cell.init_state(1)  # type: ignore[operator]
        total = torch.zeros(())
        found[name] = []
        for t in range(max(moments)):
            y, h, _ = stream.cell(stream.xs[t % len(stream.xs)], h)
            total = total + stream.loss(t, y)
            if t + 1 in moments:
                found[name].append(rss_bytes())
        graphs.append(total)
    return found


def growth(configs: Sequence[str], moments: tuple[int, int], seed: int) -> dict[str, float | None]:
    """Bytes a step by which a new process grows between two moments; None where the system does not tell."""
    found = launch(__name__, {"configs": list(configs), "moments": list(moments), "seed": seed})
    first, last = moments
    return {name: None if None in sizes else (sizes[1] - sizes[0]) / (last - first) for name, sizes in found.items()}


def main(text: str) -> None:
    """Run what the JSON says and write what was found."""
    told: dict[str, Any] = json.loads(text)
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(run(**told)))


if __name__ == "__main__":
    main(sys.argv[1])
