"""Running a learner over a stream, with everything that may happen to it on the way."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rtrl

Loss = Callable[[int, Any], Tensor | None]


@dataclass(frozen=True)
class Result:
    """Gradients (summed over all deliveries), influences and the state, all after the last step."""

    gradients: dict[str, Tensor]
    influences: dict[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None


def trainable(cell: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in cell.named_parameters() if p.requires_grad}


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
    """Run a learner and hand out what it found.

    Args:
        syncs: step → ``dormant``: sync after that step. resets: Boolean (T, B), before the step.
        offsets: a dict of constants a step; the parameters are changed to ``θ + offsets[t]`` after a sync wherever
            they differ from the last.
        saves: steps after which the learner is saved and a new one goes on from there.
    """
    batch_size = len(xs[0]) if batch_size is None else batch_size
    parameters = trainable(cell)
    base = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    learner = make(cell, batch_size, state=h0, **options)
    for t, x in enumerate(xs):
        if offsets is not None and (t == 0 or offsets[t] is not offsets[t - 1]):
            learner.sync(dormant=t % 2 == 0)
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(base[name] + offsets[t].get(name, 0.0))
        if resets is not None and bool(resets[t].any()):
            learner.reset(None if bool(resets[t].all()) else resets[t])
        y = learner.step(x)
        loss = loss_fn(t, y)
        if loss is not None:
            learner.backward(loss)
        if syncs is not None and t in syncs:
            learner.sync(dormant=syncs[t])
        if t in saves:
            saved = learner.state_dict()
            learner = make(cell, batch_size, state=h0, **options)
            learner.load_state_dict(saved)
    learner.sync()
    found = gradients(cell)
    influence = {name: learner.influence(name) for name in parameters} if influences else {}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(base[name])
            p.grad = None
    return Result(found, influence, learner.state)
