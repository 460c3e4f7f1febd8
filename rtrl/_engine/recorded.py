"""What is recorded of a step until its block closes, and several steps of one kind as one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
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
        outputs: the floating-point tensors of y. The gradient of the losses collects in the ``.grad`` of ``leaves``:
            these tensors, or those of the whole sequence.
        number: the absolute number of the step, for messages.
        sources: the tensors of x as they were passed, where one of them is to get a gradient; else empty.
        restarted: Boolean (B,), the samples that restarted after the step before, inside the block: their ``h`` is a
            constant. None for none.
        reached: (B, n, ...), the state after the step, where samples restarted from another one; None where the next
            step has it.
        unchecked: losses of the step, and gradients that they gave to other tensors than y, that are not known to be
            finite: the host has not waited for a device.
        sequence, index: the sequence that the step was taken with, and its place there; None for a step taken alone.
        with_grad: how many of the leaves had a gradient when ``backward`` of the learner last added a loss.
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
    sequence: "RecordedSequence | None" = field(default=None, kw_only=True)
    index: int = field(default=0, kw_only=True)
    with_grad: int = field(default=0, kw_only=True)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that the user's losses end at."""
        return self.outputs if self.sequence is None else self.sequence.outputs

    @property
    def grads(self) -> list[Tensor | None]:
        """The gradient of the losses at each output; None where there is none."""
        if self.sequence is None:
            return [leaf.grad for leaf in self.outputs]
        return [None if leaf.grad is None else leaf.grad[self.index] for leaf in self.sequence.outputs]

    @property
    def dense(self) -> bool:
        """Whether the step declares no sparsity, so that it may touch everything."""
        return self.sparsity.reads is None and self.sparsity.writes is None and not self.sparsity.active

    @property
    def has_loss(self) -> bool:
        """Whether a loss was added at this step."""
        return any(leaf.grad is not None for leaf in self.leaves)

    def continued(self, h: Tensor) -> Tensor:
        """Return h, the state that the step before reached, with the constants of samples that restarted here."""
        if self.restarted is None:
            return h
        return torch.where(self.restarted.reshape(-1, *[1] * (h.ndim - 1)), self.h, h)

    def kind(self) -> tuple[Any, ...]:
        """What two steps must share to be run as one batch."""
        if self.sequence is not None and self.sequence.kind is not None:
            return self.sequence.kind
        x = (self.x.shape, self.x.dtype) if isinstance(self.x, Tensor) else pytrees.signature(self.x)
        sparsity = None if self.dense else pytrees.signature(tuple(self.sparsity))
        return (x, self.h.shape, self.h.dtype, sparsity)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedSequence:
    """The record of m steps that were taken at once.

    Attributes:
        x: the inputs, a tree of tensors (m, B, ...).
        states: (m + 1, B, n, ...), before each step and after the last.
        outputs: the floating-point tensors of y, (m, B, ...), as leaves.
        kind: what ``kind`` gives for each of the steps, if all are dense; None if not.
    """

    x: Any
    states: Tensor
    outputs: list[Tensor]
    kind: tuple[Any, ...] | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """m steps of one kind as one batch of N = B·m samples, each of the B samples' m steps after one another.

    Attributes:
        times: positions of the steps in their block, ascending.
        steps: their records.
        runs: the records, see ``split_runs``.
        x: (N, ...), the inputs.
        h: (N, n, ...), the states before the steps.
        reached: (N, n, ...), the states after them.
        sparsity: what the steps declared.
        replay: the choices to make again; None for a cell that takes none.
    """

    times: list[int]
    steps: list[RecordedStep]
    runs: list[list[RecordedStep]]
    x: Any
    h: Tensor
    reached: Tensor
    sparsity: Sparsity
    replay: Sparsity | None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.steps[0].h.shape[0]

    @property
    def has_losses(self) -> bool:
        """Whether a loss was added at any of the steps."""
        return any(step.has_loss for step in self._holders())

    def outputs(self) -> list[Tensor]:
        """The floating-point tensors of y as they were recorded, (N, ...)."""

        def output(part: "RecordedStep | RecordedSequence", i: int) -> Tensor:
            return part.outputs[i].detach()

        return [join(self.runs, output, output, i) for i in range(len(self.steps[0].outputs))]

    def grad(self, place: int) -> Tensor | None:
        """The gradient of the losses at one of the outputs, (N, ...), zero at steps without one; None if all are."""
        if all(step.leaves[place].grad is None for step in self._holders()):
            return None

        def filled(part: "RecordedStep | RecordedSequence", i: int) -> Tensor:
            leaf = part.outputs[i]
            return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

        grad: Tensor = join(self.runs, filled, filled, place)
        return grad

    def _holders(self) -> list[RecordedStep]:
        """The steps without those that have the leaves of the one before."""
        return [step for run in self.runs for step in (run[:1] if run[0].sequence else run)]

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


def join_steps(times: list[int], steps: list[RecordedStep], reached: list[Tensor], takes_replay: bool) -> StepBatch:
    """Join recorded steps of one kind, ``reached`` being the states after them."""
    runs = split_runs(steps)
    x = join(runs, lambda step, _: step.x, lambda sequence, _: sequence.x)
    h = join(runs, lambda step, _: step.h, lambda sequence, _: sequence.states[:-1])
    if any(run[0].sequence is None for run in runs):
        after = pytrees.interleave(reached)
    else:
        after = join(runs, lambda step, _: step.h, lambda sequence, _: sequence.states[1:])
    sparsity = Sparsity() if steps[0].dense else pytrees.interleave([step.sparsity for step in steps])
    return StepBatch(times, steps, runs, x, h, after, sparsity, sparsity if takes_replay else None)


def split_runs(steps: Sequence[RecordedStep]) -> list[list[RecordedStep]]:
    """Split steps so that each part holds neighbours of one sequence, or steps that were taken alone."""
    found: list[list[RecordedStep]] = []
    before: RecordedStep | None = None
    for step in steps:
        same = before is not None and step.sequence is before.sequence
        if same and (step.sequence is None or step.index == before.index + 1):  # type: ignore[union-attr]
            found[-1].append(step)
        else:
            found.append([step])
        before = step
    return found


def join(
    runs: Sequence[list[RecordedStep]],
    of_step: Callable[[RecordedStep, int], Any],
    of_sequence: Callable[[RecordedSequence, int], Any],
    place: int = 0,
) -> Any:
    """Join trees of tensors of m steps to (B·m, ...), the m entries of a sample after one another.

    Args:
        runs: the steps, see ``split_runs``.
        of_step: gives the tree (B, ...) of a step that was taken alone.
        of_sequence: gives the stacked tree (m, B, ...) of a sequence.
        place: passed to both.
    """
    parts = []
    for run in runs:
        start, sequence = run[0].index, run[0].sequence
        if sequence is None:
            parts.append(pytrees.stack([of_step(step, place) for step in run]))
        else:
            part = slice(start, start + len(run))
            parts.append(pytrees.map_tensors(itemgetter(part), of_sequence(sequence, place)))
    whole = parts[0] if len(parts) == 1 else pytrees.concatenate(parts)
    return pytrees.map_tensors(lambda stacked: stacked.transpose(0, 1).flatten(0, 1), whole)
