"""Hooks on parameters: they see a gradient once, when it is delivered, and never the learner's own derivatives.

``register_hook`` fires in every ``torch.autograd.grad`` for its tensor, ``register_post_accumulate_grad_hook`` in none.
So the first are suspended while steps are linearised, and both fire when a gradient is added to ``.grad``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def hooks_suspended(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let no hook of ``register_hook`` on these tensors fire."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def deliver(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Add gradients, by name, to the ``.grad`` of the parameters. The hooks of a parameter see its whole gradient.

    If a hook raises an error, every ``.grad`` is what it was before.
    """
    hooked = [name for name in gradients if has_hooks(parameters[name])]
    if hooked:
        with grads_restored_on_error(parameters.values()):
            # Copies: autograd may keep what it is given, and a hook may change it.
            torch.autograd.backward([parameters[name] for name in hooked], [gradients[name].clone() for name in hooked])
    for name, gradient in gradients.items():
        if name in hooked:
            continue
        parameter = parameters[name]
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


def accumulate_hooked(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Add the gradients of leaves with a hook of ``register_post_accumulate_grad_hook`` to their ``.grad``; those of
    ``register_hook`` have fired. Returns the gradients, those that were added replaced by None.

    If a hook raises an error, every ``.grad`` is what it was before.
    """
    if not any(leaf._post_accumulate_grad_hooks for leaf in leaves):
        return gradients
    hooked = [
        (leaf, gradient)
        for leaf, gradient in zip(leaves, gradients, strict=True)
        if leaf._post_accumulate_grad_hooks and gradient is not None
    ]
    if not hooked:
        return gradients
    with hooks_suspended(leaves), grads_restored_on_error(leaves):
        # Copies: what autograd returns may be a view, and it may keep what it is given.
        torch.autograd.backward([leaf for leaf, _ in hooked], [gradient.detach().clone() for _, gradient in hooked])
    return [
        None if leaf._post_accumulate_grad_hooks else gradient for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def has_hooks(tensor: Tensor) -> bool:
    """Whether a hook of either kind is registered on a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


@contextmanager
def grads_restored_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give every tensor its ``.grad`` back, the same tensor with the same values, if an error is raised."""
    before = [(tensor, tensor.grad, None if tensor.grad is None else tensor.grad.clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, grad, values in before:
            tensor.grad = grad
            if grad is not None and values is not None:
                grad.detach().copy_(values)
        raise
