"""What is recorded of a step until its block closes, and several steps of one kind as one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import index_sets, pytrees
from rtrl.cells.protocol import Sparsity


@dataclass(slots=True)
class RecordedStep:
    """The record of one step.

    Attributes:
        x: the input, a tree of tensors (B, ...).
        h: (B, n, ...), the state before the step.
        sparsity: what the cell declared, or was made to do.
        outputs: the floating-point tensors of y, as leaves whose ``.grad`` collects the gradient of the losses.
        number: the absolute number of the step, for messages.
        sources: the tensors of x as they were passed, where one of them is to get a gradient; else empty.
        restarted: Boolean (B,), the samples that restarted after the step before, inside the block: their ``h`` is a
            constant. None for none.
        reached: (B, n, ...), the state after the step, where samples restarted from another one; None where the next
            step has it.
        unchecked: losses of the step, and gradients that they gave to other tensors than y, that are not known to be
            finite: the host has not waited for a device.
    """

    x: Any
    h: Tensor
    sparsity: Sparsity
    outputs: list[Tensor]
    number: int
    sources: list[Tensor] = field(default_factory=list, kw_only=True)
    restarted: Tensor | None = field(default=None, kw_only=True)
    reached: Tensor | None = field(default=None, kw_only=True)
    unchecked: list[Tensor] = field(default_factory=list, kw_only=True)

    @property
    def dense(self) -> bool:
        """Whether the step declares no sparsity, so that it may touch everything."""
        return self.sparsity.reads is None and self.sparsity.writes is None and not self.sparsity.active

    @property
    def has_loss(self) -> bool:
        """Whether a loss was added at this step."""
        return any(leaf.grad is not None for leaf in self.outputs)

    def continued(self, h: Tensor) -> Tensor:
        """Return h, the state that the step before reached, with the constants of samples that restarted here."""
        if self.restarted is None:
            return h
        return torch.where(self.restarted.reshape(-1, *[1] * (h.ndim - 1)), self.h, h)

    def kind(self) -> tuple[Any, ...]:
        """What two steps must share to be run as one batch."""
        x = (self.x.shape, self.x.dtype) if isinstance(self.x, Tensor) else pytrees.signature(self.x)
        sparsity = None if self.dense else pytrees.signature(tuple(self.sparsity))
        return (x, self.h.shape, self.h.dtype, sparsity)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """m steps of one kind as one batch of N = B·m samples, each of the B samples' m steps after one another.

    Attributes:
        times: positions of the steps in their block, ascending.
        steps: their records.
        next_states: the states after them.
        x: (N, ...), the inputs.
        h: (N, n, ...), the states before the steps.
        sparsity: what the steps declared.
        replay: the choices to make again; None for a cell that takes none.
    """

    times: list[int]
    steps: list[RecordedStep]
    next_states: list[Tensor]
    x: Any
    h: Tensor
    sparsity: Sparsity
    replay: Sparsity | None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.steps[0].h.shape[0]

    @property
    def has_losses(self) -> bool:
        """Whether a loss was added at any of the steps."""
        return any(step.has_loss for step in self.steps)

    @property
    def slot_size(self) -> int:
        """Numbers per slot of the state."""
        return self.h[0, 0].numel()

    @property
    def span(self) -> str:
        """The steps, for messages."""
        first, last = self.steps[0].number, self.steps[-1].number
        return f"step {first}" if first == last else f"steps {first} … {last}"

    def written(self, h_next: Tensor) -> Tensor:
        """The written slots of a next state, (N, w·slot_size)."""
        slots = h_next.reshape(*h_next.shape[:2], self.slot_size)
        return index_sets.gather(slots, self.sparsity.writes).flatten(1)

    def by_step(self, value: Tensor) -> Tensor:
        """(N, ...) → (B, m, ...)."""
        by_step: Tensor = value.unflatten(0, (-1, len(self.steps)))
        return by_step

    def locate(self, bad: Tensor) -> tuple[int, int]:
        """The first of the m steps, and there the first sample of B, at which one of the N samples is bad."""
        step, sample = (int(i) for i in self.by_step(bad).T.nonzero()[0])
        return step, sample


def reached_states(steps: Sequence[RecordedStep], last: Tensor) -> list[Tensor]:
    """The state (B, n, ...) that each of consecutive steps reached, the present state being ``last``."""
    following = [*(step.h for step in steps[1:]), last]
    return [h if step.reached is None else step.reached for step, h in zip(steps, following, strict=True)]


def join_restarts(steps: Sequence[RecordedStep]) -> Tensor | None:
    """Boolean (B, m), the samples that restarted just before each step; None if none did."""
    if all(step.restarted is None for step in steps):
        return None
    none = torch.zeros(steps[0].h.shape[0], dtype=torch.bool, device=steps[0].h.device)
    return torch.stack([none if step.restarted is None else step.restarted for step in steps], dim=1)


def join_steps(times: list[int], steps: list[RecordedStep], next_states: list[Tensor], takes_replay: bool) -> StepBatch:
    """Join recorded steps of one kind."""
    x, h = (pytrees.interleave(trees) for trees in ([step.x for step in steps], [step.h for step in steps]))
    sparsity = Sparsity() if steps[0].dense else pytrees.interleave([step.sparsity for step in steps])
    return StepBatch(times, steps, next_states, x, h, sparsity, sparsity if takes_replay else None)
