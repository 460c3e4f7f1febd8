"""Backpropagation through time, full and truncated, with the interface of an online learner."""

from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.learners.base import Baseline
from rtrl.learners.replayed_step import Step


def unrolled_gradient(steps: list[Step]) -> dict[str, Tensor]:
    """The gradient of all losses still owed by consecutive steps, the first one's state held fixed.

    Raises:
        CellError: run again, the cell does not do what it did.

    Cost: a forward and a backward pass through the steps, and the graph of all of them for as long.
    """
    if not any(step.owed for step in steps):
        return {}
    heads: list[tuple[Tensor, Tensor]] = []
    h = steps[0].h
    for step in steps:
        if step is not steps[0] and bool(step.cut.any()):
            h = torch.where(step.cut.reshape(-1, *[1] * (h.ndim - 1)), step.h, h)
        pairs, h = step.again(h)
        heads += pairs
    if not heads:
        return {}
    values = {id(step.values): step.values for step in steps}.values()  # steps share them until a parameter changes
    leaves = [(name, leaf) for value in values for name, leaf in value.trainable.items()]
    ys, adjoints = zip(*heads, strict=True)
    found = torch.autograd.grad(ys, [leaf for _, leaf in leaves], adjoints, materialize_grads=True)
    gradient: dict[str, Tensor] = {}
    for (name, _), part in zip(leaves, found, strict=True):
        gradient[name] = gradient[name] + part if name in gradient else part.clone()
    return gradient


class _Unrolled(Baseline):
    """Keeps steps, and runs them again backward."""

    def __init__(self, cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> None:
        super().__init__(cell, batch_size, state=state)
        self._steps: list[Step] = []

    def _settle(self) -> None:
        self._earn(unrolled_gradient(self._steps))
        for step in self._steps:
            step.adjoints = [None] * len(step.adjoints)

    def _kept_steps(self) -> list[Step]:
        return self._steps

    def _keep_steps(self, steps: list[Step]) -> None:
        self._steps = steps


class BPTT(_Unrolled):
    """Full backpropagation through time: all steps since the last reset of all samples are kept and run backward.

    Equation: ``dL/dθ = Σ_t dℓ_t/dθ`` by reverse mode through ``h_{t+1} = cell(x_t, h_t; θ)`` from the first step on.

    Law: exact, whatever the stream, the losses, the resets and the deliveries. A loss after a ``sync`` still reaches
    back to the first step, so a ``sync`` forgets nothing; a ``reset()`` of all samples does.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``.
        batch_size: B. state: the first state (B, n, ...); ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost: a ``sync`` after T steps runs T steps forward and backward; inputs, states and outputs of T steps are held
        between steps, and the graph of T steps during a ``sync``: memory grows with T.

    Source: Werbos (1990), "Backpropagation Through Time: What It Does and How to Do It", Proceedings of the IEEE
    78(10).

    >>> import torch, rtrl
    >>> from rtrl.learners import BPTT
    >>> learner = BPTT(rtrl.cells.from_torch(torch.nn.GRUCell(3, 4)), batch_size=2)
    >>> for _ in range(5):
    ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
    >>> learner.sync()
    """

    def _work_off(self, step: Step) -> None:
        if bool(step.cut.all()):
            self._settle()
            self._steps = []
        self._steps.append(step)


class TBPTT(_Unrolled):
    """Backpropagation through time over the last k steps alone, as a sliding window or in chunks.

    Equation: ``Σ_t dℓ_t/dθ`` with the state that step ``t − k + 1`` receives held fixed (``sliding=True``), or that
    of step ``k·⌊t / k⌋`` (``sliding=False``, counted from the last reset of all samples).

    Law: exact if no loss lies k steps or more after the start of its samples. A sliding window treats all losses
    alike; in chunks a loss reaches back between 1 and k steps.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``.
        batch_size: B. horizon: k, from 1 on; with 1 a loss reaches its own step alone.
        sliding: a window that moves with every step, or chunks of k steps.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost: sliding, each loss runs k steps forward and backward; in chunks a loss a step costs one step forward and
        backward, and ``sync`` inside a chunk runs it anew. Inputs, states and outputs of k steps are held.

    Source: Williams and Peng (1990), "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
    Trajectories", Neural Computation 2(4): BPTT(h) and epochwise BPTT.

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

    def _arguments(self) -> dict[str, Any]:
        return {"horizon": self.horizon, "sliding": self.sliding}

    @property
    def at_block_end(self) -> bool:
        """Whether now is a natural moment to ``sync``: after every step, or at the end of a chunk."""
        return self._open is not None and (self.sliding or self._after(self._open) == self.horizon)

    def _after(self, step: Step) -> int:
        """How many steps the chunk has with this one."""
        return 1 if len(self._steps) == self.horizon or bool(step.cut.all()) else len(self._steps) + 1

    def _work_off(self, step: Step) -> None:
        if self.sliding:
            window = [*self._steps, step][-self.horizon :]
            self._earn(unrolled_gradient(window))
            step.adjoints = [None] * len(step.adjoints)
            self._steps = window
            return
        if self._after(step) == 1:
            self._settle()
            self._steps = []
        self._steps.append(step)
