"""Real-time recurrent learning as in the textbook."""

from torch import Tensor

from rtrl.learners.influence_learner import InfluenceLearner


class DenseRTRL(InfluenceLearner):
    """The whole influence, carried forward by the whole Jacobians at every step.

    Equation: ``S_{t+1} = J_t S_t + B_t``, ``S_0 = 0``; ``dL/dθ = Σ_t ( ∂ℓ_t/∂θ + δ_t S_t )``.

    Law: exact, whatever the stream, the losses, the resets and the deliveries.

    Args:
        cell: ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``, with P trainable numbers.
        batch_size: B. state: the first state (B, n, ...) with H entries a sample; ``cell.init_state(B)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost: ``B·H²·P`` multiply-adds a step and ``B·(H + 1)`` backward passes through a step; ``B·H·P`` numbers held.

    Source: Williams and Zipser (1989), Neural Computation 1(2), the recursion for p_ij^k.

    >>> import torch, rtrl
    >>> from rtrl.learners import DenseRTRL
    >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4))
    >>> learner = DenseRTRL(cell, batch_size=2)
    >>> for _ in range(5):
    ...     learner.backward(learner.step(torch.ones(2, 3)).square().sum())
    >>> learner.sync()
    >>> learner.influence("cell.weight_hh").shape
    torch.Size([2, 4, 48])
    """

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return (dynamics @ self._carried[0] + immediate,)
