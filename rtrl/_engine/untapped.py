"""Derivatives of what no tap covers: just as exact, in batches where PyTorch can, one by one where it cannot."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import index_sets, pytrees
from rtrl._utils.formatting import first_line
from rtrl._utils.functional_call import check_substituted, functional_call
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import as_real
from rtrl._utils.undo import undone
from rtrl.cells.protocol import Sparsity, call_cell
from rtrl.errors import PerformanceWarning, RTRLError

_CHUNK = 2**23  # numbers of weighted Jacobians that are pulled back at a time
_ROWS_CHUNK = (
    2**20
)  # of Jacobians of samples: few enough that they are still in a processor's cache when they are copied


def call_with(
    cell: nn.Module, theta: Mapping[str, Tensor], x: Any, h: Tensor, replay: Sparsity | None
) -> tuple[Any, Tensor, Sparsity]:
    """Run the cell with other parameters."""
    return call_cell(lambda *args, **options: functional_call(cell, dict(theta), args, options), x, h, replay)


def weighted_jacobians(
    cell: nn.Module,
    untapped: Sequence[str],
    cotangents: Tensor,
    x: Any,
    h: Tensor,
    replay: Sparsity | None,
    writes: Tensor | None,
    *,
    by_sample: bool = False,
) -> dict[str, Tensor]:
    """Weighted immediate Jacobians ``Σ_τ cotangents_τ · ∂h_next[writes]_τ/∂θ``, separately for each sample.

    From cotangents (B, U, m, w·slot_size) and N = B·m samples (see ``StepBatch``) to name → (B, U, *shape), for the
    parameters named ``untapped`` and all their uses; (B, U, *shape, 2) for a complex one.

    Args:
        by_sample: run the cell itself sample by sample, because it takes a gradient of its own.

    Cost: per sample, a forward pass and U backward passes, all under ``torch.func.vmap``; a cell that does not run
        there is taken sample by sample, with a ``PerformanceWarning``.
    """
    size, _, m, _ = cotangents.shape
    named = dict(cell.named_parameters())
    fixed = {name: p.detach() for name, p in named.items() if name not in untapped}
    leaves, rebuild = pytrees.flatten((x, h, replay, writes))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i].detach().reshape(size, m, *leaves[i].shape[1:]) for i in places]

    def written(values: dict[str, Tensor] | None, of_sample: Sequence[Tensor]) -> Tensor:
        """h_next[writes] of one sample's steps, (m, w·slot_size), with these values of the untapped parameters, or with
        the parameters themselves."""
        sample = list(leaves)
        for i, leaf in zip(places, of_sample, strict=True):
            sample[i] = leaf
        x, h, replay, writes = rebuild(sample)
        if values is None:
            h_next = call_cell(cell, x, h, replay)[1]
        else:
            h_next = call_with(cell, {**fixed, **values}, x, h, replay)[1]
            check_substituted(h_next)
        return index_sets.gather(h_next.reshape(m, h_next.shape[1], h[0, 0].numel()), writes).flatten(1)

    def of_one_sample(cotangents: Tensor, *of_sample: Tensor) -> dict[str, Tensor]:
        theta = {name: named[name].detach() for name in untapped}
        vjp = torch.func.vjp(lambda values: written(values, of_sample), theta)[1]
        jacobians: dict[str, Tensor] = torch.func.vmap(lambda cotangent: vjp(cotangent)[0])(cotangents)
        return {name: as_real(jacobian) for name, jacobian in jacobians.items()}

    what = f"{untapped} are linearised sample by sample"
    if by_sample:
        if size > 1:
            _warn_slow(f"the cell takes a gradient in its forward; {what}")
    else:
        try:
            with torch.enable_grad(), _ignoring_slow_batching():
                if size == 1:
                    lone = of_one_sample(cotangents[0], *(t[0] for t in tensors))
                    return {name: value.unsqueeze(0) for name, value in lone.items()}
                jacobians: dict[str, Tensor] = torch.func.vmap(of_one_sample)(cotangents, *tensors)
                return jacobians
        except RTRLError:
            raise
        except Exception as error:  # of any kind: the cell was not written for torch.func
            if is_out_of_memory(error):
                raise
            _warn_slow(f"the cell does not run under torch.func; {what}", error)
    rows: list[list[Tensor]] = []
    for b in range(size):
        with torch.enable_grad():
            head = written(None, [t[b] for t in tensors])
        rows.append(pull_rows(head, [named[name] for name in untapped], cotangents[b]))
    return {name: as_real(torch.stack([of_sample[i] for of_sample in rows])) for i, name in enumerate(untapped)}


def jacobian_rows(head: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All Jacobians ``∂head[n, i]/∂input[n]`` of head (N, I): (I, *input.shape) for each input."""
    rows = head.shape[1]
    eye = torch.eye(rows, dtype=head.dtype, device=head.device).unsqueeze(1).expand(rows, *head.shape)
    return pull_rows(head, inputs, eye)


def sample_jacobians(head: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """All Jacobians ``∂head[n, i]/∂input[n]`` of head (N, I): (N, I, numbers of a sample) for each input.

    None where head does not depend on an input; one tensor for inputs at which autograd gives one and the same, as it
    does for the terms of a sum. Some rows are pulled back at a time, each written to its place.
    """
    n, rows = head.shape
    jacobians: list[Tensor | None] = [None] * len(inputs)
    if not head.requires_grad:
        return jacobians
    eye = torch.eye(rows, dtype=head.dtype, device=head.device).unsqueeze(1).expand(rows, n, rows)
    span = max(1, _ROWS_CHUNK // max([1, *(t.numel() for t in inputs)]))
    same: list[int | None] = []
    for start in range(0, rows, span):
        chunk = slice(start, start + span)
        grads = _pull(head, inputs, eye[chunk])
        firsts = [_first_alike(grads, place) for place in range(len(grads))]
        if start == 0:
            same = firsts
        if firsts != same:  # a backward pass that depends on the numbers
            return [values.flatten(2).transpose(0, 1) for values in pull_rows(head, inputs, eye)]
        for place, (grad, first) in enumerate(zip(grads, same, strict=True)):
            if grad is None or first is None:
                continue
            values = jacobians[first]
            if values is None:
                values = grad.new_empty(n, rows, grad[0].numel() // n)
            jacobians[place] = values
            if first == place:
                values[:, chunk] = grad.reshape(len(grad), n, -1).transpose(0, 1)
    return jacobians


def _first_alike(grads: Sequence[Tensor | None], place: int) -> int | None:
    """The first place with the very tensor of this place; None if there is none."""
    grad = grads[place]
    if grad is None:
        return None
    return next(i for i, other in enumerate(grads[: place + 1]) if other is not None and grad.is_set_to(other))


def pull_rows(head: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Pull each of ``weights`` (I, *head.shape) back to the inputs: (I, *input.shape) for each input, zeros where head
    does not depend on it. Some rows at a time, so that what lies between is small beside the results."""
    count = len(weights)
    span = max(1, _CHUNK // max([1, *(t.numel() for t in inputs)]))
    if head.requires_grad and 0 < count <= span:
        grads = _pull(head, inputs, weights)
        return [t.new_zeros(count, *t.shape) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    pulled = [t.new_zeros(count, *t.shape) for t in inputs]
    for start in range(0, count if head.requires_grad else 0, span):
        rows = slice(start, start + span)
        for out, grad in zip(pulled, _pull(head, inputs, weights[rows]), strict=True):
            if grad is not None:
                out[rows] = grad
    return pulled


def _pull(head: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> Sequence[Tensor | None]:
    try:
        with _ignoring_slow_batching():
            return torch.autograd.grad(
                head, inputs, weights, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        _warn_slow("the cell's backward pass cannot be batched; it is taken row by row", error)
    rows = [torch.autograd.grad(head, inputs, weight, retain_graph=True, allow_unused=True) for weight in weights]
    return [_stacked(column) for column in zip(*rows, strict=True)]


def _stacked(column: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of one input; None if there are none."""
    form = next((grad for grad in column if grad is not None), None)
    return None if form is None else torch.stack([torch.zeros_like(form) if grad is None else grad for grad in column])


@contextmanager
def _ignoring_slow_batching() -> Iterator[None]:
    """Silence PyTorch's warning that an operation without a batching rule is run once per sample: slow, not wrong."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()

    def leave_transforms() -> None:
        if torch._C._functorch.get_dynamic_layer_stack_depth() > depth:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)

    with undone(leave_transforms), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def _warn_slow(what: str, error: Exception | None = None) -> None:
    warnings.warn(what if error is None else f"{what} ({first_line(error)})", PerformanceWarning, stacklevel=3)
