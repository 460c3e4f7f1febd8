"""Backpropagation through time, full and truncated, with the interface of an online learner."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine.surroundings import linearizing
from rtrl._utils import validation
from rtrl._utils.real_pairs import as_like
from rtrl.learners.replayed_step import ReplayedStep, ReplayingLearner


@torch.enable_grad()
def unrolled_gradient(steps: Sequence[ReplayedStep]) -> dict[str, Tensor]:
    """Return the gradient of all pending losses of consecutive steps, with the state of the first step held fixed, but
    for what it has from parameters as a first state.

    Raises:
        CellError: run again, the cell does something else than it did.

    Cost:
        A forward and a backward pass through the steps; the graph of all of them exists for as long.
    """
    gradient: dict[str, Tensor] = {}
    adjoint: Tensor | None = None  # of all later losses, at the state before the steps that are done
    for run in reversed(_runs_of_one_snapshot(steps)):
        if adjoint is None and not any(step.has_pending_loss for step in run):
            continue
        with run[0].snapshot.applied():
            adjoint = _add_run(run, run[0] is steps[0], adjoint, gradient)
    return gradient


def _runs_of_one_snapshot(steps: Sequence[ReplayedStep]) -> list[list[ReplayedStep]]:
    """Steps in order, split wherever the parameters changed."""
    return [list(run) for _, run in groupby(steps, key=lambda step: id(step.snapshot))]


def _add_run(
    steps: Sequence[ReplayedStep], is_first: bool, adjoint: Tensor | None, gradient: dict[str, Tensor]
) -> Tensor | None:
    """Add to a gradient what steps of one snapshot contribute, given the adjoint of the state after them; return the
    adjoint of the state before them, which is None if nothing reaches it or if it ``is_first`` and held fixed."""
    before = steps[0].h.clone().requires_grad_(not is_first)
    heads: list[tuple[Tensor, Tensor]] = []
    h, starts = before, []
    for step in steps:
        start = step.h
        if step.first_influence:
            start = step.h.clone().requires_grad_()
            starts.append((start, step.first_influence))
        if is_first and step is steps[0]:
            h = start
        elif bool(step.constant_state.any()):
            h = torch.where(step.constant_state.reshape(-1, *[1] * (h.ndim - 1)), start, h)
        pairs, h = step.rerun(h)
        heads += pairs
    if adjoint is not None and h.requires_grad:
        heads.append((h, adjoint))
    if not heads:
        return None
    leaves = steps[0].snapshot.trainable
    targets = [*leaves.values(), *(start for start, _ in starts), *([] if is_first else [before])]
    if not targets:  # all that were trainable then are frozen by now
        return None
    ys, adjoints = zip(*heads, strict=True)
    parts = torch.autograd.grad(ys, targets, adjoints, materialize_grads=True)
    for (name, _), part in zip(leaves.items(), parts, strict=False):
        gradient[name] = gradient[name] + part if name in gradient else part.clone()
    for (_, influences), part in zip(starts, parts[len(leaves) :], strict=False):
        for name, influence in influences.items():
            gradient[name] += as_like(torch.einsum("bh,bhp->p", part.flatten(1), influence), gradient[name])
    return None if is_first else parts[-1]


class _Unrolled(ReplayingLearner):
    """A learner that keeps steps and runs them backward together."""

    @abstractmethod
    def _with_kept(self, step: ReplayedStep) -> list[ReplayedStep]:
        """Return the steps that a loss at this step, the newest one, reaches back through."""

    def _pull_losses(self, cotangents: Sequence[Tensor], per_sample: bool) -> dict[str, Tensor]:
        newest = self._replayed(self._open_steps[-1])
        steps = [replace(step, adjoints=[None] * len(step.outputs)) for step in self._with_kept(newest)]
        rows = []
        for row in zip(*cotangents, strict=True):
            steps[-1].adjoints = list(row)
            rows.append(unrolled_gradient(steps))
        zeros = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        return {name: torch.stack([row.get(name, zero) for row in rows]) for name, zero in zeros.items()}

    def _flush(self, dormant: bool) -> None:
        with linearizing(self._parameters.values()):
            pending = self._with_pending(unrolled_gradient(self._kept_steps))
        self._change()
        self._pending_grads = pending
        for step in self._kept_steps:
            step.drop_adjoints()
        self._damage = None

    def _most_kept(self) -> int | None:
        return None


class BPTT(_Unrolled):
    """Full backpropagation through time: keep all steps since the last reset of all samples, and run them backward.

    Equation:
        ``dL/dθ = Σ_t dℓ_t/dθ`` by reverse mode through ``h_{t+1} = cell(x_t, h_t; θ)`` from the first step on.

    Law:
        Exact for every stream and any losses, resets and deliveries. A loss after a ``sync`` still reaches back to the
        first step, because a ``sync`` forgets nothing; a ``reset()`` of all samples does.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``.
        batch_size: B.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost:
        A ``sync`` after T steps runs T steps forward and backward. Inputs, states and outputs of T steps are held
        between steps, and the graph of T steps during a ``sync``: memory grows with T.

    Source:
        Werbos (1990), "Backpropagation Through Time: What It Does and How to Do It", Proceedings of the IEEE 78(10).

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import BPTT
        >>> learner = BPTT(rtrl.cells.from_torch(torch.nn.GRUCell(3, 4)), batch_size=2)
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
    """

    def _with_kept(self, step: ReplayedStep) -> list[ReplayedStep]:
        return [step] if bool(step.constant_state.all()) else [*self._kept_steps, step]

    def _process_step(self, step: ReplayedStep) -> None:
        if bool(step.constant_state.all()):
            self._flush(dormant=True)
            self._change()
            self._kept_steps = []
        self._change()
        self._kept_steps.append(step)


class TBPTT(_Unrolled):
    """Backpropagation through time over the last k steps alone, as a sliding window or in chunks.

    Equation:
        ``Σ_t dℓ_t/dθ`` with the state that step ``t − k + 1`` receives held fixed (``sliding=True``), or that of step
        ``k·⌊t / k⌋`` (``sliding=False``, counted from the last reset of all samples).

    Law:
        Exact if no loss lies k steps or more after the start of its samples. A sliding window treats all losses alike;
        in chunks a loss reaches back between 1 and k steps.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``.
        batch_size: B.
        horizon: k, from 1 on; with 1 a loss reaches its own step alone.
        sliding: True for a window that moves with every step, False for chunks of k steps.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost:
        Sliding, each loss runs k steps forward and backward. In chunks, with a loss at every step, a step is run
        forward and backward once, and a ``sync`` inside a chunk runs the chunk again. Inputs, states and outputs of
        k steps are held.

    Source:
        Williams and Peng (1990), "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
        Trajectories", Neural Computation 2(4): BPTT(h) and epochwise BPTT.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import TBPTT
        >>> learner = TBPTT(rtrl.cells.from_torch(torch.nn.GRUCell(3, 4)), batch_size=2, horizon=3)
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
    """

    def __init__(
        self, cell: nn.Module, batch_size: int, horizon: int, *, sliding: bool = True, state: Tensor | None = None
    ) -> None:
        self.horizon, self.sliding = validation.integer("horizon", horizon), bool(sliding)
        super().__init__(cell, batch_size, state=state)

    @property
    def at_block_end(self) -> bool:
        """Whether now is a natural moment to ``sync``: after every step, or at the end of a chunk."""
        return bool(self._open_steps) and (self.sliding or self._place_in_chunk(self._constant_state) == self.horizon)

    def _arguments(self) -> dict[str, Any]:
        return {"horizon": self.horizon, "sliding": self.sliding}

    def _most_kept(self) -> int | None:
        return self.horizon

    def _place_in_chunk(self, constant_state: Tensor) -> int:
        """Return which step of its chunk the newest one is, from 1 on."""
        begins = len(self._kept_steps) == self.horizon or bool(constant_state.all())
        return 1 if begins else len(self._kept_steps) + 1

    def _with_kept(self, step: ReplayedStep) -> list[ReplayedStep]:
        if self.sliding:
            return [*self._kept_steps, step][-self.horizon :]
        return [step] if self._place_in_chunk(step.constant_state) == 1 else [*self._kept_steps, step]

    def _process_step(self, step: ReplayedStep) -> None:
        if self.sliding:
            window = self._with_kept(step)
            pending = self._with_pending(unrolled_gradient(window))
            self._change()
            self._pending_grads = pending
            step.drop_adjoints()
            self._kept_steps = window
            return
        if self._place_in_chunk(step.constant_state) == 1:
            self._flush(dormant=True)
            self._change()
            self._kept_steps = []
        self._change()
        self._kept_steps.append(step)
