"""The derivatives of a batch of steps in which every written slot depends on itself alone: d backward passes for all.

A linear map is applied to each written slot by itself. So entry k of all written slots is pulled back in one pass, and
each token of the map gets what belongs to its own slot. Passes from half of the slots at a time hold that against every
block: at the other half they must give zeros.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rtrl._engine import contract, deferred
from rtrl._engine.autograd import AutogradLinearization
from rtrl._engine.linearization import DenseOutputJacobian, LinearizedTap
from rtrl._engine.losses import loss_cotangents
from rtrl._engine.recorded import StepBatch
from rtrl._engine.taps import Tap
from rtrl._engine.untapped import pull_rows
from rtrl._utils import index_sets
from rtrl._utils.real_pairs import as_real
from rtrl.errors import CellError, SparsityError

_FEW = 6  # backward passes: up to this many, one after the other costs less than a batch of them


class NotBySlot(Exception):
    """A parameter is used in a way that does not keep the slots apart."""


@dataclass(frozen=True, slots=True)
class SlotLinearization:
    """m steps of one kind that write w slots each, linearised.

    An *entry* is a slot that a sample writes at a step; there are E = B·m·w of them, ordered so.

    Attributes:
        times: positions of the steps in their block, ascending.
        written: LongTensor (B, m, w).
        own: (B, m, w, d, d), the Jacobian of each written slot by its own former contents.
        adjoint: (B, m, n, d), ``∂ℓ/∂h`` through each step's own y; None if it is zero.
        taps: the linear uses of parameters that the next state depends on, with entries in the place of samples.
        outputs: the other ones, over the samples.
        gradients: gradient through y, summed over steps and samples, of parameters with uses that are not taps.
        has_losses: whether a loss was added at any of the steps.
    """

    times: list[int]
    written: Tensor
    own: Tensor
    adjoint: Tensor | None
    taps: list[LinearizedTap]
    outputs: list[LinearizedTap]
    gradients: dict[str, Tensor]
    has_losses: bool


def linearize_slots(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: StepBatch,
    untapped: Iterable[str],
    sliced: Sequence[str],
) -> SlotLinearization:
    """Linearise a batch of steps that declare what they write, run again with a graph.

    Args:
        cell: the cell.
        parameters: its trainable parameters.
        batch: the steps, whose h requires grad.
        untapped: parameters whose uses are not recorded.
        sliced: parameters whose influence is kept slice by slice.

    Raises:
        NotBySlot: a parameter is used in a way that does not keep the slots apart.
        CellError: a slot depends on another one; or run as one batch, the cell computes something else.
        SparsityError: a derivative lies outside the declared sparsity.
        NonFiniteError: NaN or infinity in a derivative.

    Cost: ``d + 2·⌈log2 w⌉`` backward passes over the batch, and one for the losses.
    """
    run = AutogradLinearization(cell, parameters, batch, untapped)
    if run.untapped:
        raise NotBySlot(f"parameter {run.untapped[0]!r} is used other than in a linear map of each written slot")
    writes, d = batch.sparsity.writes, batch.slot_size
    assert writes is not None
    w, size = writes.shape[1], len(batch.h)
    inputs = [batch.h, *(taps[0].output for taps in run.recorder.by_output)]
    halves = list(_halves(w, batch.h.device))
    reached, pulled = _pull(run.written, inputs, w, d, halves)
    named = [("the dynamics Jacobian", pulled[0].movedim(1, 0))]
    for taps, values in zip(run.recorder.by_output, pulled[1:], strict=True):
        named.append((f"the immediate Jacobian of parameter {taps[0].name!r}", values.movedim(1, 0)))
    (adjoint, *grad_outputs), gradients = loss_cotangents(batch, run.outputs, inputs, run.untapped_anywhere)
    if adjoint is not None:
        adjoint = adjoint.reshape(size, -1, d)
        named.append(("the adjoint", adjoint))
        reads = index_sets.union(batch.sparsity.reads, writes, adjoint.shape[1])
        touched = None if reads is None else index_sets.mask_to_indices(reads)
        if touched is not None:
            contract.check_declared_adjoint(batch, adjoint, touched)
    contract.check_finite_samples(batch, named)
    contract.check_unwritten_rows(batch, run.h_next, [*inputs, *parameters.values()])
    own = _own_jacobians(batch, pulled[0].reshape(len(pulled[0]), size, -1, d), writes, halves)
    tapped, outputs = [], []
    for i, uses in enumerate(run.recorder.by_output):
        grad = grad_outputs[i]
        grad = None if grad is None else grad.reshape(size, *uses[0].shape)
        for use in uses:
            _check_use(batch, use, reached[i + 1], use.name in sliced)
        if not reached[i + 1]:
            outputs += [LinearizedTap(use, None, grad) for use in uses]
            continue
        values = pulled[i + 1].reshape(-1, size, *uses[0].shape)
        split = _split(uses[0], values, w, d, halves)
        jacobian = DenseOutputJacobian(split.of(values[:d]).movedim(0, 1))
        grad = None if grad is None else split.of(grad)
        tapped += [LinearizedTap(split.use(use), jacobian, grad) for use in uses]
    return SlotLinearization(
        times=batch.times,
        written=batch.by_step(writes),
        own=batch.by_step(own),
        adjoint=None if adjoint is None else batch.by_step(adjoint),
        taps=tapped,
        outputs=outputs,
        gradients={name: as_real(gradient) for name, gradient in gradients.items()},
        has_losses=batch.has_losses,
    )


def _halves(w: int, device: torch.device) -> Iterator[Tensor]:
    """Boolean masks (w,) such that for any two of w slots some mask holds the one and not the other."""
    number = torch.arange(w, device=device)
    for bit in range((w - 1).bit_length()):
        yield (number >> bit & 1).bool()
        yield (number >> bit & 1) == 0


def _pull(
    head: Tensor, inputs: Sequence[Tensor], w: int, d: int, halves: Sequence[Tensor]
) -> tuple[list[bool], list[Tensor]]:
    """Pull each of d entries of all written slots, and mixtures of those of half of them, back to the inputs.

    Returns:
        For each input whether the head (N, w·d) depends on it, and (passes, *input.shape).
    """
    if not head.requires_grad:
        raise NotBySlot("the next state depends neither on the state nor on a parameter")
    generator = torch.Generator().manual_seed(5)  # not the user's, whose random numbers stay as they are
    mix = torch.randn(d, generator=generator, dtype=torch.float64, device="cpu").to(head)
    entries = torch.eye(d, dtype=head.dtype, device=head.device).repeat(1, w)
    cotangents = [*entries, *((half[:, None] * mix).flatten() for half in halves)]
    first = torch.autograd.grad(head, inputs, cotangents[0].expand_as(head), retain_graph=True, allow_unused=True)
    reached = [value is not None for value in first]
    if len(cotangents) > _FEW:
        return reached, pull_rows(head, inputs, torch.stack(cotangents).unsqueeze(1).expand(-1, *head.shape))
    passes = [first]
    for cotangent in cotangents[1:]:
        at = cotangent.expand_as(head)
        passes += [torch.autograd.grad(head, inputs, at, retain_graph=True, allow_unused=True)]
    stacked = []
    for value, column in zip(inputs, zip(*passes, strict=True), strict=True):
        stacked.append(torch.stack([torch.zeros_like(value) if grad is None else grad for grad in column]))
    return reached, stacked


def _own_jacobians(batch: StepBatch, at_state: Tensor, writes: Tensor, halves: Sequence[Tensor]) -> Tensor:
    """(N, w, d, d) from the passes (passes, N, n, d).

    Raises:
        CellError: a slot depends on another one.
    """
    d = at_state.shape[3]
    own = at_state.gather(2, writes[None, :, :, None].expand(len(at_state), -1, -1, d))
    alone = own.count_nonzero() == at_state.count_nonzero()
    for half, values in zip(halves, own[d:], strict=True):
        alone = alone & (values[:, ~half].count_nonzero() == 0)
    if not deferred.holds(alone):
        raise CellError(
            f"{batch.span}: a slot of the state depends on another slot, but the cell declares by row_groups() that "
            "none does. Declare no row groups, or mend the cell"
        )
    return own[:d].permute(1, 2, 0, 3)


@dataclass(frozen=True, slots=True)
class _Split:
    """The tokens (K, L) of a linear map, divided among w written slots.

    Attributes:
        w: how many slots.
        by_use: whether the K uses are w times k ones; else the L tokens are w times q ones.
    """

    w: int
    by_use: bool

    def of(self, value: Tensor) -> Tensor:
        """(..., N, K, L, O) → (..., N·w, K', L', O)."""
        n = value.ndim
        if self.by_use:
            by_slot: Tensor = value.unflatten(n - 3, (self.w, -1))
        else:
            by_slot = value.unflatten(n - 2, (self.w, -1)).movedim(n - 2, n - 3)
        return by_slot.flatten(n - 4, n - 3)

    def use(self, tap: Tap) -> Tap:
        """The tap with the written slots in the place of samples."""
        k, length, o = tap.shape
        index, inputs = tap.index, tap.inputs
        if index is not None and not self.by_use:
            index = index.repeat_interleave(self.w, dim=0)
        elif index is not None:
            index = index.unflatten(1, (self.w, -1)).flatten(0, 1)
        if inputs is not None and self.by_use and inputs.shape[1] < k:
            inputs = inputs.repeat_interleave(self.w, dim=0)
        elif inputs is not None:
            inputs = self.of(inputs)
        shape = (k // self.w, length, o) if self.by_use else (k, length // self.w, o)
        return replace(tap, index=index, inputs=inputs, shape=shape)


def _split(tap: Tap, values: Tensor, w: int, d: int, halves: Sequence[Tensor]) -> _Split:
    """Which tokens of a linear map belong to which slot, from its derivatives (passes, N, K, L, O).

    Raises:
        NotBySlot: a token reaches several slots, or another one than its own.
    """
    k, length, _ = tap.shape
    splits = [_Split(w, by_use) for by_use, count in ((True, k), (False, length)) if count % w == 0]
    for split in splits:
        by_slot = split.of(values[d:]).unflatten(1, (-1, w))
        strays = [by_slot[i][:, ~half].count_nonzero() for i, half in enumerate(halves)]
        if not strays or deferred.holds(torch.stack(strays).sum() == 0):
            return split
    raise NotBySlot(f"parameter {tap.name!r} is used in a linear map with outputs that reach several slots")


def _check_use(batch: StepBatch, use: Tap, reaches_state: bool, sliced: bool) -> None:
    """Refuse a use that cannot be kept by slot, or a slice that was not declared active.

    Raises:
        NotBySlot: the use is of another form.
        SparsityError: a slice is not declared.
    """
    if reaches_state and (use.transposed or use.factor is not None or (use.index is None) == sliced):
        raise NotBySlot(f"parameter {use.name!r} is used in a linear map that does not apply its declared slices")
    declared = batch.sparsity.active.get(use.name)
    if use.index is None or declared is None:
        return
    if not deferred.holds((use.index.unsqueeze(2) == declared.unsqueeze(1)).any(dim=2).all()):
        raise SparsityError(f"a slice of parameter {use.name!r} was used that Sparsity.active does not declare")
