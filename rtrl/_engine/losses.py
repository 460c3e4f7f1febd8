"""Losses on the leaves that a step returned: checked and added while its block is open, pulled back when it closes,
refused afterwards."""

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from rtrl._engine import checks, deferred, parameter_hooks
from rtrl._engine.recorded import RecordedStep, StepBatch
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl.errors import ConfigError, LossError, NonFiniteError


def add_loss(loss: Any, newest: RecordedStep | None, seen_losses: list["weakref.ref[Tensor]"], step: int) -> None:
    """Add the gradient of a loss of the newest step to the ``.grad`` of all leaves that it reaches.

    Args:
        loss: a scalar.
        newest: the step; None if no step is open. Its ``unchecked`` gets what is not known to be finite, because it
            lies on a device: the host does not wait for it.
        seen_losses: the losses that were added at this step; this one is appended.
        step: the step's number, for messages.

    Raises:
        LossError: see ``check_loss``; or autograd cannot differentiate the loss.
        Exception: what a hook raises. No ``.grad`` has changed.
        NonFiniteError: NaN or infinity in the loss or its gradient, on a CPU. No ``.grad`` has changed then.

    Cost: the loss's own backward pass.
    """
    outputs = [] if newest is None else newest.leaves
    leaves = check_loss(loss, outputs, seen_losses, step)
    assert newest is not None
    try:
        gradients = _gradients(loss, leaves)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise LossError(f"the loss of step {step} could not be pulled back: {error}") from error
    here = deferred.on_host(loss)
    if not here:
        others = [g for leaf, g in zip(leaves, gradients, strict=True) if g is not None and not _is_one(leaf, outputs)]
        newest.unchecked += [loss.detach(), *(gradient.detach().abs().sum() for gradient in others)]
    finite = not here or (len(gradients) > 1 and checks.all_finite([g for g in gradients if g is not None]))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if not finite and gradient is not None and not checks.finite(gradient):
            where = "y" if _is_one(leaf, outputs) else "a parameter"
            checks.check_finite(f"the gradient of the loss at {where}", gradient, step)
    seen = weakref.ref(loss)
    parameter_hooks.accumulate(leaves, gradients)
    newest.with_grad = _with_grad(outputs)
    seen_losses.append(seen)


def _with_grad(leaves: Sequence[Tensor]) -> int:
    """How many of the leaves have a gradient."""
    count = 0
    for leaf in leaves:
        if leaf.grad is not None:
            count += 1
    return count


def check_none_was_removed(steps: Iterable[RecordedStep]) -> None:
    """Refuse steps whose y has lost the ``.grad`` in which a loss was kept.

    Raises:
        LossError: naming the first of them.
    """
    for step in steps:
        if step.with_grad and _with_grad(step.leaves) < step.with_grad:
            raise LossError(
                f"a loss was added at step {step.number}, and then the .grad of its y was removed, where the loss is "
                "kept until the block closes. Put it back, or give the block up by reset(discard=True); leave y.grad "
                "alone"
            )


def _is_one(leaf: Tensor, outputs: Sequence[Tensor]) -> bool:
    return any(leaf is output for output in outputs)


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """``torch.autograd.grad(loss, leaves, allow_unused=True)`` without its own argument checks, which take 5 % of a
    step and ``backward`` at H = 32."""
    if not loss.is_floating_point():
        return torch.autograd.grad(loss, leaves, allow_unused=True)  # it raises, and says why
    ones = torch.ones_like(loss)
    return _engine_run_backward((loss,), (ones,), False, False, tuple(leaves), True, accumulate_grad=False)


def check_loss(loss: Any, outputs: list[Tensor], seen_losses: list["weakref.ref[Tensor]"], step: int) -> list[Tensor]:
    """The leaves that a loss of the newest step reaches.

    Raises:
        LossError: it is not a scalar tensor with a graph, does not depend on this step's y, or was added before.
        NonFiniteError: NaN or infinity in the loss, on a CPU.
    """
    if not isinstance(loss, Tensor):
        raise LossError(f"a loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise LossError(f"a loss must be a scalar, got shape {tuple(loss.shape)}; reduce it with .sum() or .mean()")
    if not outputs:
        raise LossError(
            "there is no step that can take a loss: call step() first, and add its losses before sync(), reset() or "
            "influence()"
        )
    if loss.device != outputs[0].device:
        raise LossError(f"the loss is on {loss.device}, y on {outputs[0].device}")
    if seen_losses and any(ref() is loss for ref in seen_losses):
        raise LossError(f"this loss was already added at step {step}; compute it again if it is to count twice")
    reached = checks.reached_leaves(loss) if loss.requires_grad else {}
    if reached.keys().isdisjoint(map(id, outputs)):
        raise LossError(
            f"the loss does not depend on the y of step {step}; compute it from what the last step() returned, "
            "without detaching it"
        )
    if deferred.on_host(loss):
        checks.check_finite("the loss", loss, step)
    return list(reached.values())


def close_leaves(leaves: Iterable[tuple[Tensor, int]]) -> None:
    """Make a backward pass into the leaves of closed steps fail; its gradients would be lost without a word.

    Args:
        leaves: the leaves, and the numbers of their steps.
    """
    for leaf, step in leaves:
        if leaf._backward_hooks is None:
            leaf._backward_hooks = OrderedDict({-1: partial(_refuse, step)})  # register_hook takes longer
        else:
            leaf.register_hook(partial(_refuse, step))


def check_no_feedback(sources: Sequence[Tensor], open_steps: Iterable[RecordedStep], step: int) -> None:
    """Refuse an x that is to get a gradient and was computed from a y, whose own gradient would lack a part.

    Raises:
        ConfigError: naming the step.
    """
    outputs = {id(leaf) for open_step in open_steps for leaf in open_step.leaves}
    for leaf in checks.reached_leaves(*(source for source in sources if source.requires_grad)).values():
        if id(leaf) in outputs or is_closed(leaf):
            raise ConfigError(
                f"step {step}: x depends on the y of an earlier step, whose gradient cannot go through x. Detach that "
                "y, or keep what is fed back in the state of the cell, where its gradient is exact"
            )


def is_closed(leaf: Tensor) -> bool:
    """Whether a leaf is the y of a step whose block has closed."""
    hooks = (leaf._backward_hooks or {}).values()
    return any(isinstance(hook, partial) and hook.func is _refuse for hook in hooks)


def _refuse(step: int, gradient: Tensor) -> None:
    raise LossError(f"a loss reaches the y of step {step}, whose block has closed; add losses before the block closes")


def loss_cotangents(
    batch: StepBatch, outputs: Sequence[Tensor], inputs: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Pull the gradients of the losses at y back to tensors of a batch of steps, and to parameters.

    Args:
        batch: the steps, with what losses left at their outputs.
        outputs: the floating-point tensors of y of the batch, run again with a graph.
        inputs: the tensors to pull back to.
        parameters: name → parameter to pull back to.

    Returns:
        ``∂ℓ/∂input`` of each input, None where no loss reaches it; and name → gradient, of parameters that a loss
        reaches.

    Raises:
        NonFiniteError: NaN or infinity in a gradient at y or of a parameter.
    """
    heads, weights = [], []
    for place, head in enumerate(outputs):
        weight = batch.grad(place)
        if weight is None:
            continue
        if not checks.finite(weight):
            for step, grad in zip(batch.steps, batch.by_step(weight).unbind(dim=1), strict=True):
                checks.check_finite("the gradient of the loss at y", grad, step.number)
        if head.requires_grad:
            heads.append(head)
            weights.append(weight)
    if not heads:
        return [None] * len(inputs), {}
    targets = [*inputs, *parameters.values()]
    cotangents = torch.autograd.grad(heads, targets, weights, retain_graph=True, allow_unused=True)
    at_inputs, at_parameters = cotangents[: len(inputs)], cotangents[len(inputs) :]
    gradients = {name: grad for name, grad in zip(parameters, at_parameters, strict=True) if grad is not None}
    for name, grad in gradients.items():
        if not checks.finite(grad):
            raise NonFiniteError(f"{batch.span}: NaN or infinity in the gradient of parameter {name!r}")
    return list(at_inputs), gradients
