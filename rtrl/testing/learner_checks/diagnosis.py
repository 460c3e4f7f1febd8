"""Naming a wrong gradient: the mistakes that implementations really make, each computed, and compared with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._utils.functional_call import functional_call
from rtrl.cells.protocol import call_cell
from rtrl.testing.learner_checks.driver import LearnerFailed, drive
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_ALIKE = 1e-7  # relative; two mistakes are told apart, rounding is not looked at


@dataclass(frozen=True, slots=True)
class _Linear:
    """One step: J (B, H, H), B (B, H, P), the adjoint (B, H), the direct part (P,), and which entries of θ the sample
    uses at all, Boolean (B, P)."""

    dynamics: Tensor
    immediate: Tensor
    adjoint: Tensor
    direct: Tensor
    active: Tensor


def diagnose(spec: LearnerSpec, stream: Stream) -> str:
    """ "; it looks as if …", when the whole gradient is what one known mistake gives on this stream; else nothing."""
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
    fitting: dict[str, list[int]] = {}
    for words, k, mistaken in _mistakes(steps, exact, found):
        differs = float((mistaken - exact).abs().max()) > 1e3 * _ALIKE * scale
        if differs and float((mistaken - found).abs().max()) <= _ALIKE * scale:
            fitting.setdefault(words, []).append(k)
    for words, ks in fitting.items():  # the first kind; of its numbers, any may be meant
        return f"; it looks as if {words.format(k=' or '.join(map(str, ks)) if len(ks) < 4 else 'so many')}"
    return ""


def _mistakes(steps: list[_Linear], exact: Tensor, found: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Words, a number k in them, and the gradient that each mistake gives, the most specific first."""
    count, batch = len(steps), steps[0].adjoint.shape[0]
    yield "nothing were delivered", 0, torch.zeros_like(exact)
    yield "the influence advanced before the adjoint met it: off by one step", 0, _gradient(steps, after=True)
    yield "the state's past were left out: no influence is carried", 0, _gradient(steps, carry=lambda t: False)
    yield "the loss's direct path to the parameters were dropped", 0, _gradient(steps, direct=False)
    yield "losses that fall while a slice sleeps were dropped", 0, _gradient(steps, awake=True)
    for k in range(2, count):
        words = "the carry were dropped at the borders of blocks of {k} steps: truncated BPTT"
        yield words, k, _gradient(steps, carry=lambda t, k=k: (t + 1) % k != 0)  # type: ignore[misc]
    for k in range(2, count):
        yield "each loss were pulled back through {k} steps only: truncated BPTT", k, _sliding(steps, k)
    yield "the dynamics Jacobian were transposed", 0, _gradient(steps, change=lambda j: j.mT)
    yield (
        "only the diagonal of the dynamics Jacobian were used",
        0,
        _gradient(steps, change=lambda j: torch.diag_embed(j.diagonal(dim1=1, dim2=2))),
    )
    if batch > 1:
        yield "samples were averaged, not summed", 0, exact / batch
    for t in range(count):
        part = _gradient(steps, only=t)
        yield "the loss of step {k} were dropped", t, exact - part
        yield "the loss of step {k} were counted twice", t, exact + part
    factor = float(found @ exact / (exact @ exact))
    yield f"the whole gradient were multiplied by {factor:.6g}", 0, factor * exact


def _gradient(
    steps: list[_Linear],
    *,
    after: bool = False,
    direct: bool = True,
    awake: bool = False,
    carry: Callable[[int], bool] = lambda t: True,
    change: Callable[[Tensor], Tensor] = lambda j: j,
    only: int | None = None,
) -> Tensor:
    """``Σ_t ( direct + δ_t S_t )`` with mistakes.

    Args:
        after: δ_t meets S_{t+1}. direct: whether the direct part counts. awake: losses reach entries in use alone.
        carry: whether the influence survives step t. change: applied to J. only: the loss of this step alone.
    """
    influence = torch.zeros_like(steps[0].immediate)
    total = torch.zeros_like(steps[0].direct)
    for t, step in enumerate(steps):
        advanced = change(step.dynamics) @ influence + step.immediate
        if only is None or only == t:
            met = advanced if after else influence
            earned = torch.einsum("bh,bhp->bp", step.adjoint, met)
            total = total + (earned * step.active if awake else earned).sum(dim=0) + (step.direct if direct else 0)
        influence = advanced if carry(t) else torch.zeros_like(advanced)
    return total


def _sliding(steps: list[_Linear], horizon: int) -> Tensor:
    total = torch.zeros_like(steps[0].direct)
    for t in range(len(steps)):
        window = steps[max(0, t - horizon + 1) : t + 1]
        total = total + _gradient(window, only=len(window) - 1)
    return total


def _linearized(stream: Stream) -> list[_Linear]:
    """Every step by autograd, row by row."""
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
        found.append(_Linear(dynamics, immediate, adjoint.detach(), direct.detach(), active))
        h = h_next
    return found
