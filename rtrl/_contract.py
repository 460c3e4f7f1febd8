"""Whether a cell keeps the contract at a generic point, once for each kind of step.

A first state of zeros or a gate that starts at zero hides what a cell does: derivatives that are zero by chance say
nothing. So the cell is run on a disturbed copy of its state and parameters, where what can differ from zero does.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rtrl import _guard, _rows, _tree
from rtrl.cells.protocol import OTHER_CHOICES, Sparsity, call_cell, same_choices
from rtrl.errors import CellError, RTRLError
from rtrl.taps import TapRecorder


def taps_that_mix(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    x: Any,
    h: Tensor,
    replay: Sparsity | None,
    sparsity: Sparsity,
    general: Iterable[str],
    step: int,
) -> set[str]:
    """The parameters with a tap whose dimension 0 does not run over the samples, found at a generic point.

    Args:
        x, h, replay, sparsity: a batch of N samples of one kind. general: parameters that have no taps anyway. step:
            for messages.

    Raises:
        CellError: a sample computes something else alone than in the batch, or depends on another one.
        SparsityError: a row that is not declared as written changes.

    Cost: three forward passes and ``2·⌈log2 N⌉`` backward passes over the batch.
    """
    batch = h.shape[0]
    generator = torch.Generator().manual_seed(0)  # of its own: the user's random numbers stay as they are

    def disturbed(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return value.detach() + 0.1 * noise * (1 + value.detach().abs()) if value.is_floating_point() else value

    theta = {name: disturbed(p).requires_grad_(name in parameters) for name, p in cell.named_parameters()}
    point = disturbed(h).requires_grad_()
    try:
        taps, heads, h_next = _run(cell, parameters, theta, x, point, replay, sparsity, general, step)
    except RTRLError:
        raise
    except RuntimeError:  # the disturbed point may lie outside the cell's domain
        theta = {name: p.detach().clone().requires_grad_(name in parameters) for name, p in cell.named_parameters()}
        point = h.detach().clone().requires_grad_()
        taps, heads, h_next = _run(cell, parameters, theta, x, point, replay, sparsity, general, step)
    _guard.check_copied(point.detach(), h_next.detach(), sparsity.writes, step)
    if batch == 1:
        return set()
    _alone(cell, theta, x, point.detach(), replay, heads[0].detach(), sparsity, step)

    live = [head for head in heads if head.requires_grad and head.numel()]
    mixing: set[str] = set()
    for chosen in _separating_subsets(batch, h.device):
        weights = []
        for head in live:
            weight = torch.linspace(1.0, 2.0, head[0].numel(), dtype=head.dtype, device=head.device).reshape(
                head[0].shape
            )
            weights.append(weight * chosen.reshape(-1, *[1] * (head.ndim - 1)).to(head.dtype))
        inputs = [point, *(tap.output for tap in taps)]
        grads = torch.autograd.grad(live, inputs, weights, retain_graph=True, allow_unused=True) if live else ()
        for i, grad in enumerate(grads):
            if grad is None or not grad.numel():
                continue
            stray = grad.reshape(batch, -1)[~chosen]
            if bool((torch.isfinite(stray) & (stray != 0)).any()):
                if i == 0:
                    raise CellError(
                        f"step {step}: the cell mixes samples: the next state or y of one depends on the state of "
                        "another"
                    )
                mixing.add(taps[i - 1].name)
    return mixing


def _run(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    theta: Mapping[str, Tensor],
    x: Any,
    h: Tensor,
    replay: Sparsity | None,
    sparsity: Sparsity,
    general: Iterable[str],
    step: int,
) -> tuple[list[Any], list[Tensor], Tensor]:
    batch, n = h.shape[:2]
    recorder = TapRecorder({name: theta[name] for name in parameters}, batch, general, copy=True)
    with recorder:
        y, h_next, again = _call(cell, theta, x, h, replay)
    if not same_choices(again, sparsity):
        raise CellError(f"step {step}: {OTHER_CHOICES}")
    written = _rows.take(h_next.reshape(batch, n, h[0, 0].numel()), sparsity.writes).flatten(1)
    return recorder.taps, [written, *(leaf for leaf in _tree.tensors(y) if leaf.is_floating_point())], h_next


def _call(
    cell: nn.Module, theta: Mapping[str, Tensor], x: Any, h: Tensor, replay: Sparsity | None
) -> tuple[Any, Tensor, Sparsity]:
    def substituted(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(cell, dict(theta), args, kwargs)

    return call_cell(substituted, x, h, replay)


def _alone(
    cell: nn.Module,
    theta: Mapping[str, Tensor],
    x: Any,
    h: Tensor,
    replay: Sparsity | None,
    together: Tensor,
    sparsity: Sparsity,
    step: int,
) -> None:
    """Run the first and the last sample alone: they must reach what they reached in the batch."""
    batch, n = h.shape[:2]
    for i in (0, batch - 1):
        own_x, own_replay, own = (_sample(tree, i) for tree in (x, replay, sparsity))
        with torch.no_grad():
            _, h_next, _ = _call(cell, theta, own_x, h[i : i + 1], own_replay)
        lone = _rows.take(h_next.reshape(1, n, h[0, 0].numel()), own.writes).flatten(1)
        if not _guard.nearly_equal(lone, together[i : i + 1]):
            raise CellError(f"step {step}: the cell mixes samples: one computes something else alone than in a batch")


def _sample(tree: Any, i: int) -> Any:
    return _tree.map_tensors(lambda leaf: leaf[i : i + 1], tree)


def _separating_subsets(batch: int, device: torch.device) -> list[Tensor]:
    """Boolean masks (N,) such that for any two samples some mask holds the one and not the other."""
    number = torch.arange(batch, device=device)
    bits = [(number >> bit & 1).bool() for bit in range((batch - 1).bit_length())]
    return [*bits, *(~mask for mask in bits)]
