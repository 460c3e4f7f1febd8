"""The gradient of an open block's losses at the inputs of its steps, for what computes x in front of the cell."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.parameter_hooks import grads_restored_on_error
from rtrl._engine.recorded import RecordedStep
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.protocol import call_cell
from rtrl.errors import LossError


def input_gradients(cell: nn.Module, steps: Sequence[RecordedStep], takes_replay: bool) -> list[tuple[Tensor, Tensor]]:
    """Return pairs (a tensor of x as it was passed, the gradient of the steps' losses at it).

    Plain autograd of the cell itself, step by step, with the state of the first step held fixed.

    Raises:
        NonFiniteError: NaN or infinity in a gradient.

    Cost: a forward and a backward pass through the steps.
    """
    heads: list[tuple[Tensor, Tensor]] = []
    passed: list[tuple[Tensor, Tensor, int]] = []
    h = steps[0].h
    for step in steps:
        leaves, refill = pytrees.flatten(step.x)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for place, source in zip(places, step.sources, strict=False):  # no sources at all: x is a constant
            if source.requires_grad:
                leaves[place] = leaves[place].detach().requires_grad_()
                passed.append((source, leaves[place], step.number))
        with torch.enable_grad():
            y, h, _ = call_cell(cell, refill(leaves), step.continued(h), step.sparsity if takes_replay else None)
        outputs = [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]
        pairs = zip(outputs, step.grads, strict=True)
        heads += [(y, grad) for y, grad in pairs if grad is not None and y.requires_grad]
    if not heads or not passed:
        return []
    ys, weights = zip(*heads, strict=True)
    gradients = torch.autograd.grad(ys, [leaf for _, leaf, _ in passed], weights, allow_unused=True)
    found = []
    for (source, _, number), gradient in zip(passed, gradients, strict=True):
        if gradient is not None:
            checks.check_finite("the gradient of the losses at x", gradient, number)
            found.append((source, gradient))
    return found


@contextmanager
def delivered_to_inputs(cell: nn.Module, steps: Sequence[RecordedStep], takes_replay: bool) -> Iterator[None]:
    """Pull the gradient at x back to what x was computed from; take it back if the body raises an error.

    Raises:
        LossError: the graph of x cannot be gone through.
        NonFiniteError: NaN or infinity in a gradient.
    """
    pairs = input_gradients(cell, steps, takes_replay)
    sources = [source for source, _ in pairs]
    reached = [*checks.reached_leaves(*sources).values(), *(source for source in sources if source.retains_grad)]
    with grads_restored_on_error(reached):
        try:
            # The graph is kept: the x of a later block may be computed by the same one. It goes when x goes.
            torch.autograd.backward(sources, [gradient for _, gradient in pairs], retain_graph=True)
        except RuntimeError as error:
            raise LossError(
                f"the gradient at x of steps {steps[0].number} … {steps[-1].number} could not be pulled back through "
                f"what computed x: {error}"
            ) from error
        yield
