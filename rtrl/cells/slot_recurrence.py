"""The recurrent part of a mixture whose slots keep to themselves: weights and experts of each slot, on its own row."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl.cells.grouped_linear import grouped_linear
from rtrl.cells.routing import top


class SlotRecurrence(nn.Module):
    """Build n slots, each with a gate and a bank of ``n_experts / n_slots`` experts; expert e belongs to slot
    ``e // bank``.

    Equation:
        For a written slot i with ``s = [x, h_i]``: ``h'_i = h_i + g ⊙ (c − h_i)``, ``g = σ(G_i s + b_i + a_i · x)``,
        ``c = tanh(Σ_e p_e D_e silu(U_e s + u_e) + d_e)`` over the selected experts of its bank, p the softmax of their
        router logits ``r_e · x``.

    Args:
        d_in: width of x.
        d_model: width of a slot.
        n_slots: number of slots.
        n_experts: number of experts, a multiple of ``n_slots``.
        expert_hidden: hidden width of an expert.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        bank: experts per slot.
    """

    def __init__(
        self,
        d_in: int,
        d_model: int,
        n_slots: int,
        n_experts: int,
        expert_hidden: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.n_slots, self.bank = n_slots, n_experts // n_slots

        def stacked(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.score = stacked(n_slots, 1, d_in)
        self.router = stacked(n_experts, 1, d_in)
        self.gate, self.gate_bias = stacked(n_slots, d_model, d_in + d_model), stacked(n_slots, d_model)
        self.expert_up = stacked(n_experts, expert_hidden, d_in + d_model)
        self.expert_up_bias = stacked(n_experts, expert_hidden)
        self.expert_down = stacked(n_experts, d_model, expert_hidden)
        self.expert_down_bias = stacked(n_experts, d_model)

    def logits(self, x: Tensor) -> Tensor:
        """Return the router logits of all experts, (B, n_experts)."""
        return F.linear(x, self.router.squeeze(1))

    def choose_writes(self, x: Tensor, reads: Tensor, count: int) -> Tensor:
        """Return the slots with the largest write scores among ``reads``, (B, count)."""
        with torch.no_grad():
            scores = F.linear(x, self.score.squeeze(1)).gather(1, reads)
        return reads.gather(1, top(scores, count))

    def choose_experts(self, x: Tensor, writes: Tensor, topk: int) -> Tensor:
        """Return the ``topk`` experts of each written slot, slot by slot, (B, w·topk)."""
        with torch.no_grad():
            banks = self.logits(x).unflatten(1, (self.n_slots, self.bank))
        of_slots = banks.gather(1, writes.unsqueeze(2).expand(-1, -1, self.bank))
        return (writes.unsqueeze(2) * self.bank + top(of_slots, topk)).flatten(1)

    def owned(self, writes: Tensor, experts: Tensor) -> bool:
        """Whether experts (B, w·k) belong to the written slots (B, w), slot by slot."""
        w = writes.shape[1]
        if not w or experts.shape[1] % w:
            return False
        return bool((experts.unflatten(1, (w, -1)) // self.bank == writes.unsqueeze(2)).all())

    def active(self, writes: Tensor, experts: Tensor, whole_router: bool) -> dict[str, Tensor]:
        """Return name → the slices that a step uses, (B, k)."""
        used = dict.fromkeys(("expert_up", "expert_up_bias", "expert_down", "expert_down_bias"), experts)
        every = torch.arange(len(self.router), device=experts.device).expand(len(experts), -1)
        used["router"] = every if whole_router else experts
        return used | dict.fromkeys(("score", "gate", "gate_bias"), writes)

    def forward(self, x: Tensor, old: Tensor, writes: Tensor, experts: Tensor) -> Tensor:
        """Return the written slots, (B, w, d_model).

        Args:
            x: (B, d_in).
            old: (B, w, d_model), their former contents.
            writes: (B, w).
            experts: (B, w·k), see ``choose_experts``.
        """
        w, k = writes.shape[1], experts.shape[1] // writes.shape[1]
        of_sample = x[:, None, None]
        source = torch.cat([x.unsqueeze(1).expand(-1, w, -1), old], dim=2)
        share = grouped_linear(of_sample, self.router, None, experts).view(len(x), w, k).softmax(dim=2)
        by_expert = source.repeat_interleave(k, dim=1).unsqueeze(2)
        hidden = F.silu(grouped_linear(by_expert, self.expert_up, self.expert_up_bias, experts))
        mixture = grouped_linear(hidden, self.expert_down, self.expert_down_bias, experts).view(len(x), w, k, -1)
        candidate = torch.tanh((share.unsqueeze(3) * mixture).sum(dim=2))
        score = grouped_linear(of_sample, self.score, None, writes).squeeze(2)
        gate = torch.sigmoid(grouped_linear(source.unsqueeze(2), self.gate, self.gate_bias, writes).squeeze(2) + score)
        return old + gate * (candidate - old)
