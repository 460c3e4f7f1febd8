"""Running a learner over a stream, with everything that may happen to it on the way."""

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rtrl
from rtrl.testing.driver import Driver, trainable

__all__ = ["Loss", "Result", "gradients", "live_tensor_bytes", "run", "trainable"]

Loss = Callable[[int, Any], Tensor | None]


@dataclass(frozen=True)
class Result:
    """Gradients (summed over all syncs), influences and the state, all after the last step."""

    gradients: dict[str, Tensor]
    influences: dict[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None


class _Driver(Driver):
    """Resets all samples without a mask."""

    def reset(self, samples: Tensor | None) -> None:
        super().reset(None if samples is not None and bool(samples.all()) else samples)


def gradients(cell: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter's gradient, zero where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trainable(cell).items()}


def run(
    cell: nn.Module,
    xs: Sequence[Any],
    loss_fn: Loss,
    *,
    syncs: Mapping[int, bool] | None = None,
    resets: Tensor | None = None,
    offsets: Sequence[Mapping[str, Tensor]] | None = None,
    saves: Collection[int] = (),
    influences: bool = True,
    make: Callable[..., rtrl.BlockRTRL] = rtrl.BlockRTRL,
    batch_size: int | None = None,
    h0: Tensor | None = None,
    **options: Any,
) -> Result:
    """Run a learner on the cell itself, and return its results; the cell is as before afterwards.

    Args:
        syncs: step → ``dormant``: sync after that step. The other arguments are those of ``Driver.along``.
    """
    base = {name: p.detach().clone() for name, p in trainable(cell).items()}
    cell.zero_grad()
    driver = _Driver(
        lambda cell, batch: make(cell, batch, state=h0, **options),
        cell,
        len(xs[0]) if batch_size is None else batch_size,
    )
    driver.run(xs, loss_fn, syncs=syncs or {}, resets=resets, offsets=offsets, saves=saves)
    driver.sync()
    result = Result(driver.gradients(), driver.influences() if influences else {}, driver.state)
    with torch.no_grad():
        for name, p in trainable(cell).items():
            p.copy_(base[name])
            p.grad = None
    return result


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach: what the learner holds, whatever it says."""
    gc.collect()
    seen: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter):  # isinstance would wake lazy modules; a lazy parameter has no storage
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
