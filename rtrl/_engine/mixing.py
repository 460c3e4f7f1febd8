"""Whether a cell keeps its samples apart, tested at a perturbed point, once for each kind of step.

A first state of zeros or a gate that starts at zero hides what a cell does: derivatives that are zero by chance say
nothing. So the cell is run on a perturbed copy of its state and parameters.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtrl._engine import checks, contract
from rtrl._engine.recorded import StepBatch
from rtrl._engine.taps import TapRecorder, record_taps
from rtrl._engine.untapped import call_with
from rtrl._utils import index_sets, pytrees
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import is_continuous
from rtrl.errors import CellError, RTRLError


def perturb(value: Tensor, generator: torch.Generator, size: float = 0.1) -> Tensor:
    """A copy with ``size (1 + |value|)`` times normal noise on top; integers stay as they are."""
    if not is_continuous(value):
        return value.detach()
    return value.detach() + size * normal_like(value, generator) * (1 + value.detach().abs())


def normal_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of the form of ``value``, drawn on the CPU."""
    dtype = torch.complex128 if value.is_complex() else torch.float64
    return torch.randn(value.shape, generator=generator, dtype=dtype, device="cpu").to(value)


@dataclass(frozen=True, slots=True)
class PerturbedRun:
    """A batch of steps run with the parameters ``theta`` from the states ``h``.

    Attributes:
        recorder: the recorded uses of parameters, gated where the steps are dense.
        h_next: the next states.
        heads: the written slots of the next states, (N, w·slot_size), and the floating-point tensors of y.
    """

    theta: Mapping[str, Tensor]
    h: Tensor
    recorder: TapRecorder
    h_next: Tensor
    heads: list[Tensor]


def run_perturbed(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: StepBatch,
    untapped: Iterable[str],
    elementwise: bool = False,
) -> PerturbedRun:
    """Run a batch of steps at a perturbed point; ``elementwise`` is that of ``TapRecorder``.

    Raises:
        CellError: the cell makes other choices than those it was to repeat.

    Cost: one forward pass over the batch.
    """
    generator = torch.Generator().manual_seed(0)  # not the user's, whose random numbers stay as they are
    try:
        return _run(cell, parameters, batch, untapped, lambda value: perturb(value, generator), elementwise)
    except RTRLError:
        raise
    except RuntimeError as error:  # the perturbed point may lie outside the cell's domain
        if is_out_of_memory(error):
            raise
        return _run(cell, parameters, batch, untapped, lambda value: value.detach().clone(), elementwise)


def taps_mixing_samples(
    cell: nn.Module, parameters: Mapping[str, nn.Parameter], batch: StepBatch, run: PerturbedRun
) -> set[str]:
    """The parameters with a tap whose dimension 0 does not run over the samples, found at a perturbed point; all, if
    the cell takes a gradient of its own.

    Raises:
        CellError: a sample computes something else alone than in the batch, or depends on another one.
        SparsityError: a row that is not declared as written changes.

    Cost: two forward passes of a sample, and ``2·⌈log2 N⌉`` backward passes over the batch.
    """
    step, size = batch.steps[0].number, batch.h.shape[0]
    taps = run.recorder.taps
    numbers = [each.number for each in batch.steps]
    checks.check_copied(run.h.detach(), run.h_next.detach(), batch.sparsity.writes, *numbers)
    mixing = set(parameters) if run.recorder.inner_gradient else set()
    if size == 1:
        return mixing
    for i in (0, size - 1):
        if not checks.nearly_equal(_written_alone(cell, batch, run, i), run.heads[0][i : i + 1].detach()):
            raise CellError(f"step {step}: the cell mixes samples: one computes something else alone than in a batch")
    live = [head for head in run.heads if head.requires_grad and head.numel()]
    for subset in _separating_subsets(size, batch.h.device) if live else ():
        state_grad, *tap_grads = torch.autograd.grad(
            live,
            [run.h, *(tap.output for tap in taps)],
            [_weights_of(subset, head) for head in live],
            retain_graph=True,
            allow_unused=True,
        )
        if _reaches_others(state_grad, subset):
            raise CellError(
                f"step {step}: the cell mixes samples: the next state or y of one depends on the state of another"
            )
        mixing.update(tap.name for tap, grad in zip(taps, tap_grads, strict=True) if _reaches_others(grad, subset))
    return mixing


def _run(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: StepBatch,
    untapped: Iterable[str],
    move: Callable[[Tensor], Tensor],
    elementwise: bool,
) -> PerturbedRun:
    theta = {name: move(p).requires_grad_(name in parameters) for name, p in cell.named_parameters()}
    h = move(batch.h).requires_grad_()
    (y, h_next, sparsity), recorder = record_taps(
        lambda: call_with(cell, theta, batch.x, h, batch.replay),
        {name: theta[name] for name in parameters},
        h.shape[0],
        untapped,
        copy=True,
        gated=batch.steps[0].dense,
        elementwise=elementwise,
    )
    contract.check_same_choices(batch, sparsity)
    outputs = [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]
    return PerturbedRun(theta, h, recorder, h_next, [batch.written(h_next), *outputs])


def _written_alone(cell: nn.Module, batch: StepBatch, run: PerturbedRun, i: int) -> Tensor:
    """The written slots of the next state of sample i, run alone."""
    x, h, replay, writes = pytrees.map_tensors(
        lambda leaf: leaf[i : i + 1], (batch.x, run.h, batch.replay, batch.sparsity.writes)
    )
    with torch.no_grad():
        h_next = call_with(cell, run.theta, x, h, replay)[1]
    return index_sets.gather(h_next.reshape(1, -1, batch.slot_size), writes).flatten(1)


def _separating_subsets(size: int, device: torch.device) -> list[Tensor]:
    """Boolean masks (N,) such that for any two samples some mask holds the one and not the other."""
    number = torch.arange(size, device=device)
    bits = [(number >> bit & 1).bool() for bit in range((size - 1).bit_length())]
    return [*bits, *(~mask for mask in bits)]


def _weights_of(subset: Tensor, head: Tensor) -> Tensor:
    """Weights for ``head`` that differ from entry to entry, and are zero outside the subset of samples."""
    dtype = head.dtype.to_real()
    weights = torch.linspace(1.0, 2.0, head[0].numel(), dtype=dtype, device=head.device).reshape(head[0].shape)
    return weights * subset.reshape(-1, *[1] * (head.ndim - 1)).to(head.dtype)


def _reaches_others(grad: Tensor | None, subset: Tensor) -> bool:
    """Whether a gradient of a subset's heads has a finite nonzero entry at a sample outside the subset."""
    if grad is None or not grad.numel():
        return False
    others = grad.reshape(len(subset), -1)[~subset]
    return bool((torch.isfinite(others) & (others != 0)).any())
