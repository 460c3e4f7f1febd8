"""Measure bytes that learning takes: peaks of everything alive, and what the learner holds by formula."""

from collections.abc import Callable
from typing import Protocol

import torch

from rtrl._influence.history import History
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.verification.harness.problems import LearnerRun, Mixture, Problem


class Meter(Protocol):
    """Something that knows how many bytes were taken at once."""

    @property
    def peak(self) -> int:
        """The most bytes so far, above what was there at the beginning."""
        ...


class CudaPeak:
    """The most bytes that PyTorch's CUDA allocator has handed out at once."""

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


def use_all_slices(run: LearnerRun) -> None:
    """Use every expert and slot once, so that all memory is allocated."""
    cell = run.cell
    for i in range(max(cell.n_experts, cell.n_slots)):
        near = torch.tensor([[i, i + 1]], device=run.learner.state.device)
        chosen = cell.choices(near % cell.n_slots, near % cell.n_slots, near % cell.n_experts)
        y = run.learner.step(run.problem.xs[i % len(run.problem.xs)], replay=chosen)
        run.learner.backward(run.problem.loss(i, y))
    run.sync()


def bptt_peak(problem: Problem, steps: int, meter: Callable[[], Meter]) -> int:
    """Return the peak bytes of plain backpropagation through time. Gradients are counted, parameters are not.

    The loss is summed step by step; the graph is what autograd saves, freed in the backward pass.
    """
    cell = problem.cell
    cell.zero_grad()
    measured = meter()
    h = cell.init_state(problem.xs.shape[1])
    total = torch.zeros((), dtype=problem.xs.dtype, device=problem.xs.device)
    for t in range(steps):
        y, h, _ = cell(problem.xs[t % len(problem.xs)], h)
        total = total + problem.loss(t, y)
    total.backward()
    peak = measured.peak
    cell.zero_grad()
    return peak


def bptt_on_cpu(problem: Problem, steps: int) -> int:
    """Return ``bptt_peak`` as the bytes of all tensors alive at once."""
    with LiveBytes() as meter:
        return bptt_peak(problem, steps, lambda: meter)


def tree_bytes(mixture: Mixture, block: int, window: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes that a learner's tree reserves. Nothing is allocated."""
    state = torch.empty(1, mixture.n_slots, mixture.d_model, dtype=dtype, device="meta")
    rows, cols = min(mixture.n_slots, block * 2), min(mixture.n_slots, block * 4)
    return History(window, rows, cols, state).n_bytes


def influence_bytes(mixture: Mixture, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of one sample's influence once every slice has been active: H·P numbers and the row indices."""
    cell = mixture.cell(0)
    near = torch.zeros(1, 1, dtype=torch.int64)
    sliced = cell.choices(near, near, near).active
    numbers, index = 0, 0
    for name, p in cell.named_parameters():
        slices = p.shape[0] if name in sliced else 1
        numbers += mixture.hidden * p.numel()
        index += 8 * (3 * slices + slices)  # sample, slice and clock of each row, and where each slice's row is
    return numbers * torch.empty((), dtype=dtype).element_size() + index


def bytes_after_sync(learner: BlockRTRL) -> int:
    """Return the bytes held right after ``sync``, with no open block or pending gradient: influence, tree and state."""
    held = learner.retained_bytes()
    return held["influence"] + held["tree"] + held["state"]
