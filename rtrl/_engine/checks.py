"""Checks of the tensors that a step takes and returns, each made before any state changes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtrl._engine import deferred
from rtrl._utils import index_sets, pytrees
from rtrl._utils.real_pairs import as_real, is_continuous
from rtrl.errors import CellError, NonFiniteError, ShapeError, SparsityError

_FEW = 64  # numbers: Python adds up this many sooner than a kernel is called


def finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, in one pass and without a copy.

    With one of them in it, no sum is finite. A sum that is not finite may also have overflowed: then the largest and
    the smallest entry decide.
    """
    if not value.is_floating_point() or not value.numel():
        return not value.is_complex() or finite(as_real(value.detach()))
    if value.requires_grad:
        value = value.detach()
    if (later := deferred.current(value)) is not None:
        later.note_finite([value])
        return True
    if value.ndim == 2 and value.numel() <= _FEW and value.is_cpu:
        total = sum(map(sum, value.tolist()), start=0.0)
    else:
        total = (value.sum() if value.ndim else value).item()
    if math.isfinite(total):
        return True
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether ``finite`` holds for every tensor; elsewhere than on a CPU, with one transfer for all of them."""
    if values and (later := deferred.current(values[0])) is not None:
        later.note_finite([as_real(value.detach()) for value in values if is_continuous(value)])
        return True
    if len(values) > 1 and not deferred.on_host(values[0]) and _finite_in_one_transfer(values):
        return True
    return all(map(finite, values))


def _finite_in_one_transfer(values: Sequence[Tensor]) -> bool:
    sums = [as_real(value.detach()).sum() for value in values if is_continuous(value)]
    one_device = len({total.device for total in sums}) == 1
    return one_device and deferred.read(torch.isfinite(torch.stack(sums)).all())


def check_finite(what: str, value: Tensor, step: int) -> None:
    """Refuse NaN and infinity in a tensor of one step.

    Raises:
        NonFiniteError: naming ``what``, the step and the first index.
    """
    if not finite(value):
        where = tuple((~torch.isfinite(value)).nonzero()[0].tolist())
        raise NonFiniteError(f"NaN or infinity in {what} at step {step}, first at index {where}")


def nearly_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two runs of one computation agree up to rounding in another order; NaN equals NaN.

    The tolerance is ``√eps · (1 + |entry|)``, plus ``1000·eps`` of the sample's largest entry for cancellation.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    first, second = as_real(first), as_real(second)
    if not second.numel() or not second.is_floating_point():
        return torch.equal(first, second)
    eps = torch.finfo(second.dtype).eps
    largest = second.abs().reshape(second.shape[0], -1).amax(dim=1).reshape(-1, *[1] * (second.ndim - 1))
    tolerance = eps**0.5 * (1 + second.abs()) + 1000 * eps * largest
    close = (first - second).abs() <= tolerance
    return deferred.holds((close | (first.isnan() & second.isnan()) | (first == second)).all())


def checked_state(state: Any, batch_size: int, beside: Tensor, like: Tensor | None = None) -> Tensor:
    """Copy a first state (batch_size, n, ...) that is on the device of ``beside`` and has the form of ``like``.

    Raises:
        ShapeError: naming what was wrong and what was expected.
        NonFiniteError: NaN or infinity in the state.
    """
    tensor = isinstance(state, Tensor)
    if not tensor or state.ndim < 2 or state.shape[0] != batch_size or not state.is_floating_point():
        kind = f"{state.dtype} {tuple(state.shape)}" if tensor else type(state).__name__
        raise ShapeError(f"a state must be a floating-point tensor ({batch_size}, n, ...), got {kind}")
    if like is not None and (state.shape != like.shape or state.dtype != like.dtype or state.device != like.device):
        raise ShapeError(
            f"the state must stay {tuple(like.shape)} {like.dtype} {like.device}, got {tuple(state.shape)} "
            f"{state.dtype} {state.device}"
        )
    if state.device != beside.device:
        raise ShapeError(f"the state is on {state.device}, the parameters on {beside.device}; move one of them")
    if state[0].numel() == 0:
        raise ShapeError(f"a state must have at least one entry per sample, got shape {tuple(state.shape)}")
    if deferred.on_host(state) and not finite(state):  # elsewhere, when its block closes
        raise NonFiniteError("NaN or infinity in the first state")
    copy: Tensor = state.detach().clone()
    return copy


def check_output(y: Any, h: Tensor, h_next: Tensor, step: int, known: bool = False) -> None:
    """Refuse a step whose state changed its form, whose y is not per sample, or whose results are not finite.

    Args:
        y, h, h_next: of the step.
        step: its number.
        known: whether the results are known to be finite, or are tested later.

    Raises:
        CellError: the next state has another shape, dtype or device, or a tensor of y has another batch.
        NonFiniteError: NaN or infinity in y or the next state; elsewhere than on a CPU, see ``check_recorded``.
    """
    if h_next.shape != h.shape or h_next.dtype != h.dtype or h_next.device != h.device:
        raise CellError(
            f"step {step}: the cell turned a state {tuple(h.shape)} {h.dtype} {h.device} into "
            f"{tuple(h_next.shape)} {h_next.dtype} {h_next.device}; a state must keep its shape, dtype and device"
        )
    leaves = pytrees.tensors(y)
    known = known or not deferred.on_host(h)  # the host does not wait: ``check_recorded`` tests all at the block's end
    for leaf in leaves:
        if leaf.ndim == 0 or leaf.shape[0] != h.shape[0]:
            raise CellError(
                f"step {step}: each tensor of y must have the batch of {h.shape[0]} as dimension 0, got shape "
                f"{tuple(leaf.shape)}; return per-sample values and reduce them in the loss"
            )
        if not (known or finite(leaf)):
            check_finite("y", leaf, step)
    if not (known or (leaves and leaves[0] is h_next) or finite(h_next)):
        check_finite("the next state", h_next, step)


def check_recorded(steps: Sequence[Any], reached: Tensor) -> None:
    """Refuse NaN and infinity in what the steps of a block took and gave, which a step on a device does not look at.

    Args:
        steps: the ``RecordedStep``s.
        reached: the state that the last of them reached.

    Raises:
        NonFiniteError: naming the first such step.

    Cost: one transfer from the device; none while checks are deferred.
    """
    following = [*(step.h for step in steps[1:]), reached]
    named = [
        (what, value, step.number)
        for step, h in zip(steps, following, strict=True)
        for what, values in (
            ("the state", [step.h]),
            ("x", pytrees.tensors(step.x)),
            ("y", step.outputs),
            ("the next state", [h if step.reached is None else step.reached]),
            ("a loss or its gradient", step.unchecked),
        )
        for value in values
    ]
    if not all_finite([value for _, value, _ in named]):
        for what, value, number in named:
            check_finite(what, value, number)


def check_copied(h: Tensor, h_next: Tensor, writes: Tensor | None, *steps: int) -> None:
    """Refuse a step that changed a row of the state that it did not declare as written.

    Args:
        h: the states before it.
        h_next: the states after it.
        writes: the rows declared.
        steps: the number of the step; of each of the m steps that every sample takes, if they are run as one batch.

    Raises:
        SparsityError: naming the step, the sample and the row.
    """
    if writes is None or torch.equal(index_sets.scatter(h, writes, index_sets.gather(h_next, writes)), h_next):
        return
    changed = (h != h_next).reshape(*h.shape[:2], -1).any(dim=2) & ~index_sets.mask(writes, h.shape[1])
    if bool(changed.any()):
        place, row = (int(i) for i in changed.nonzero()[0])
        sample, i = divmod(place, len(steps))
        raise SparsityError(
            f"step {steps[i]}: row {row} of the state of sample {sample} changed, but is not declared as written (a "
            "row that decays is written, too)"
        )


def reached_leaves(*heads: Tensor) -> dict[int, Tensor]:
    """All leaves that a backward pass from these tensors would reach, by id."""
    leaves: dict[int, Tensor] = {}
    nodes: list[Any] = []
    for head in heads:
        if head.grad_fn is None:
            leaves[id(head)] = head
        else:
            nodes.append(head.grad_fn)
    seen = set()
    for node in nodes:  # the list grows while it is gone through
        if node in seen:
            continue
        seen.add(node)
        parents = node.next_functions
        if not parents and (variable := getattr(node, "variable", None)) is not None:
            leaves[id(variable)] = variable  # here gradients accumulate
        for parent, _ in parents:
            if parent is not None:
                nodes.append(parent)
    return leaves
