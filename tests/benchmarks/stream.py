"""A long stream in a process of its own: what is held at ten moments after warm-up, as a line of JSON.

``python stream.py ours 20000`` runs the learner; ``python stream.py bptt 20000`` the control, a graph that keeps all
steps.
"""

import json
import sys

import torch
from problems import Problem, dense
from rivals import Ours

from rtrl.verification.harness.subprocesses import rss_bytes

HIDDEN, BLOCK, MOMENTS = 16, 32, 10


class Learner:
    """Exact gradients all along, thrown away after every block."""

    def __init__(self, problem: Problem) -> None:
        self.side = Ours(problem, block=BLOCK)

    def advance(self, steps: int) -> None:
        for _ in range(steps // BLOCK):
            self.side.advance(BLOCK)
            self.side.cell.zero_grad()

    def held_bytes(self) -> int:
        return sum(self.side.learner.retained_bytes().values())


class Graph:
    """One graph over all steps, as backpropagation through time needs it."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.h, self.t, self.bytes = problem, problem.cell.init_state(1), 0, 0
        self.total = torch.zeros(())

    def advance(self, steps: int) -> None:
        def count(tensor: torch.Tensor) -> torch.Tensor:
            self.bytes += tensor.numel() * tensor.element_size() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            for _ in range(steps):
                y, self.h = self.problem.cell(self.problem.x(self.t), self.h)
                self.total = self.total + self.problem.loss(self.t, y)
                self.t += 1

    def held_bytes(self) -> int:
        return self.bytes


def measure(kind: str, steps: int) -> dict[str, list[int | None]]:
    """Steps taken, bytes held and RSS, at the end of the warm-up (a tenth of the steps) and nine times more."""
    problem = dense("gru", HIDDEN, steps=4 * BLOCK)
    run = {"ours": Learner, "bptt": Graph}[kind](problem)
    part = steps // MOMENTS // BLOCK * BLOCK
    taken: dict[str, list[int | None]] = {"steps": [], "held_bytes": [], "rss_bytes": []}
    for moment in range(1, MOMENTS + 1):
        run.advance(part)
        for name, value in zip(taken, (moment * part, run.held_bytes(), rss_bytes()), strict=True):
            taken[name].append(value)
    return taken


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
