"""A long stream in a process of its own, which does nothing else: what is held at some moments, as a line of JSON.

``python -m rtrl.verification.harness.long_run``
``'{"mixture": {...}, "moments": [100, 1000], "block": 4, "window": 8, "seed": 0}'``
"""

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from rtrl.verification.harness.memory import wake_all
from rtrl.verification.harness.problems import Mixture, Run, problem
from rtrl.verification.harness.subprocesses import launch, rss_bytes


def run(mixture: Mixture, moments: Sequence[int], block: int, window: int, seed: int) -> dict[str, list[int | None]]:
    """Take steps, the gradients delivered after every eight blocks and thrown away; note what is held at the moments.

    Returns:
        "held_bytes" by ``retained_bytes`` and "rss_bytes" of the process, one for each moment.
    """
    side = Run(problem(mixture, 256, seed), block=block, window=window)
    wake_all(side)
    found: dict[str, list[int | None]] = {"held_bytes": [], "rss_bytes": []}
    for moment in moments:
        while side.t < moment:
            side.advance(min(8 * block, moment - side.t))
            side.deliver()
            side.own.zero_grad()
        gc.collect()
        found["held_bytes"].append(side.held_bytes())
        found["rss_bytes"].append(rss_bytes())
    return found


def in_a_fresh_process(
    mixture: Mixture, moments: Sequence[int], block: int, window: int, seed: int
) -> dict[str, list[int | None]]:
    """The same in a new interpreter, with one thread."""
    told = {"mixture": asdict(mixture), "moments": list(moments), "block": block, "window": window, "seed": seed}
    found: dict[str, list[int | None]] = launch(__name__, told)
    return found


def main(text: str) -> None:
    """Run what the JSON says and write what was found."""
    told: dict[str, Any] = json.loads(text)
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(run(**{**told, "mixture": Mixture(**told["mixture"])})))


if __name__ == "__main__":
    main(sys.argv[1])
