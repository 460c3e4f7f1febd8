"""A long stream in which everything happens: python tests/reliability/soak.py --steps 1000000 --json soak.json

Learners of small cells take steps with random losses, restarts, sleeps, deliveries, saves, restarts of the process as
a copy from what was saved, and faults: Ctrl-C at a random tensor operation. Now and then the gradient since the last
restart of all samples is compared with BPTT, and bytes, resident memory and time per step are noted. All must stay
flat.
"""

import argparse
import gc
import json
import random
import resource
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers.injected_faults import KINDS, Operations
from helpers.running import gradients
from torch import Tensor

import oracles
from rtrl.errors import RTRLError

CELLS = ("dense", "analytic", "rows", "slices", "one step")
SPAN = 40  # steps between restarts of all samples, which the oracle goes back to
CHECKED = 10  # one of so many spans is compared with the oracle


@dataclass
class Soak:
    """One learner, and what was measured on its way."""

    name: str
    seed: int = 0
    steps: int = 0
    faults: int = 0
    refused: int = 0
    saves: int = 0
    worst: float = 0.0
    bytes_held: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.kind = KINDS[self.name]
        self.cell = self.kind.cell()
        self.learner = self.kind.learner(self.cell, self.kind.batch)
        self.clear()

    def clear(self) -> None:
        self.taken: list[tuple[Tensor, int, bool, Tensor]] = []
        self.restarts = torch.zeros(self.kind.batch, dtype=torch.bool)
        for p in self.cell.parameters():
            p.grad = None

    def span(self, checked: bool) -> None:
        """Take some steps, after all samples have restarted and all gradients were delivered."""
        for _ in range(SPAN):
            self.step()
        self.learner.sync()
        if checked and self.taken:
            self.compare()
        self.bytes_held.append(sum(self.learner.retained_bytes().values()))
        self.learner.reset()
        self.clear()

    def step(self) -> None:
        what = self.random.random()
        x = torch.randn(self.kind.batch, self.kind.d_in, dtype=torch.float64)
        if self.random.random() < 0.3:
            x[:, 1:] = -1.0  # slices sleep
        before = self.learner.steps_taken
        if what < 0.02:
            self.struck(x, before)
            return
        y = self.learner.step(x)
        has_loss = what < 0.6
        if has_loss:
            self.learner.backward(self.kind.loss(self.steps % 7, y))
        self.note(x, has_loss)
        if what > 0.97:
            samples = torch.arange(self.kind.batch) == self.random.randrange(self.kind.batch)
            self.learner.reset(samples)
            self.restarts = self.restarts | samples
        elif what > 0.93:
            self.learner.sync(dormant=self.random.random() < 0.5)
        elif what > 0.925:
            self.saves += 1
            saved = self.learner.state_dict()
            self.learner = self.kind.learner(self.cell, self.kind.batch)  # a new process would make this one
            self.learner.load_state_dict(saved)

    def struck(self, x: Tensor, before: int) -> None:
        """Take a step in which Ctrl-C strikes at some tensor operation."""
        self.faults += 1
        injector = Operations(self.random.randrange(1, 60), KeyboardInterrupt)
        try:
            with injector.active():
                self.learner.step(x)
        except KeyboardInterrupt:
            pass
        if self.learner.steps_taken > before:
            self.note(x, False)
        try:
            self.learner.sync()
        except RTRLError:
            self.refused += 1
            self.learner.reset(discard=True)
            self.clear()

    def note(self, x: Tensor, has_loss: bool) -> None:
        self.taken.append((x, self.steps % 7, has_loss, self.restarts))
        self.restarts = torch.zeros(self.kind.batch, dtype=torch.bool)
        self.steps += 1

    def compare(self) -> None:
        xs, resets = torch.stack([each[0] for each in self.taken]), torch.stack([each[3] for each in self.taken])
        resets[0] = False

        def loss(t: int, y: Any) -> Tensor | None:
            return self.kind.loss(self.taken[t][1], y) if self.taken[t][2] else None

        found = gradients(self.cell)
        for name, value in oracles.bptt(self.cell, xs, loss, resets=resets).items():
            size = float(value.abs().max())
            if size:
                self.worst = max(self.worst, float((found[name] - value).abs().max()) / size)


def run(steps: int, seed: int = 0, report: Any = None, cells: tuple[str, ...] = CELLS) -> dict[str, Any]:
    """Take so many steps in all; return what was measured."""
    torch.manual_seed(seed)
    soaks = [Soak(name, seed + i) for i, name in enumerate(cells)]
    rows: list[dict[str, float]] = []
    while sum(each.steps for each in soaks) < steps:
        before, start = sum(each.steps for each in soaks), time.process_time()
        spans = max(1, min(CHECKED, steps // 10 // SPAN // len(soaks)))
        for i in range(spans):
            for each in soaks:
                each.span(checked=i == 0)
        taken = sum(each.steps for each in soaks)
        rows.append(
            {
                "steps": taken,
                "seconds_per_step": (time.process_time() - start) / (taken - before),
                "resident_bytes": _resident(),
                "bytes_held": sum(each.bytes_held[-1] for each in soaks),
                "worst_error": max(each.worst for each in soaks),
            }
        )
        for each in soaks:
            each.bytes_held = each.bytes_held[-CHECKED:]
        if report is not None and len(rows) % 50 == 0:
            report(rows[-1])
    return {
        "steps": sum(each.steps for each in soaks),
        "faults": sum(each.faults for each in soaks),
        "refused": sum(each.refused for each in soaks),
        "saves": sum(each.saves for each in soaks),
        "worst_error": max(each.worst for each in soaks),
        "rows": rows,
    }


def flat(rows: list[dict[str, float]]) -> dict[str, float]:
    """How much larger each figure is in the last third than in the second one, as a ratio of medians."""
    third = len(rows) // 3
    ratios = {}
    for name in ("seconds_per_step", "resident_bytes", "bytes_held"):
        middle, last = (
            sorted(row[name] for row in part)[len(part) // 2] for part in (rows[third : 2 * third], rows[2 * third :])
        )
        ratios[name] = last / middle
    return ratios


def _resident() -> int:
    gc.collect()
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="a long stream in which everything happens")
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = run(arguments.steps, arguments.seed, lambda row: print(json.dumps(row), flush=True))
    found["flat"] = flat(found["rows"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "rows"}))
    largest = max(found["flat"].values())
    raise SystemExit(0 if found["worst_error"] <= 1e-10 and largest <= 1.2 else 1)


if __name__ == "__main__":
    main()
