"""A recurrent mixture that can count: its experts are the gates of an LSTM, and what a slot holds is not bounded."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.cells.grouped_linear import grouped_linear
from rtrl.cells.protocol import Sparsity
from rtrl.cells.routing import top


class CountingMixture(nn.Module):
    """Build a mixture whose experts give the gates of few slots.

    ``RecurrentMoE`` moves a slot a part of the way to a bounded candidate, so that what it holds stays within (−1, 1).
    Here a slot adds up, as an LSTM does, and can hold a number of any size.

    Equation:
        ``z_s = tanh(h_s) + embedding_s`` for the slots read, ``(i, f, g) = Σ_e share_e (W_e [x, z_s] + b_e)`` over the
        experts used, ``h'_s = σ(f) h_s + σ(i) tanh(g)``, ``y = head(Σ_s weight_s tanh(h'_s))``.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        d_model: width of a slot.
        n_slots: rows of the state (B, n_slots, d_model).
        n_experts: how many experts there are.
        topk: how many experts each sample uses per step.
        read_slots: how many slots each sample reads, and writes, per step.
        generator: source of the initial weights.
        dtype: of the parameters.

    Source:
        Gers and Schmidhuber (2001), IEEE Transactions on Neural Networks 12(6): LSTM counts.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_model: int = 8,
        n_slots: int = 4,
        n_experts: int = 4,
        topk: int = 2,
        read_slots: int = 2,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.n_slots, self.topk, self.read_slots = d_model, n_slots, topk, read_slots
        self.query = nn.Linear(d_in, d_model, dtype=dtype)
        self.router = nn.Linear(d_in + d_model, n_experts, bias=False, dtype=dtype)
        self.slot_embedding = nn.Parameter(torch.empty(n_slots, d_model, dtype=dtype))
        self.expert = nn.Parameter(torch.empty(n_experts, 3 * d_model, d_in + d_model, dtype=dtype))
        self.expert_bias = nn.Parameter(torch.zeros(n_experts, 3 * d_model, dtype=dtype))
        self.head = nn.Linear(d_model, d_out, dtype=dtype)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
                else:
                    std = {"slot_embedding": 0.5, "query.weight": 1.0}.get(name, 1 / math.sqrt(p.shape[-1]))
                    p.normal_(0.0, std, generator=generator)
            self.expert_bias[:, d_model : 2 * d_model] = 2.0  # a slot begins by keeping what it holds

    def init_state(self, batch_size: int) -> Tensor:
        """Return the first state, zeros (batch_size, n_slots, d_model)."""
        return self.slot_embedding.new_zeros(batch_size, self.n_slots, self.d_model)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> tuple[Tensor, Tensor, Sparsity]:
        """Take one step; ``replay`` forces the choices of another one."""
        query = self.query(x)
        if replay is None:
            with torch.no_grad():  # a choice has no gradient
                reads = top(torch.einsum("bd,bnd->bn", query, h.tanh() + self.slot_embedding), self.read_slots)
        else:
            assert replay.reads is not None
            reads = replay.reads
        index = reads.unsqueeze(-1).expand(-1, -1, self.d_model)
        old = h.gather(1, index)
        z = old.tanh() + F.embedding(reads, self.slot_embedding)
        weights = (torch.einsum("bd,brd->br", query, z) / math.sqrt(self.d_model)).softmax(dim=-1).unsqueeze(-1)
        logits = self.router(torch.cat([x, (weights * z).sum(dim=1)], dim=-1))
        experts = top(logits, self.topk) if replay is None else replay.active["expert"]
        share = logits.gather(1, experts).softmax(dim=-1)
        inputs = torch.cat([x.unsqueeze(1).expand(-1, z.shape[1], -1), z], dim=-1)
        gates = grouped_linear(inputs.unsqueeze(1), self.expert, self.expert_bias, experts)
        keep_in, keep, candidate = (share[:, :, None, None] * gates).sum(dim=1).chunk(3, dim=-1)
        written = keep.sigmoid() * old + keep_in.sigmoid() * candidate.tanh()
        y = self.head(len(reads[0]) * (weights * written.tanh()).sum(dim=1))
        sliced = {"expert": experts, "expert_bias": experts, "router.weight": experts, "slot_embedding": reads}
        return y, h.scatter(1, index, written), Sparsity(reads, reads, sliced)
