"""Choose experts and slots, and measure and balance how evenly they are used."""

from typing import NamedTuple

import torch
from torch import Tensor

from rtrl.errors import ShapeError


class MoEOutput(NamedTuple):
    """The ``y`` of ``RecurrentMoE(..., router_output=True)``.

    Attributes:
        output: (B, d_out), the output itself.
        router_logits: (B, n_experts), of all experts.
        experts: LongTensor (B, topk), the experts selected.
    """

    output: Tensor
    router_logits: Tensor
    experts: Tensor


class RouterStatistics(NamedTuple):
    """Statistics of how evenly the samples of a batch use the experts.

    Attributes:
        load: (n_experts,), the fraction of all selections that each expert received; sums to 1.
        importance: (n_experts,), the mean router probability of each expert; sums to 1.
        entropy: scalar, nats: the mean entropy of the router's distribution.
        unused: the number of experts that no sample selected.
    """

    load: Tensor
    importance: Tensor
    entropy: Tensor
    unused: int


def top(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest scores along the last dimension, as a LongTensor (..., k)."""
    return scores.detach().topk(k, dim=-1).indices


def _expert_load(router_logits: Tensor, experts: Tensor) -> Tensor:
    if router_logits.ndim != 2 or experts.ndim != 2 or router_logits.shape[0] != experts.shape[0]:
        raise ShapeError(
            f"expected router_logits (B, E) and experts (B, k), got {tuple(router_logits.shape)} and "
            f"{tuple(experts.shape)}"
        )
    counts = torch.zeros(router_logits.shape[1], dtype=router_logits.dtype, device=router_logits.device)
    flat = experts.flatten()
    return counts.index_add(0, flat, torch.ones_like(flat, dtype=counts.dtype)) / max(flat.numel(), 1)


def load_balancing_loss(router_logits: Tensor, experts: Tensor) -> Tensor:
    """Compute the auxiliary loss that is smallest, 1, when all experts are used equally.

    Equation:
        ``E · Σ_e f_e P_e`` with f_e the fraction of selections that expert e received (no gradient) and P_e its mean
        probability.

    Args:
        router_logits: (B, E), floating point.
        experts: LongTensor (B, k), the experts selected.

    Returns:
        A scalar tensor, differentiable in ``router_logits``.

    Raises:
        ShapeError: the two do not fit; pass ``y.router_logits`` and ``y.experts`` of one step.

    Cost:
        O(B·E) multiply-adds.

    Source:
        Fedus, Zoph and Shazeer (2022), "Switch Transformers", equations 4–6.

    Example:
        >>> import torch
        >>> float(load_balancing_loss(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]])))
        1.0
    """
    load = _expert_load(router_logits, experts)
    return router_logits.shape[1] * (load * router_logits.softmax(dim=-1).mean(dim=0)).sum()


def router_statistics(router_logits: Tensor, experts: Tensor) -> RouterStatistics:
    """Compute load, importance, entropy and unused experts of a batch, without a gradient.

    Args:
        router_logits: (B, E), floating point.
        experts: LongTensor (B, k), the experts selected.

    Returns:
        The statistics.

    Raises:
        ShapeError: the two do not fit; pass ``y.router_logits`` and ``y.experts`` of one step.
    """
    logits = router_logits.detach()
    load = _expert_load(logits, experts)
    log_p = logits.log_softmax(dim=-1)
    return RouterStatistics(
        load=load,
        importance=log_p.exp().mean(dim=0),
        entropy=-(log_p.exp() * log_p).sum(dim=-1).mean(),
        unused=int((load == 0).sum()),
    )
