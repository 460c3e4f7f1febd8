"""The parameters of the user's own module, changed in their own memory for a while and put back; no derivative here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Values = Mapping[str, Tensor]


def trainable(cell: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name; ValueError if there are none, or one is lazy."""
    theta = {name: p for name, p in cell.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError("the cell has no parameter that requires a gradient")
    for name, p in theta.items():
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} has no values yet; run one step of the cell first")
    return dict(theta)


@contextmanager
def in_place(cell: nn.Module, theta: Values, moves: bool = True) -> Iterator[Callable[[Values], None]]:
    """Yield `move(offsets)`, which gives each parameter the value that it had, plus its offset.

    It writes to the parameters' own memory, so that a parameter is reached however the cell holds it: in a list, a dict
    or a closure, through a parametrization or a hook. Autograd does not see the writing, so a graph that was made at
    some offsets must be differentiated while they are in force. The hooks of the parameters are off meanwhile. At the
    end, also after an exception, values (bit for bit) and hooks are put back. With `moves` False no offset will come.
    """
    if moves:
        _check_memory(cell, theta)
    values = {name: p.detach().clone() for name, p in theta.items()}
    hooks = {name: p._backward_hooks for name, p in theta.items()}
    moved: set[str] = set()

    def move(offsets: Values) -> None:
        for name in [*(n for n in moved if n not in offsets), *offsets]:
            theta[name].data.copy_(values[name] + offsets[name].detach() if name in offsets else values[name])
        moved.update(offsets)

    try:
        for p in theta.values():
            p._backward_hooks = None
        yield move
    finally:
        for name, p in theta.items():
            p._backward_hooks = hooks[name]
            if name in moved:
                p.data.copy_(values[name])


@contextmanager
def complex_numbers(cell: nn.Module) -> Iterator[Callable[[Values], None]]:
    """Make all real parameters and buffers complex for a while; yield `move(offsets)`, as `in_place` does."""
    theta = dict(cell.named_parameters())
    real = [(t, t.data) for t in [*theta.values(), *cell.buffers()] if t.is_floating_point()]
    values = {name: p.detach().to(torch.complex128) for name, p in theta.items() if p.is_floating_point()}

    def move(offsets: Values) -> None:
        for name, value in values.items():
            theta[name].data = value + offsets[name].detach() if name in offsets else value

    try:
        for t, data in real:
            t.data = data.to(torch.complex128)
        yield move
    finally:
        for t, data in real:
            t.data = data


def through_hooks(theta: Values, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients as `backward` delivers them: each has passed once, whole, through its parameter's hooks."""
    delivered = dict(gradients)
    for name, p in theta.items():
        for hook in (p._backward_hooks or {}).values():
            changed = hook(delivered[name])
            delivered[name] = delivered[name] if changed is None else changed
    return delivered


def _check_memory(cell: nn.Module, theta: Values) -> None:
    """ValueError if writing to a parameter would also change another parameter, a buffer, or itself twice."""
    spans = []
    for name, t in [*cell.named_parameters(), *cell.named_buffers()]:
        if is_lazy(t) or t.layout is not torch.strided or not t.numel():
            continue
        if name in theta and any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"parameter {name!r} is an expanded tensor; make it a tensor of its own with .clone()")
        length = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + length * t.element_size(), name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end and (first in theta or second in theta):
            raise ValueError(
                f"{first!r} and {second!r} share memory, so that one cannot be changed without the other; "
                "tie them as one nn.Parameter, or give each its own tensor with .clone()"
            )
