"""Linear chains in which a parameter soon pushes the output up, and later pulls it down further."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Chains:
    """The sizes of ``BalancingCell``.

    Attributes:
        count: the number of chains, each with one parameter and one output.
        up: the units at the head of a chain that the parameter pushes up.
        between: the units behind them that it does not push at all.
        down: the units at the end of the chain that it pushes down.
    """

    count: int
    up: int
    between: int
    down: int

    @property
    def length(self) -> int:
        """The number of units of one chain."""
        return self.up + self.between + self.down


class BalancingCell(nn.Module):
    """Chains of units, each of which is half its own last value and half that of the unit behind it.

    Equation:
        ``s'_i = s_i / 2 + s_{i+1} / 2 + p_i θ`` along each chain, with ``p_i`` 1 at its head, −1 at its end and 0
        between. The output is the first unit of ``s'`` of every chain. At rest it is ``2 (up − down) θ``, although the
        units that see θ first push it the other way.

    Args:
        chains: the sizes; ``Chains(1, 10, 0, 13)`` is the system of the source.
        dtype: of the parameters and the state.

    Attributes:
        theta: θ, (chains,).
        push: p, (units of a chain,).

    Source:
        Tallec and Ollivier (2017), "Unbiased Online Recurrent Optimization", the experiment on influence balancing.
    """

    push: Tensor

    def __init__(self, chains: Chains, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.chains = chains
        self.theta = nn.Parameter(torch.full((chains.count,), 0.5, dtype=dtype))
        signs = [1.0] * chains.up + [0.0] * chains.between + [-1.0] * chains.down
        self.register_buffer("push", torch.tensor(signs, dtype=dtype))

    def init_state(self, batch_size: int) -> Tensor:
        """Return ones (batch_size, chains · units of a chain)."""
        return torch.ones(batch_size, self.chains.count * self.chains.length, dtype=self.theta.dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step; x is not used."""
        s = h.unflatten(1, (self.chains.count, self.chains.length))
        behind = nn.functional.pad(s[:, :, 1:], (0, 1))
        s = (s + behind) / 2 + self.theta[:, None] * self.push
        return s[:, :, 0], s.flatten(1)
