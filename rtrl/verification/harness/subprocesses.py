"""Measure the memory of a whole process, in a new interpreter that does nothing else.

``python -m rtrl.verification.harness.subprocesses NAME '{"seed": 0, …}' BREAK …`` runs one of ``RUNS`` with these
arguments, the breaks planted, and writes what it returns as JSON.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rtrl
from rtrl.verification.breaks import active, planted
from rtrl.verification.harness.memory import use_all_slices
from rtrl.verification.harness.problems import CONFIGS, LearnerRun, Mixture, problem


def rss_bytes() -> int | None:
    """Return the resident memory of this process; None where the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def physical_bytes() -> int | None:
    """Return the memory of this machine; None where the system does not report it."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bptt(configs: Sequence[str], checkpoints: Sequence[int], seed: int) -> dict[str, list[int | None]]:
    """Return the process's resident memory after some numbers of steps of each configuration, by name. The graph is
    held and never traversed.

    The graph of one configuration is kept when the next begins, so that none lies in memory that another has freed.
    """
    found: dict[str, list[int | None]] = {}
    graphs = []
    for name in configs:
        stream = problem(CONFIGS[name], 64, seed)
        h = stream.cell.init_state(1)
        total = torch.zeros(())
        found[name] = []
        for t in range(max(checkpoints)):
            y, h, _ = stream.cell(stream.xs[t % len(stream.xs)], h)
            total = total + stream.loss(t, y)
            if t + 1 in checkpoints:
                found[name].append(rss_bytes())
        graphs.append(total)
    return found


def online(
    mixture: Mapping[str, Any], checkpoints: Sequence[int], block: int, window: int, seed: int
) -> dict[str, list[int | None]]:
    """Run ``BlockRTRL`` over a long stream; gradients are delivered after every eight blocks and thrown away.

    Returns:
        At each checkpoint "held_bytes" by ``retained_bytes``, and "rss_bytes" of the process.
    """
    run = LearnerRun(problem(Mixture(**mixture), 256, seed), block=block, window=window)
    use_all_slices(run)
    found: dict[str, list[int | None]] = {"held_bytes": [], "rss_bytes": []}
    for checkpoint in checkpoints:
        while run.t < checkpoint:
            run.advance(min(8 * block, checkpoint - run.t))
            run.sync()
            run.cell.zero_grad()
        gc.collect()
        found["held_bytes"].append(run.held_bytes())
        found["rss_bytes"].append(rss_bytes())
    return found


def gru(hidden: int, checkpoints: Sequence[int], block: int, seed: int) -> dict[str, list[int | None]]:
    """Run ``BlockRTRL`` on a GRU over a long stream, whole blocks as sequences; gradients are thrown away.

    Returns:
        As ``online`` does.
    """
    torch.manual_seed(seed)
    cell = rtrl.cells.from_torch(torch.nn.GRUCell(hidden, hidden))
    learner = rtrl.BlockRTRL(cell, 1, block=block, audit="off")
    xs = torch.randn(block, 1, hidden)
    found: dict[str, list[int | None]] = {"held_bytes": [], "rss_bytes": []}
    for checkpoint in checkpoints:
        while learner.steps_taken < checkpoint:
            ys = learner.unroll(xs[: min(learner.room, checkpoint - learner.steps_taken)])
            learner.backward((ys - xs[: len(ys)].flip(2)).square().sum())
            if learner.steps_taken % (8 * block) == 0:
                learner.sync()
                cell.zero_grad()
        learner.sync()
        cell.zero_grad()
        gc.collect()
        found["held_bytes"].append(sum(learner.retained_bytes().values()))
        found["rss_bytes"].append(rss_bytes())
    return found


RUNS: dict[str, Callable[..., dict[str, list[int | None]]]] = {"bptt": bptt, "online": online, "gru": gru}


def launch(name: str, **arguments: Any) -> dict[str, list[int | None]]:
    """Call one of ``RUNS`` in a new interpreter with one thread, with the breaks that are planted here.

    Raises:
        RuntimeError: the process failed; the message ends with its last output.
    """
    root = str(Path(rtrl.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "rtrl.verification.harness.subprocesses", name, json.dumps(arguments), *active()],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process {name!r} ended with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, list[int | None]] = json.loads(done.stdout)
    return found


def bptt_growth(configs: Sequence[str], checkpoints: tuple[int, int], seed: int) -> dict[str, float | None]:
    """Return the bytes per step by which a new process grows between two checkpoints; None where the system does not
    report them."""
    found = launch("bptt", configs=list(configs), checkpoints=list(checkpoints), seed=seed)
    first, last = checkpoints
    return {name: None if a is None or b is None else (b - a) / (last - first) for name, (a, b) in found.items()}


def online_bytes(
    mixture: Mixture, checkpoints: Sequence[int], block: int, window: int, seed: int
) -> dict[str, list[int | None]]:
    """Call ``online`` in a new process."""
    sizes = {"checkpoints": list(checkpoints), "block": block, "window": window, "seed": seed}
    return launch("online", mixture=asdict(mixture), **sizes)


def gru_bytes(hidden: int, checkpoints: Sequence[int], block: int, seed: int) -> dict[str, list[int | None]]:
    """Call ``gru`` in a new process."""
    return launch("gru", hidden=hidden, checkpoints=list(checkpoints), block=block, seed=seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with planted(*sys.argv[3:]):
        found = RUNS[sys.argv[1]](**json.loads(sys.argv[2]))
    sys.stdout.write(json.dumps(found))
