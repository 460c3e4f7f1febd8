"""Diagnose a wrong gradient: compute what each common mistake gives, and compare."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtrl._utils.functional_call import functional_call
from rtrl.cells.protocol import call_cell
from rtrl.testing.learner_checks.driver import LearnerFailed, drive
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_ALIKE = 1e-7  # relative; it tells two mistakes apart and ignores rounding


_Mistake = tuple[str, Iterable[tuple[int, Tensor]]]


@dataclass(frozen=True, slots=True)
class _LinearizedStep:
    """J (B, H, H), B (B, H, P), the adjoint (B, H), the direct part of the gradient (P,), and the entries of θ that a
    sample uses, Boolean (B, P)."""

    dynamics: Tensor
    immediate: Tensor
    adjoint: Tensor
    direct: Tensor
    active: Tensor


def diagnose(spec: LearnerSpec, stream: Stream) -> str:
    """Words that name the mistake, if the whole gradient is what one known mistake gives on this stream; else none."""
    if stream.offsets is not None or stream.resets is not None:
        return ""
    try:
        gradients = drive(spec, stream).gradients
        steps = _linearized(stream)
    except (LearnerFailed, RuntimeError):
        return ""
    found = torch.cat([value.flatten() for value in gradients.values()])
    exact = _gradient(steps)
    scale = float(exact.abs().max())
    if not scale or not bool(torch.isfinite(found).all()):
        return ""
    numbers: list[int] = []
    for words, candidates in _mistakes(steps, exact, found):
        for k, mistaken in candidates:
            differs = float((mistaken - exact).abs().max()) > 1e3 * _ALIKE * scale
            if differs and float((mistaken - found).abs().max()) <= _ALIKE * scale:
                numbers.append(k)
        if numbers:  # the first kind that fits; any of its numbers may be meant
            return f"; it looks as if {words.format(k=' or '.join(map(str, numbers)) if len(numbers) < 4 else 'n')}"
    return ""


def _mistakes(steps: list[_LinearizedStep], exact: Tensor, found: Tensor) -> Iterator[_Mistake]:
    """Each kind of mistake, in words with a number k, and the gradients that it gives; the most specific kind first."""
    n_steps, batch = len(steps), steps[0].adjoint.shape[0]

    def one(**mistake: Any) -> Iterator[tuple[int, Tensor]]:
        yield 0, _gradient(steps, **mistake)

    yield "nothing were delivered", [(0, torch.zeros_like(exact))]
    yield "the influence advanced before the adjoint met it: off by one step", one(after=True)
    yield "the state's past were left out: no influence is carried", one(carry=lambda t: False)
    yield "the loss's direct path to the parameters were dropped", one(direct=False)
    yield "losses at dormant steps of a slice were dropped", one(active_only=True)
    yield (
        "the carry were dropped at the borders of blocks of {k} steps: truncated BPTT",
        ((k, _gradient(steps, carry=lambda t, k=k: (t + 1) % k != 0)) for k in range(2, n_steps)),  # type: ignore[misc]
    )
    yield "each loss were pulled back through {k} steps only: truncated BPTT", _sliding(steps)
    yield "the dynamics Jacobian were transposed", one(change=lambda j: j.mT)
    diagonal = one(change=lambda j: torch.diag_embed(j.diagonal(dim1=1, dim2=2)))
    yield "only the diagonal of the dynamics Jacobian were used", diagonal
    if batch > 1:
        yield "samples were averaged, not summed", [(0, exact / batch)]
    parts = [_gradient(steps, only=t) for t in range(n_steps)]
    yield "the loss of step {k} were dropped", ((t, exact - part) for t, part in enumerate(parts))
    yield "the loss of step {k} were counted twice", ((t, exact + part) for t, part in enumerate(parts))
    factor = float(found @ exact / (exact @ exact))
    yield f"the whole gradient were multiplied by {factor:.6g}", [(0, factor * exact)]


def _gradient(
    steps: list[_LinearizedStep],
    *,
    after: bool = False,
    direct: bool = True,
    active_only: bool = False,
    carry: Callable[[int], bool] = lambda t: True,
    change: Callable[[Tensor], Tensor] = lambda j: j,
    only: int | None = None,
) -> Tensor:
    """``Σ_t ( direct + δ_t S_t )`` with mistakes.

    Args:
        after: multiply δ_t by S_{t+1}.
        direct: include the direct part.
        active_only: a loss reaches only the entries that its step uses.
        carry: whether the influence is kept after step t.
        change: is applied to J.
        only: use the loss of this step only.
    """
    influence = torch.zeros_like(steps[0].immediate)
    total = torch.zeros_like(steps[0].direct)
    for t, step in enumerate(steps):
        advanced = change(step.dynamics) @ influence + step.immediate
        if only is None or only == t:
            through_state = torch.einsum("bh,bhp->bp", step.adjoint, advanced if after else influence)
            if active_only:
                through_state = through_state * step.active
            total = total + through_state.sum(dim=0) + (step.direct if direct else 0)
        influence = advanced if carry(t) else torch.zeros_like(advanced)
    return total


def _sliding(steps: list[_LinearizedStep]) -> Iterator[tuple[int, Tensor]]:
    """Each horizon k from 2 on, and the gradient if every loss is pulled back through its last k steps only."""
    by_horizon = [torch.zeros_like(steps[0].direct) for _ in steps]
    for t, step in enumerate(steps):
        adjoint, gradient = step.adjoint, step.direct
        for past, total in enumerate(by_horizon):
            if 0 < past <= t:
                earlier = steps[t - past]
                gradient = gradient + torch.einsum("bh,bhp->p", adjoint, earlier.immediate)
                adjoint = torch.einsum("bh,bhi->bi", adjoint, earlier.dynamics)
            total += gradient
    yield from ((k, by_horizon[k - 1]) for k in range(2, len(steps)))


def _linearized(stream: Stream) -> list[_LinearizedStep]:
    """Linearize every step by autograd, row by row."""
    names = [name for name, p in stream.cell.named_parameters() if p.requires_grad]
    values = dict(stream.cell.named_parameters())
    h: Tensor = stream.cell.init_state(stream.batch_size)  # type: ignore[operator]
    found = []
    for t in range(stream.steps):
        theta = {name: values[name].detach().clone().requires_grad_() for name in names}
        h = h.detach().clone().requires_grad_()
        with torch.enable_grad():
            y, h_next, sparsity = call_cell(
                lambda *args, theta=theta, **kwargs: functional_call(stream.cell, theta, args, kwargs),
                stream.xs[t],
                h,
                None,
            )
            loss = stream.loss(t, y)
        inputs = [h, *theta.values()]

        def pulled(value: Tensor, inputs: list[Tensor] = inputs) -> tuple[Tensor, Tensor]:
            by_state, *by_theta = torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
            return by_state.flatten(1), torch.cat([g.flatten() for g in by_theta])

        batch, size = h.flatten(1).shape
        dynamics = h.new_zeros(batch, size, size)
        immediate = h.new_zeros(batch, size, sum(values[name].numel() for name in names))
        for b in range(batch):
            for i in range(size):
                by_state, by_theta = pulled(h_next.flatten(1)[b, i])
                dynamics[b, i], immediate[b, i] = by_state[b], by_theta
        adjoint, direct = torch.zeros_like(dynamics[:, 0]), torch.zeros_like(immediate[0, 0])
        if loss is not None and loss.requires_grad:
            adjoint, direct = pulled(loss)
        active = torch.ones_like(immediate[:, 0], dtype=torch.bool)
        offset = 0
        for name in names:
            shape = values[name].shape
            if name in sparsity.active:
                used = torch.zeros(batch, shape[0], dtype=torch.bool, device=h.device)
                used.scatter_(1, sparsity.active[name], True)
                each = shape.numel() // shape[0]
                active[:, offset : offset + shape.numel()] = used.repeat_interleave(each, dim=1)
            offset += shape.numel()
        found.append(_LinearizedStep(dynamics, immediate, adjoint.detach(), direct.detach(), active))
        h = h_next
    return found
