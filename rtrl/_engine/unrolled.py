"""A block as a user would differentiate it: the cell itself, called step by step, and one backward pass of autograd.

No tap is recorded, no parameter is replaced, and no steps are joined to a batch. The audit of a learner compares its
own derivatives with these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.recorded import RecordedStep
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import as_real, is_continuous
from rtrl.cells.protocol import OTHER_CHOICES, call_cell, same_choices, takes_replay
from rtrl.errors import CellError


@dataclass(frozen=True, slots=True)
class PulledBlock:
    """The cotangent of a block's last state and the gradients of its losses, pulled back to the block's start.

    Attributes:
        state: (B, H), ``v + w Φ``.
        parameters: name → ``Σ ∂ℓ/∂θ + w Σ_τ C_τ B_τ``, of the parameter's shape, the sum over all samples; of a complex
            one as pairs.
    """

    state: Tensor
    parameters: dict[str, Tensor]

    def items(self) -> list[tuple[str, Tensor]]:
        """The state, called "", and the parameters by name."""
        return [("", self.state), *self.parameters.items()]


def pull_back_unrolled(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    steps: Sequence[RecordedStep],
    last: Tensor,
    cotangent: Tensor,
    noise: torch.Generator | None = None,
) -> PulledBlock:
    """Unroll recorded steps and pull a cotangent of the last state and the gradients of the losses back.

    Args:
        cell: the cell.
        parameters: its trainable parameters.
        steps: the steps, in order.
        last: (B, n, ...), the state that the last of them reached.
        cotangent: (B, H), of that state.
        noise: changes each number of every state and of the losses' gradients by about one rounding error; the
            difference to a call without it shows how much rounding errors matter in this block. Inputs stay as they
            are: they may say which rows or slices are used.

    Raises:
        CellError: the cell does not reach the state that it reached before, or makes other choices.

    Cost: one forward and one backward pass; memory for their graph.
    """

    def shaken(value: Tensor) -> Tensor:
        if noise is None or not value.is_floating_point():
            return value
        eps = torch.finfo(value.dtype).eps
        return value * (
            1 + eps * torch.randn(value.shape, generator=noise, dtype=torch.float64, device="cpu").to(value)
        )

    with torch.enable_grad():
        first = steps[0].h.detach().clone().requires_grad_()
        heads, weights, h = [], [], first
        for step in steps:
            start = shaken(step.continued(h))
            y, h, sparsity = call_cell(cell, step.x, start, None)
            if not same_choices(sparsity, step.sparsity):  # it was made to choose, or a near tie fell the other way
                if takes_replay(cell):
                    y, h, sparsity = call_cell(cell, step.x, start, step.sparsity)
                elif noise is None:
                    raise CellError(f"step {step.number}: {OTHER_CHOICES}")
            leaves = [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]
            for leaf, grad in zip(leaves, step.grads, strict=True):
                if grad is not None and leaf.requires_grad:
                    heads.append(leaf)
                    weights.append(shaken(grad))
        if noise is None and not checks.nearly_equal(h.detach(), last):
            raise CellError(
                f"steps {steps[0].number} … {steps[-1].number}: run again one by one, the cell reaches another state "
                "than it did; it must be a pure function of (x, h, parameters), and its parameters must not change "
                "inside an open block"
            )
        if h.requires_grad:
            heads.append(h)
            weights.append(cotangent.reshape(h.shape))
        inputs = [first, *parameters.values()]
        if heads:
            pulled = torch.autograd.grad(heads, inputs, weights, allow_unused=True, materialize_grads=True)
        else:
            pulled = tuple(torch.zeros_like(value) for value in inputs)
    gradients = {
        name: gradient.to_dense() if gradient.is_sparse else as_real(gradient)
        for name, gradient in zip(parameters, pulled[1:], strict=True)
    }
    return PulledBlock(pulled[0].flatten(1), gradients)
