"""Compare what a cell computes with what it must compute, and name the first place where they differ."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rtrl._engine import checks
from rtrl._utils.real_pairs import as_real
from rtrl.testing.cell_checks.points import EvaluationPoint
from rtrl.testing.report import Found

STATE = "the state"  # a key beside names of parameters, which have no spaces


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit; NaN equals NaN."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _place(index: list[int], what: str, point: EvaluationPoint, sample: int | None) -> tuple[int | None, str]:
    """The sample and the words for an index into a parameter, or into a tensor whose dimension 0 is the batch."""
    spot = "the perturbed point" if point.perturbed else "the point as given"
    if sample is not None:
        return sample, f"{what}[{', '.join(map(str, index))}] at {spot}"
    if what == "row":
        words = f"row {index[1]}" + (f", element {tuple(index[2:])}" if len(index) > 2 else "")
    else:
        words = f"{what}, element {tuple(index[1:])}" if len(index) > 1 else what
    return index[0], f"{words} at {spot}"


def _first(bad: Tensor) -> list[int]:
    return [int(i) for i in bad.nonzero()[0]]


def differs(
    message: str,
    point: EvaluationPoint,
    found: Tensor,
    expected: Tensor,
    what: str,
    *,
    exact: bool = False,
    offset: int = 0,
) -> Iterator[Found]:
    """Report where two batches differ: in any bit if ``exact``, else by more than another order of rounding explains.

    Args:
        what: the name of the tensor, or "row" for a state.
        offset: the sample at index 0.
    """
    found, expected = as_real(found.detach()), as_real(expected.detach())
    if found.shape != expected.shape or found.dtype != expected.dtype:
        forms = [f"{tuple(t.shape)} {t.dtype}" for t in (found, expected)]
        yield Found(message, point.step, None, what, *forms)
        return
    if same_bits(found, expected) or (not exact and checks.nearly_equal(found, expected)):
        return
    bad = (found != expected) & ~(found.isnan() & expected.isnan())
    if not exact:  # the largest difference; the first may be rounding
        gap = (found - expected).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).where(bad, 0.0)
        bad = gap == gap.max()
    index = _first(bad)
    values = [f"{float(t[tuple(index)]):.17g}" for t in (found, expected)]
    sample, where = _place([index[0] + offset, *index[1:]], what, point, None)
    yield Found(message, point.step, sample, where, *values)


def must_be_zero(
    message: str, point: EvaluationPoint, grad: Tensor, what: str, *, sample: int | None = None, offset: int = 0
) -> Iterator[Found]:
    """Report the first derivative that must be zero but is not; another check reports what is not finite.

    Args:
        grad: the gradient of a parameter if ``sample`` is given, else (B, ...).
        offset: the sample at index 0.
    """
    grad = as_real(grad)
    bad = torch.isfinite(grad) & (grad != 0)
    if not bool(bad.any()):
        return
    index = _first(bad)
    value = f"{float(grad[tuple(index)]):.17g}"
    if sample is None:
        index = [index[0] + offset, *index[1:]]
    number, where = _place(index, what, point, sample)
    yield Found(message, point.step, number, where, value, "0")


def not_finite(
    message: str, point: EvaluationPoint, value: Tensor, what: str, *, samples: bool = True
) -> Iterator[Found]:
    """Report the first NaN or infinity."""
    value = as_real(value)
    if bool(torch.isfinite(value).all()):
        return
    index = _first(~torch.isfinite(value))
    if samples:
        sample, where = _place(index, what, point, None)
    else:
        sample, where = None, f"parameter {what}[{', '.join(map(str, index))}]"
    yield Found(message, point.step, sample, where, str(float(value[tuple(index)])), "a finite number")


def gradients(
    point: EvaluationPoint,
    heads: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    state: bool = False,
    parameters: bool = True,
) -> dict[str, Tensor]:
    """Differentiate ``Σ weights · head`` by every trainable parameter, and by the state under ``STATE``; zeros where it
    does not depend on one. The graph is kept."""
    inputs: dict[str, Tensor] = {STATE: point.h} if state else {}
    if parameters:
        inputs |= {name: p for name, p in point.cell.named_parameters() if p.requires_grad}
    live = {what: head for what, head in heads.items() if head.requires_grad and head.numel()}
    if not live or not inputs:
        return {name: torch.zeros_like(value) for name, value in inputs.items()}
    cotangents = [torch.ones_like(head) if weights is None else weights[what] for what, head in live.items()]
    grads = torch.autograd.grad(
        list(live.values()), list(inputs.values()), cotangents, retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(value) if grad is None else grad.detach().to_dense() if grad.is_sparse else grad.detach()
        for (name, value), grad in zip(inputs.items(), grads, strict=True)
    }


def only(i: int, values: Tensor) -> Tensor:
    """Keep the values of sample i, and set all others to zero."""
    return torch.zeros_like(values).index_copy_(0, torch.tensor([i], device=values.device), values[i : i + 1])
