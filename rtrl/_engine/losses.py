"""Losses given at the leaves that a step handed out: taken in while its block is open, refused afterwards."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils.weak import TensorWeakRef

from rtrl._engine import checks
from rtrl._utils import pytrees
from rtrl.errors import LossError


def give(loss: Any, outputs: list[Tensor], given: list["weakref.ref[Tensor]"], number: int) -> None:
    """Add the gradient of a loss of step ``number`` to the ``.grad`` of all leaves that it reaches.

    Args:
        loss: a scalar. outputs: the leaves of the step's y. given: the losses that the step got; this one is added.

    Raises:
        LossError, NonFiniteError: see ``BlockRTRL.backward``. No ``.grad`` has changed then.

    Cost: the loss's own backward pass.
    """
    leaves = checks.check_loss(loss, outputs, given, number)
    try:
        gradients = _pull_back(loss, leaves)
    except RuntimeError as error:
        raise LossError(f"the loss of step {number} could not be pulled back: {error}") from error
    finite = len(gradients) > 1 and pytrees.all_finite([gradient for gradient in gradients if gradient is not None])
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if not finite and gradient is not None and not pytrees.finite(gradient):
            where = "y" if any(leaf is output for output in outputs) else "a parameter"
            checks.check_finite(f"the gradient of the loss at {where}", gradient, number)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            # A tensor of its own: what the engine returns may be a view, or an expanded scalar.
            leaf.grad = gradient.detach().clone() if leaf.grad is None else (leaf.grad + gradient).detach()
    given.append(weakref.ref(loss))


def _pull_back(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """``torch.autograd.grad(loss, leaves, allow_unused=True)`` without what that does around the engine, which for a
    small loss takes as long as the engine itself."""
    if not loss.is_floating_point():
        return torch.autograd.grad(loss, leaves, allow_unused=True)  # which says why not
    ones = torch.ones_like(loss)
    return _engine_run_backward((loss,), (ones,), False, False, tuple(leaves), True, accumulate_grad=False)


def refuse(left: Iterable[tuple[TensorWeakRef, int]]) -> None:
    """Make a backward pass into leaves of closed steps fail, where it would be lost in silence.

    Args:
        left: leaves by weak references, so that those are passed over which nobody can reach any more; and their steps.
    """
    for reference, number in left:
        leaf = reference()
        if leaf is not None:
            checks.refuse_when_closed(leaf, number)
