"""Name an influence that explodes before it overflows, at hardly any cost."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rtrl._engine import deferred
from rtrl._influence.store import ParameterInfluence
from rtrl.errors import NonFiniteError

LOOK_EVERY = 32
"""Blocks after which the influences are looked at in any case."""
STEEP = 2.0**20
"""A block that may make an influence as many times as large: the influences are looked at."""
SLACK = 2.0**24
"""How many times as large immediate influences may have made an influence since it was looked at."""


class ExplosionCheck:
    """How far influences are from overflow, as a bound that every block's Jacobian lowers.

    Equation:
        ``|S_t| ≤ ‖J‖_∞ |S_{t−1}| + |Σ C B|`` for the largest entries. The influences themselves are read where the
        product of the norms since the last look, times ``SLACK`` for what the blocks have added, could overflow.
    """

    def __init__(self) -> None:
        self._headroom, self._blocks = 0.0, 0

    def check(self, influences: Mapping[str, ParameterInfluence], jacobian: Tensor, span: str) -> None:
        """Refuse a block that may make an influence overflow; nothing of it has been changed yet.

        Args:
            influences: by parameter.
            jacobian: of the block, (B, W, W).
            span: the block, for messages.

        Raises:
            NonFiniteError: naming the parameter.

        Cost: a norm of the Jacobian; now and then a pass over the influences. On other devices than a CPU nothing.
        """
        if not deferred.on_host(jacobian) or not jacobian.numel():
            return
        growth = max(1.0, torch.linalg.matrix_norm(jacobian, torch.inf).max().item())
        self._headroom /= growth
        self._blocks += 1
        if self._headroom > SLACK and growth < STEEP and self._blocks < LOOK_EVERY:
            return
        most = torch.finfo(jacobian.dtype).max / 16
        held = {name: influence.values for name, influence in influences.items() if influence.values.numel()}
        sizes = torch.stack(torch._foreach_norm(list(held.values()))).tolist() if held else []  # no entry is larger
        for (name, values), size in zip(held.items(), sizes, strict=True):
            if size < most / growth:
                continue
            largest = values.abs().max().item()  # the norm may have overflowed
            if not largest < most / growth:
                raise NonFiniteError(
                    f"the influence of parameter {name!r} explodes: its entries are up to {largest:.1e} before {span}, "
                    f"which may make them {growth:.1e} times as large. The state's dynamics are unstable; clip or "
                    "decay the recurrent weights, or restart samples"
                )
        self._headroom, self._blocks = most / growth / max(1.0, *sizes, 0.0), 0
