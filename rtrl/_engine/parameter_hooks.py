"""Hooks on parameters: they see a gradient once, when it is delivered, and never the learner's own derivatives.

``register_hook`` fires in every ``torch.autograd.grad`` for its tensor, ``register_post_accumulate_grad_hook`` in none.
So the first are suspended while steps are linearised, and both fire when a gradient is added to ``.grad``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rtrl._utils.undo import undone
from rtrl.errors import ConfigError


@contextmanager
def hooks_suspended(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let no hook of ``register_hook`` on these tensors fire."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]

    def put_back() -> None:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks

    with undone(put_back):
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        yield


class Delivery:
    """Adds gradients, by name, to the ``.grad`` of the parameters. The hooks of a parameter see its whole gradient.

    Args:
        parameters: name → parameter.
        gradients: name → what is to be added.

    Attributes:
        touched: whether a ``.grad`` may have changed. If a hook raises an error, all are what they were before.

    Raises:
        ConfigError: a ``.grad`` that is there cannot be added to.
    """

    def __init__(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.touched = False
        self._plain = [(parameters[name], g) for name, g in gradients.items() if not has_hooks(parameters[name])]
        self._hooked = [(parameters[name], g) for name, g in gradients.items() if has_hooks(parameters[name])]
        self._beside = list(parameters.values()) if self._hooked else []
        for name, gradient in gradients.items():
            _check_can_be_added_to(name, parameters[name].grad, gradient)

    def run(self) -> None:
        """Add the gradients.

        Raises:
            Exception: what a hook raises.
        """
        if self._hooked:
            self._run_hooked()
        self.touched = True
        sums = [(parameter.grad, gradient) for parameter, gradient in self._plain if parameter.grad is not None]
        if sums:
            with torch.no_grad():
                torch._foreach_add_([held for held, _ in sums], [gradient for _, gradient in sums])
        for parameter, gradient in self._plain:
            if parameter.grad is None:
                parameter.grad = gradient

    def _run_hooked(self) -> None:
        held = HeldGrads(self._beside)
        try:
            self.touched = True
            # Copies: autograd may keep what it is given, and a hook may change it.
            copies = [gradient.clone() for _, gradient in self._hooked]
            torch.autograd.backward([parameter for parameter, _ in self._hooked], copies)
        except BaseException:
            held.give_back()
            self.touched = False
            raise


def _check_can_be_added_to(name: str, held: Tensor | None, gradient: Tensor) -> None:
    """Refuse a ``.grad`` that cannot be added to in place; PyTorch would notice after others have been added to.

    Raises:
        ConfigError: naming the parameter.
    """
    if held is None:
        return
    found = f"{tuple(held.shape)} {held.layout} on {held.device}"
    if held.is_inference():
        found = "a tensor made under torch.inference_mode"
    elif held.shape == gradient.shape and held.layout == gradient.layout and held.device == gradient.device:
        if all(size < 2 or stride for size, stride in zip(held.shape, held.stride(), strict=True)):
            return
        found = "an expanded tensor, whose entries share memory"
    raise ConfigError(
        f"the .grad of parameter {name!r} cannot be added to: it is {found}, and must be a dense tensor "
        f"{tuple(gradient.shape)} on {gradient.device}. Set it to None. Nothing has been delivered"
    )


class HeldGrads:
    """The ``.grad`` of tensors as they are now, to be given back.

    Args:
        tensors: whose.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        grads = [(tensor, tensor.grad) for tensor in tensors]
        self._held = [(tensor, grad, None if grad is None else grad.detach().clone()) for tensor, grad in grads]

    def give_back(self) -> None:
        """Give every tensor its ``.grad`` back: the same tensor with the same values."""
        for tensor, grad, values in self._held:
            tensor.grad = grad
            if grad is not None and values is not None:
                grad.detach().copy_(values)


def accumulate(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add the gradients of a loss to the ``.grad`` of its leaves; hooks of ``register_hook`` have fired.

    Hooks of ``register_post_accumulate_grad_hook`` fire now. If there is an error, every ``.grad`` is what it was
    before.
    """
    plain: list[tuple[Tensor, Tensor, Tensor | None]] = []
    hooked: list[tuple[Tensor, Tensor]] = []
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            continue
        if leaf._post_accumulate_grad_hooks:
            hooked.append((leaf, gradient))
            continue
        before = leaf.grad
        # A copy: what autograd returns may be a view, an expanded scalar, or a tensor that others hold.
        plain.append((leaf, gradient.clone() if before is None else (before + gradient).detach(), before))
    held = HeldGrads(leaves) if hooked else None
    try:
        if hooked:
            with hooks_suspended(leaves):
                torch.autograd.backward([leaf for leaf, _ in hooked], [g.detach().clone() for _, g in hooked])
        for leaf, total, _ in plain:
            leaf.grad = total
    except BaseException:
        for leaf, _, before in plain:
            leaf.grad = before
        if held is not None:
            held.give_back()
        raise


def has_hooks(tensor: Tensor) -> bool:
    """Whether a hook of either kind is registered on a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
