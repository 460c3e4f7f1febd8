"""Gated cells whose recurrence is element by element, so that the units of the state are independent rows."""

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.cells.row_groups import rows_of


class _Elementwise(nn.Module):
    """The base of cells with a state (B, hidden) in which no unit sees another one.

    Args:
        d_in: width of the input.
        hidden: number of units.
        gates: linear maps of the input per unit, all in one weight.
    """

    def __init__(self, d_in: int, hidden: int, gates: int) -> None:
        super().__init__()
        self.d_in, self.hidden = validation.integer("d_in", d_in), validation.integer("hidden", hidden)
        self.gates = nn.Linear(d_in, gates * hidden)

    def init_state(self, batch_size: int) -> Tensor:
        """Return zeros (batch_size, hidden).

        Raises:
            ConfigError: ``batch_size`` is not a positive integer.
        """
        return self.gates.weight.new_zeros(validation.integer("batch_size", batch_size), self.hidden)

    def row_groups(self) -> list[Tensor]:
        """Return one group of ``hidden`` independent rows; see ``rtrl.cells.row_groups``."""
        return rows_of(self.hidden, 1)


class MinGRU(_Elementwise):
    """Build the minimal GRU, in the sequential form that needs no logarithms.

    Equation:
        ``h' = (1 − z) ⊙ h + z ⊙ h̃`` with ``z = σ(W_z x + b_z)`` and ``h̃ = W_h x + b_h``; with ``positive``,
        ``h̃ = g(W_h x + b_h)`` with ``g(a) = a + ½`` for a ≥ 0 and ``σ(a)`` below. The output is h'.

    Args:
        d_in: width of the input.
        hidden: number of units, and width of the output.
        positive: keep the state positive, as the paper's version for training in log space does.

    Attributes:
        gates: W_z above W_h, (2·hidden, d_in), and their biases.

    Raises:
        ConfigError: a size is not a positive integer.

    Cost:
        2·hidden·d_in multiply-adds per sample.

    Source:
        Feng et al. (2024), "Were RNNs All We Needed?", section 3.1; g: appendix B, the version for log space.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.MinGRU(3, 5)
        >>> y, h = cell(torch.ones(2, 3), cell.init_state(2))
        >>> y.shape, h.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(self, d_in: int, hidden: int, *, positive: bool = False) -> None:
        super().__init__(d_in, hidden, 2)
        self.positive = bool(positive)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step; the output is the next state."""
        gate, candidate = self.gates(x).chunk(2, dim=-1)
        if self.positive:
            candidate = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        h = torch.lerp(h, candidate, torch.sigmoid(gate))
        return h, h


class ElementwiseLSTM(_Elementwise):
    """Build the element-wise LSTM (eLSTM): an LSTM whose recurrence is a product with a vector for each gate.

    Equation:
        ``c' = f ⊙ c + (1 − f) ⊙ z`` with ``f = σ(F x + w_f ⊙ c + b_f)`` and ``z = tanh(Z x + w_z ⊙ c + b_z)``. The
        output is ``o ⊙ c'`` with ``o = σ(O x + W_o c' + b_o)``, where W_o is a full matrix, outside the recurrence.

    Args:
        d_in: width of the input.
        hidden: number of units, and width of the output.
        output_gate: False leaves o out, so that the output is c'.

    Attributes:
        gates: F above Z above O, (3·hidden, d_in), and their biases; without O if there is no output gate.
        forget_recurrent: w_f.
        candidate_recurrent: w_z.
        output_recurrent: W_o, if there is an output gate.

    Raises:
        ConfigError: a size is not a positive integer.

    Cost:
        3·hidden·d_in + hidden² multiply-adds per sample, 2·hidden·d_in without an output gate.

    Source:
        Irie, Gopalakrishnan and Schmidhuber (2024), "Exploring the Promise and Limits of Real-Time Recurrent Learning",
        ICLR, section 3.2.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.ElementwiseLSTM(3, 5)
        >>> y, c = cell(torch.ones(2, 3), cell.init_state(2))
        >>> y.shape, c.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(self, d_in: int, hidden: int, *, output_gate: bool = True) -> None:
        super().__init__(d_in, hidden, 3 if output_gate else 2)
        self.forget_recurrent = nn.Parameter(torch.empty(hidden))
        self.candidate_recurrent = nn.Parameter(torch.empty(hidden))
        self.output_recurrent = nn.Linear(hidden, hidden, bias=False) if output_gate else None
        with torch.no_grad():
            self.forget_recurrent.normal_(0.0, 0.1)
            self.candidate_recurrent.normal_(0.0, 0.1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step from the cell state h."""
        forget, new, *out = self.gates(x).split(self.hidden, dim=-1)
        forget = torch.sigmoid(torch.addcmul(forget, self.forget_recurrent, h))
        new = torch.tanh(torch.addcmul(new, self.candidate_recurrent, h))
        c = torch.lerp(new, h, forget)
        if self.output_recurrent is None:
            return c, c
        return torch.sigmoid(out[0] + self.output_recurrent(c)) * c, c
