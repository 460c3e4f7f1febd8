"""The general path: derivatives of what no tap covers, just as exact, batched where PyTorch can and one by one where it
cannot."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import index_sets, pytrees
from rtrl._utils.functional_call import functional_call
from rtrl.cells.protocol import Sparsity, call_cell
from rtrl.errors import PerformanceWarning


def weighted_jacobians(
    cell: nn.Module,
    general: Sequence[str],
    weights: Tensor,
    x: Any,
    h: Tensor,
    replay: Sparsity | None,
    writes: Tensor | None,
) -> dict[str, Tensor]:
    """Weighted immediate Jacobians ``Σ_τ weights_τ · ∂h_next[writes]_τ/∂θ``, one sample apart from another.

    Args:
        cell: the cell. general: names of its parameters to take.
        weights: (B, U, m, w·width).
        x, h, replay, writes: the B·m samples that the cell is run on, each sample's steps after one another.

    Returns:
        name → (B, U, *shape), all uses of the parameter included.

    Cost: a forward pass and U backward passes a sample, all under ``torch.func.vmap``; a cell that does not run there
    is taken sample by sample, with a ``PerformanceWarning``.
    """
    size, _, m, _ = weights.shape
    rest = {name: p.detach() for name, p in cell.named_parameters() if name not in general}
    theta = {name: dict(cell.named_parameters())[name].detach() for name in general}
    flat, refill = pytrees.flatten((x, h, replay, writes))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    tensors = [flat[i].detach().reshape(size, m, *flat[i].shape[1:]) for i in places]

    def written(values: dict[str, Tensor], mine: Sequence[Tensor]) -> Tensor:
        """h_next[writes] of one sample's steps, (m, w·width), with these values of the general parameters."""
        refilled = list(flat)
        for i, leaf in zip(places, mine, strict=True):
            refilled[i] = leaf
        own_x, own_h, own_replay, writes = refill(refilled)

        def substituted(*args: Any, **kwargs: Any) -> Any:
            return functional_call(cell, {**rest, **values}, args, kwargs)

        _, h_next, _ = call_cell(substituted, own_x, own_h, own_replay)
        return index_sets.gather(h_next.reshape(m, h_next.shape[1], own_h[0, 0].numel()), writes).flatten(1)

    def one(cotangents: Tensor, *mine: Tensor) -> dict[str, Tensor]:
        vjp = torch.func.vjp(lambda values: written(values, mine), theta)[1]
        jacobians: dict[str, Tensor] = torch.func.vmap(lambda cotangent: vjp(cotangent)[0])(cotangents)
        return jacobians

    try:
        with _patiently():
            if size == 1:
                lone = one(weights[0], *(t[0] for t in tensors))
                return {name: value.unsqueeze(0) for name, value in lone.items()}
            together: dict[str, Tensor] = torch.func.vmap(one)(weights, *tensors)
            return together
    except RuntimeError as error:
        _slow(f"the cell does not run under torch.func; {general} are linearised sample by sample", error)
    found: list[list[Tensor]] = []
    for b in range(size):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        with torch.enable_grad():
            head = written(leaves, [t[b] for t in tensors])
        found.append(pull_rows(head, list(leaves.values()), weights[b]))
    return {name: torch.stack([values[i] for values in found]) for i, name in enumerate(theta)}


def jacobian_rows(head: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """``∂head[n, i]/∂input[n]`` for every column i of head (N, I) at once: (I, *input.shape) for each input."""
    rows = head.shape[1]
    eye = torch.eye(rows, dtype=head.dtype, device=head.device).unsqueeze(1).expand(rows, *head.shape)
    return pull_rows(head, inputs, eye)


def pull_rows(head: Tensor, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Pull each of ``weights`` (I, *head.shape) back to the inputs: (I, *input.shape) for each input, zero where
    nothing arrives."""
    if not head.requires_grad or not weights.shape[0]:
        return [t.new_zeros(weights.shape[0], *t.shape) for t in inputs]
    try:
        with _patiently():
            grads = torch.autograd.grad(
                head, inputs, weights, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
    except RuntimeError as error:
        _slow("the cell's backward pass cannot be batched; it is taken row by row", error)
        rows = [torch.autograd.grad(head, inputs, weight, retain_graph=True, allow_unused=True) for weight in weights]
        return [
            t.new_zeros(weights.shape[0], *t.shape) if column[0] is None else torch.stack(column)
            for t, column in zip(inputs, zip(*rows, strict=True), strict=True)
        ]
    return [
        t.new_zeros(weights.shape[0], *t.shape) if grad is None else grad for t, grad in zip(inputs, grads, strict=True)
    ]


@contextmanager
def _patiently() -> Iterator[None]:
    """Let PyTorch go through operations without a batching rule one by one, in silence: that is slow, not wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def _slow(what: str, error: RuntimeError) -> None:
    warnings.warn(f"{what} ({str(error).splitlines()[0]})", PerformanceWarning, stacklevel=3)
