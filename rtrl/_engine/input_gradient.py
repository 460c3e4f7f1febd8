"""The gradient of an open block's losses at the inputs of its steps, for what computes x in front of the cell."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.parameter_hooks import HeldGrads
from rtrl._engine.recorded import RecordedStep
from rtrl._utils import pytrees
from rtrl._utils.out_of_memory import is_out_of_memory
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


class InputDelivery:
    """Pulls the gradient at x back to what x was computed from, and takes it back.

    Args:
        cell: the cell.
        steps: of the block that is about to be processed.
        takes_replay: whether the cell takes the choices to make as ``replay``.

    Raises:
        NonFiniteError: NaN or infinity in a gradient.
    """

    def __init__(self, cell: nn.Module, steps: Sequence[RecordedStep], takes_replay: bool) -> None:
        self._span = f"steps {steps[0].number} … {steps[-1].number}"
        self._pairs = input_gradients(cell, steps, takes_replay)
        sources = [source for source, _ in self._pairs]
        reached = [*checks.reached_leaves(*sources).values(), *(source for source in sources if source.retains_grad)]
        self._held = HeldGrads(reached)

    def run(self) -> None:
        """Pull the gradient back.

        Raises:
            LossError: the graph of x cannot be gone through.
        """
        try:
            # The graph is kept: the x of a later block may be computed by the same one. It goes when x goes.
            torch.autograd.backward(
                [source for source, _ in self._pairs], [gradient for _, gradient in self._pairs], retain_graph=True
            )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise LossError(
                f"the gradient at x of {self._span} could not be pulled back through what computed x: {error}"
            ) from error

    def take_back(self) -> None:
        """Give every tensor the ``.grad`` that it had before."""
        self._held.give_back()
