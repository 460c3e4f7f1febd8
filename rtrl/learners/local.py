"""Local approximations, in which the influence of a parameter on one entry of the state stays with that entry."""

from typing import Any

from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.learners.masked_influence import DrivenEntriesLearner


class DiagonalRTRL(DrivenEntriesLearner):
    """RTRL with the dynamics Jacobian replaced by its diagonal.

    Equation:
        ``S_{t+1} = diag(J_t) S_t + B_t``.

    Law:
        Exact for a cell whose dynamics Jacobian is diagonal.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with P trainable numbers.
        batch_size: B.
        state: the first state (B, n, ...) with H entries per sample; ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost:
        ``B·(H + 1)`` backward passes per step, and a multiply-add per entry held. Held: the entries that a parameter
        ever drove at once, and their places; O(P) where each drives few units, ``B·H·P`` at worst.

    Source:
        Mozer (1989), "A Focused Backpropagation Algorithm for Temporal Pattern Recognition", Complex Systems 3,
        for recurrence within units; Hochreiter and Schmidhuber (1997), Neural Computation 9(8), appendix A.1.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import DiagonalRTRL
        >>> learner = DiagonalRTRL(rtrl.cells.from_torch(torch.nn.GRUCell(3, 4)), batch_size=2)
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
    """

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        self._seen(immediate)
        diagonal = dynamics.diagonal(dim1=1, dim2=2)
        return (diagonal[:, self._rows()] * self._carried[0] + self._inside(immediate),)


class RFLO(DrivenEntriesLearner):
    """RTRL with the dynamics Jacobian replaced by the leak of a leaky unit: the eligibility traces of RFLO.

    Equation:
        ``S_{t+1} = (1 − leak) S_t + B_t``, with leak = 1/τ. The adjoint ``δ_t`` is the true one, not that of a random
        feedback matrix as in the method's paper.

    Law:
        Exact for a cell whose dynamics Jacobian is ``(1 − leak) I``.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with P trainable numbers.
        batch_size: B.
        leak: 1/τ, in 0 … 1; with 1 nothing older than the last step counts.
        state: the first state (B, n, ...) with H entries per sample; ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: leak is not a number in 0 … 1, a size is not a positive integer, or the cell has no trainable
            parameter or no first state.

    Cost:
        ``B·(H + 1)`` backward passes per step, and a multiply-add per entry held. Held: the entries that a parameter
        ever drove at once, and their places; O(P) where each drives few units, ``B·H·P`` at worst.

    Source:
        Murray (2019), "Local online learning in recurrent networks with random feedback", eLife 8:e43299, the
        recursion of the eligibility trace.

    Example:
        >>> import torch, rtrl
        >>> from rtrl.learners import RFLO
        >>> learner = RFLO(rtrl.cells.from_torch(torch.nn.RNNCell(3, 4)), batch_size=2, leak=0.1)
        >>> for _ in range(5):
        ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
        >>> learner.sync()
    """

    def __init__(self, cell: nn.Module, batch_size: int, leak: float, *, state: Tensor | None = None) -> None:
        self.leak = validation.fraction("leak", leak)
        super().__init__(cell, batch_size, state=state)

    def _arguments(self) -> dict[str, Any]:
        return {"leak": self.leak}

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        self._seen(immediate)
        return ((1 - self.leak) * self._carried[0] + self._inside(immediate),)
