"""Runs of ``rtrl train`` that are killed at random moments, resumed, and compared with runs that were not.

As a program, the long form: ``python tests/reliability/kills.py --kills 300``.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from reliability.damage import content_of, essence, written

from rtrl.cli.app import app

COMMON = ["--batch-size", "2", "--log-every", "3", "--evaluate", "0", "--save-every", "2"]
RUNS = {
    "dense": ["anbn", "--cell", "gru", "-C", "hidden=3", "-L", "block=4"],
    "mixture": ["anbn", "-C", "d_model=4", "-C", "n_slots=3", "-C", "n_experts=4", "-C", "topk=1", "-L", "window=3"],
    "uoro": ["copy", "--cell", "rnn", "-C", "hidden=3", "--learner", "uoro"],
}
CODES = {0, 129, 130, 143, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT, -signal.SIGKILL}


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: of processes, by the name of the last signal.
        in_writes: how many of them left a file half written.
        runs: how many runs were taken to their end, and were equal to one that was not killed.
    """

    kills: Counter[str] = field(default_factory=Counter)
    in_writes: int = 0
    runs: int = 0

    def __str__(self) -> str:
        kills = f"{sum(self.kills.values())} kills {dict(self.kills)}, {self.in_writes} inside a write"
        return f"{kills}; {self.runs} runs equal"


def begin(arguments: list[str], folder: Path) -> int:
    """Begin ``rtrl train`` in a process of its own, forked from this one, which has imported everything; its number."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        app(["train", *arguments], standalone_mode=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 71
    except KeyboardInterrupt:  # beside the command
        code = 130
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def result(folder: Path) -> tuple[str, list[Any]]:
    """What a run left: its last checkpoint, and its rows without the speeds."""
    lines = (folder / "run.jsonl").read_text().splitlines()[1:]
    rows = [{name: value for name, value in json.loads(line).items() if name != "steps_per_s"} for line in lines]
    return essence(content_of((folder / "run.pt").read_bytes())), rows


def killed_run(arguments: list[str], folder: Path, span: float, draws: random.Random, tally: Tally, most: int) -> None:
    """Take a run to its end, through kills at random moments."""
    path = folder / "run.pt"
    start = [*arguments, "--checkpoint", "run.pt", "--overwrite"]
    while True:
        number = begin(["--resume", "run.pt"] if path.exists() else start, folder)
        if sum(tally.kills.values()) < most:
            time.sleep(draws.uniform(0.0, span))
            chosen = draws.choice([signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
            for _ in range(1 if chosen == signal.SIGKILL else draws.choice([1, 2])):
                os.kill(number, chosen)  # until it is waited for, the number is that of the process
                time.sleep(draws.uniform(0.0, 0.01))
            code = ended(number)
            if code == 0:
                break
            tally.kills[chosen.name] += 1
            tally.in_writes += any(folder.glob(".*half*"))
        else:
            code = ended(number)
            if code == 0:
                break
        output = folder / "output.txt"
        said = output.read_text() if output.exists() else ""
        if code == 2 and "steps already" in said:  # it was killed between its last save and its end
            break
        assert code in CODES and "Traceback" not in said, f"exit code {code}: {said[-2000:]}"
        previous = folder / "run.pt.previous"
        for each in (path, previous):
            assert not each.exists() or content_of(each.read_bytes())
    left = sorted(each.name for each in folder.iterdir() if each.name != "output.txt")
    assert left in (["run.jsonl", "run.pt", "run.pt.previous"], ["run.jsonl", "run.pt"]), left


def kill(count: int, seed: int = 0, steps: int = 24, names: tuple[str, ...] = tuple(RUNS)) -> Tally:
    """Kill runs until so many processes have been killed; every run must end as the one that was not killed did."""
    tally, draws = Tally(), random.Random(seed)
    torch.set_num_threads(1)
    written("dense")  # what PyTorch imports at first use is then there in every process
    with tempfile.TemporaryDirectory() as root:
        straight = {}
        for name in names:
            arguments, folder = [*RUNS[name], *COMMON, "--steps", str(steps)], Path(root, name)
            folder.mkdir()
            started = time.perf_counter()
            assert ended(begin([*arguments, "--checkpoint", "run.pt"], folder)) == 0, (
                folder / "output.txt"
            ).read_text()
            straight[name] = arguments, result(folder), time.perf_counter() - started
        while sum(tally.kills.values()) < count:
            name = names[tally.runs % len(names)]
            arguments, expected, took = straight[name]
            with tempfile.TemporaryDirectory(dir=root) as folder:
                killed_run(arguments, Path(folder), took, draws, tally, count)
                found = result(Path(folder))
                assert found == expected, f"run {tally.runs} ({name}) differs after kills"
            tally.runs += 1
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    started = time.perf_counter()
    print(kill(chosen.kills, chosen.seed), f"in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
