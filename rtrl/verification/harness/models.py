"""The cell that the claims are measured on."""

import torch

from rtrl.cells.moe import RecurrentMoE
from rtrl.errors import ConfigError

SLICED = ("router.weight", "expert_up", "expert_up_bias", "expert_down", "expert_down_bias", "slot_embedding")
INERT = ("out_query.weight", "out_key.weight", "out_value.weight", "out_mix.weight", "head.weight", "head.bias")
"""The parameters of the readout, which no later state depends on."""


def byte_model(seed: int, device: torch.device) -> RecurrentMoE:
    """A small mixture of experts that reads and predicts bytes, in float64."""
    return RecurrentMoE(
        256, 256, d_model=8, n_slots=4, n_experts=8, topk=2, read_slots=2, write_slots=1, expert_hidden=8, ffn_hidden=8,
        generator=torch.Generator().manual_seed(seed), dtype=torch.float64,
    ).to(device)  # fmt: skip


def usable_device(name: str) -> torch.device:
    """The device, tried out; ConfigError if it is not there or has no float64."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used in float64: {str(error).splitlines()[0]}") from error
    return device
