"""How the oracles call a cell and check what they are given; no derivative is taken here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

LossFn = Callable[[int, Any], Tensor | None]
Offsets = Sequence[Mapping[str, Tensor]]


def trainable(cell: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the parameters that require a gradient, by name; ValueError if there are none or not real."""
    theta = {name: p.detach().clone() for name, p in cell.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError("the cell has no parameter that requires a gradient")
    for name, p in theta.items():
        if not p.is_floating_point():
            raise ValueError(f"parameter {name!r} has dtype {p.dtype}; the oracles differentiate real parameters only")
    return theta


def initial(cell: nn.Module, xs: Tensor, h0: Tensor | None) -> Tensor:
    """The constant first state (B, ...): `h0`, or `cell.init_state(B)`; ValueError on a wrong `xs` or state."""
    if not isinstance(xs, Tensor) or xs.dim() < 2 or xs.shape[0] < 1 or xs.shape[1] < 1:
        raise ValueError("xs must be a tensor of shape (T, B, ...) with T >= 1 and B >= 1")
    batch = xs.shape[1]
    h = cell.init_state(batch) if h0 is None else h0  # type: ignore[operator]
    if not isinstance(h, Tensor) or h.dim() < 2 or h.shape[0] != batch or not h.is_floating_point():
        raise ValueError(
            f"the state must be a real floating tensor of shape ({batch}, ...) with at least two dimensions"
        )
    return h.detach().clone()


def check_schedule(xs: Tensor, theta: Mapping[str, Tensor], resets: Tensor | None, offsets: Offsets | None) -> None:
    """ValueError unless `resets` is Boolean (T, B) and `offsets` has T dicts of tensors shaped like parameters."""
    steps, batch = xs.shape[:2]
    if resets is not None and (resets.dtype != torch.bool or tuple(resets.shape) != (steps, batch)):
        raise ValueError(f"resets must be a Boolean tensor of shape ({steps}, {batch})")
    if offsets is not None:
        if len(offsets) != steps:
            raise ValueError(f"offsets must have one dict for each of the {steps} steps, got {len(offsets)}")
        for t, offset in enumerate(offsets):
            for name, value in offset.items():
                if name not in theta:
                    raise ValueError(f"offsets[{t}] names {name!r}, which is not a trainable parameter of the cell")
                if value.shape != theta[name].shape:
                    raise ValueError(f"offsets[{t}][{name!r}] has shape {tuple(value.shape)}, not the parameter's")


def check_mask(mask: Mapping[str, Tensor] | None, theta: Mapping[str, Tensor], h: Tensor) -> None:
    """ValueError unless `mask` maps trainable parameters to Boolean (H, P) tensors."""
    for name, kept in ({} if mask is None else mask).items():
        if name not in theta:
            raise ValueError(f"mask names {name!r}, which is not a trainable parameter of the cell")
        shape = (h[0].numel(), theta[name].numel())
        if kept.dtype != torch.bool or tuple(kept.shape) != shape:
            raise ValueError(f"mask[{name!r}] must be Boolean {shape}, got {kept.dtype} {tuple(kept.shape)}")


def shifted(theta: Mapping[str, Tensor], offsets: Offsets | None, t: int) -> dict[str, Tensor]:
    """The parameters of step t: θ + offsets[t], a name without an offset being left alone."""
    constant: Mapping[str, Tensor] = {} if offsets is None else offsets[t]
    return {name: p + constant[name].detach() if name in constant else p for name, p in theta.items()}


def restarted(cell: nn.Module, h: Tensor, resets: Tensor | None, t: int) -> Tensor:
    """The state step t receives: samples marked in `resets[t]` start again from `cell.init_state`, a constant."""
    if resets is None or not bool(resets[t].any()):
        return h
    fresh: Tensor = cell.init_state(h.shape[0])  # type: ignore[operator]
    return torch.where(resets[t].reshape(-1, *[1] * (h.dim() - 1)), fresh.detach().to(h.dtype), h)


def call(cell: nn.Module, theta: Mapping[str, Tensor], x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
    """`(y, h_next)` of one forward of the cell at parameters `theta`; a third item returned by the cell is ignored."""
    names = {id(p): name for name, p in cell.named_parameters()}
    everywhere = {  # a weight may be held by several modules, and a module under several names: each place once
        full: theta[names[id(p)]]
        for prefix, module in cell.named_modules()
        for full, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False)
        if names[id(p)] in theta
    }
    out = functional_call(cell, everywhere, (x.detach(), h), tie_weights=False)
    if not isinstance(out, tuple) or len(out) not in (2, 3):
        raise ValueError("the cell must return (y, h_next) or (y, h_next, sparsity)")
    if not isinstance(out[1], Tensor) or out[1].shape != h.shape:
        raise ValueError(f"the cell must return a next state of the shape {tuple(h.shape)} it was given")
    return out[0], out[1]


def scalar_loss(loss_fn: LossFn, t: int, y: Any) -> Tensor | None:
    """The loss of step t as a tensor without dimensions, or None; ValueError for anything else."""
    loss = loss_fn(t, y)
    if loss is None:
        return None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar tensor or None, at step {t} it did not")
    return loss.reshape(())
