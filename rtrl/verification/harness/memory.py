"""Bytes that learning takes, with a peak over everything alive: what the claims about memory share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from rtrl._influence.history import History
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.verification.harness.problems import Mixture, Problem, Run


class Meter(Protocol):
    """Something that knows how many bytes are taken at once."""

    @property
    def peak(self) -> int:
        """The most so far, above what was there at the beginning."""
        ...


@contextmanager
def alive() -> Iterator[Meter]:
    """The bytes of all tensors alive at once, storage by storage."""
    with LiveBytes() as meter:
        yield meter


class CudaPeak:
    """What PyTorch's CUDA allocator has handed out at once."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        self._base = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak(self) -> int:
        """The allocator's own peak since the beginning."""
        return torch.cuda.max_memory_allocated(self._device) - self._base


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak bytes after T steps of both ways to learn, and what the online learner holds between steps then."""

    lengths: list[int]
    bptt: list[int]
    rtrl: list[int]
    held: list[int]


def wake_all(run: Run) -> int:
    """Lay down every expert and every slot once, so that whatever can take memory does; the steps that took."""
    cell = run.own
    experts, slots = int(cell.n_experts), int(cell.n_slots)  # type: ignore[arg-type]
    steps = max(experts, slots)
    for i in range(steps):
        near = torch.tensor([[i, i + 1]], device=run.learner.state.device)
        laid = cell.choices(near % slots, near % slots, near % experts)  # type: ignore[operator]
        y = run.learner.step(run.problem.xs[i % len(run.problem.xs)], replay=laid)
        run.learner.backward(run.problem.loss(i, y))
    run.deliver()
    return steps


def bptt_peak(problem: Problem, steps: int, meter: Callable[[], "Meter"]) -> int:
    """Peak bytes of plain backpropagation through time over so many steps, parameters not counted, gradients counted.

    The loss is summed as it falls; the graph is what autograd saves, freed as it goes backward.
    """
    cell = problem.cell
    cell.zero_grad()
    measured = meter()
    h = cell.init_state(problem.xs.shape[1])  # type: ignore[operator]
    total = torch.zeros((), dtype=problem.xs.dtype, device=problem.xs.device)
    for t in range(steps):
        y, h, _ = cell(problem.xs[t % len(problem.xs)], h)
        total = total + problem.loss(t, y)
    total.backward()
    peak = measured.peak
    cell.zero_grad()
    return peak


def bptt_on_cpu(problem: Problem, steps: int) -> int:
    """The same, by the bytes of all tensors alive at once."""
    with alive() as meter:
        return bptt_peak(problem, steps, lambda: meter)


def tree_bytes(mixture: Mixture, block: int, window: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that the tree of a learner reserves, at once and for good; nothing is allocated."""
    state = torch.empty(1, mixture.n_slots, mixture.d_model, dtype=dtype, device="meta")
    rows, cols = min(mixture.n_slots, block * 2), min(mixture.n_slots, block * 4)
    return History(window, rows, cols, state).n_bytes


def influence_bytes(mixture: Mixture, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the influence of one sample once every slice has been active: H·P numbers, and the index of each row."""
    cell = mixture.cell(0)
    near = torch.zeros(1, 1, dtype=torch.int64)
    sliced = cell.choices(near, near, near).active
    numbers, index = 0, 0
    for name, p in cell.named_parameters():
        slices = p.shape[0] if name in sliced else 1
        numbers += mixture.hidden * p.numel()
        index += 8 * (3 * slices + slices)  # sample, slice and clock of each row, and where each slice's row is
    return numbers * torch.empty((), dtype=dtype).element_size() + index


def between_blocks(learner: BlockRTRL) -> int:
    """Bytes held right after a delivery: influence, tree and state; no open block and no gradient waits."""
    held = learner.retained_bytes()
    return held["influence"] + held["tree"] + held["state"]
