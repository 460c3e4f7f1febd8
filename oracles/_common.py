"""How the oracles call a cell and check what they are given; no derivative is taken here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[int, Any], Tensor | None]
Offsets = Sequence[Mapping[str, Tensor]]


def first_state(cell: nn.Module, xs: Tensor, h0: Tensor | None) -> Tensor:
    """The first state (B, ...): `h0`, a constant, or `cell.init_state(B)`, which may depend on the parameters.

    ValueError on a wrong `xs`, `h0` or state.
    """
    if not isinstance(xs, Tensor) or xs.dim() < 2 or xs.shape[0] < 1 or xs.shape[1] < 1:
        raise ValueError("xs must be a tensor of shape (T, B, ...) with T >= 1 and B >= 1")
    batch = xs.shape[1]
    h = cell.init_state(batch) if h0 is None else h0  # type: ignore[operator]
    numbers = isinstance(h, Tensor) and (h.is_floating_point() or h.is_complex())
    if not numbers or h.dim() < 2 or h.shape[0] != batch:
        raise ValueError(
            f"the state must be a floating or complex tensor of shape ({batch}, ...) with at least two dimensions"
        )
    if h0 is not None and h0.requires_grad:
        raise ValueError(
            "h0 requires a gradient, but it is taken as a constant: pass h0.detach(), or return a learned first state "
            "from cell.init_state"
        )
    return h.clone()


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
        shape = (pairs(h)[0].numel(), pairs(theta[name]).numel())
        if kept.dtype != torch.bool or tuple(kept.shape) != shape:
            raise ValueError(f"mask[{name!r}] must be Boolean {shape}, got {kept.dtype} {tuple(kept.shape)}")


def restarted(cell: nn.Module, h: Tensor, resets: Tensor | None, t: int) -> Tensor:
    """The state that step t receives: the samples marked in `resets[t]` start again from `cell.init_state`."""
    if resets is None or not bool(resets[t].any()):
        return h
    fresh: Tensor = cell.init_state(h.shape[0])  # type: ignore[operator]
    return torch.where(resets[t].reshape(-1, *[1] * (h.dim() - 1)), fresh.to(h.dtype), h)


def call(cell: nn.Module, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
    """`(y, h_next)` of one plain call of the cell; a third item that it returns is ignored."""
    out = cell(x.detach(), h)
    if not isinstance(out, tuple) or len(out) not in (2, 3):
        raise ValueError("the cell must return (y, h_next) or (y, h_next, sparsity)")
    if not isinstance(out[1], Tensor) or out[1].shape != h.shape:
        raise ValueError(f"the cell must return a next state of the shape {tuple(h.shape)} it was given")
    return out[0], out[1]


def check_no_state_hook(h: Tensor) -> None:
    """ValueError if a step has put a gradient hook on the state that it received."""
    if h._backward_hooks:
        raise ValueError(
            "the cell puts a gradient hook on the state that it receives, which steps taken one at a time cannot "
            "represent; use oracles.bptt without offsets"
        )


def scalar_loss(loss_fn: LossFn, t: int, y: Any) -> Tensor | None:
    """The loss of step t as a tensor without dimensions, or None; ValueError for anything else."""
    loss = loss_fn(t, y)
    if loss is None:
        return None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar tensor or None, at step {t} it did not")
    return loss.reshape(())


def pairs(value: Tensor) -> Tensor:
    """A complex tensor as a real one with the real and the imaginary part in a last dimension; a real one itself."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def dense(gradient: Tensor) -> Tensor:
    """A gradient that may be sparse, as nn.Embedding(sparse=True) gives it, as a dense tensor.

    Not by `to_dense`, which returns zero for a single number whose stride is 0 (PyTorch 2.13).
    """
    if gradient.layout is torch.strided:
        return gradient
    zeros = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    return zeros.index_put(tuple(gradient._indices()), gradient._values(), accumulate=True)
