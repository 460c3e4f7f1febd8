"""Known mistakes of learners, and the gradient that each of them gives on a linearised stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rtrl.testing.linearized_steps import LinearizedStep, LinearizedStream

Numbered = Iterator[tuple[float, Tensor]]
_NEWTON = 12  # steps of the search for a constant


@dataclass(frozen=True)
class Mistake:
    """One kind of mistake.

    Attributes:
        words: what looks as if it were so; ``{k}`` stands for a number.
        gradients: the number of each variant, and the gradient (P,) that it gives.
        part: the part of the recursion that it changes; mistakes of different parts can be combined.
        options: of ``gradient`` for the variants that are combined with others, by their number.
    """

    words: str
    gradients: Callable[[], Numbered]
    part: str = ""
    options: dict[float, dict[str, Any]] = field(default_factory=dict)


def gradient(
    linear: LinearizedStream,
    *,
    after: bool = False,
    direct: float = 1.0,
    through: float = 1.0,
    active_only: bool = False,
    carry: Callable[[int], bool] = lambda t: True,
    change: Callable[[LinearizedStep], Tensor] = lambda step: step.dynamics,
    resets: bool = True,
    start: bool = True,
    only: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Compute ``Σ_t ( direct + δ_t S_t )`` with mistakes.

    Args:
        linear: the stream.
        after: multiply δ_t by S_{t+1}.
        direct: a factor of the direct part.
        through: a factor of the part through the state.
        active_only: a loss reaches only the entries that its step uses.
        carry: whether the influence is kept after step t.
        change: what is used as J.
        resets: whether a reset clears the influence.
        start: whether the first state has an influence.
        only: use the loss of this step only.
        scale: a factor of the whole.
    """
    influence = linear.first_influence * start
    total = torch.zeros_like(linear.steps[0].direct)
    for t, step in enumerate(linear.steps):
        if resets:
            influence = step.restarted(influence)
        advanced = change(step) @ influence + step.immediate
        if only is None or only == t:
            through_state = torch.einsum("bh,bhp->bp", step.adjoint, advanced if after else influence)
            if active_only:
                through_state = through_state * _active(linear, step)
            total = total + through * through_state.sum(dim=0) + direct * step.direct
        influence = advanced if carry(t) else torch.zeros_like(advanced)
    return scale * total


def mistakes(linear: LinearizedStream, found: Tensor) -> Iterator[Mistake]:
    """Every kind of mistake, the most specific first, some with constants that are fitted to what was found."""
    steps, batch = linear.steps, len(linear.steps[0].adjoint)
    exact = gradient(linear)

    def one(words: str, part: str, **options: Any) -> Mistake:
        return Mistake(words, lambda: iter([(0, gradient(linear, **options))]), part, {0: options})

    def fitted(words: str, base: Tensor, direction: Tensor) -> Mistake:
        return Mistake(words, lambda: _fitted(found, base, direction))

    yield Mistake("nothing were delivered", lambda: iter([(0, torch.zeros_like(exact))]))
    yield one("the influence advanced before the adjoint met it: off by one step", "adjoint", after=True)
    yield one("the state's past were left out: no influence is carried", "carry", carry=lambda t: False)
    yield one("the loss's direct path to the parameters were dropped", "direct", direct=0.0)
    if any(step.sparsity.active for step in steps):
        yield one("losses at dormant steps of a slice were dropped", "losses", active_only=True)
    blocks: dict[int, dict[str, Any]] = {k: {"carry": _cut_at_borders(k)} for k in range(2, len(steps))}
    yield Mistake(
        "the carry were dropped at the borders of blocks of {k} steps: truncated BPTT",
        lambda: ((k, gradient(linear, **options)) for k, options in blocks.items()),
        "carry",
        {k: blocks[k] for k in list(blocks)[:7]},
    )
    yield Mistake("each loss were pulled back through {k} steps only: truncated BPTT", lambda: _sliding(linear))
    yield one("the dynamics Jacobian were transposed", "dynamics", change=lambda step: step.dynamics.mT)
    yield one("only the diagonal of the dynamics Jacobian were used", "dynamics", change=_diagonal)
    for words, change in _SPARSE:
        if any(step.sparsity.writes is not None for step in steps):
            yield one(words, "dynamics", change=change)
    yield one("a decay were taken as the identity", "dynamics", change=_without_decay)
    if any(step.fresh is not None for step in steps):
        yield one("a reset kept the influence", "resets", resets=False)
    if bool(linear.first_influence.any()):
        yield one("the learned first state had no influence", "start", start=False)
    if batch > 1:
        yield one("samples were averaged, not summed", "scale", scale=1 / batch)
    losses = [gradient(linear, only=t) for t in range(len(steps))]
    yield Mistake("the loss of step {k} were dropped", lambda: ((t, exact - loss) for t, loss in enumerate(losses)))
    yield Mistake("the loss of step {k} were counted twice", lambda: ((t, exact + g) for t, g in enumerate(losses)))
    by_state = gradient(linear, direct=0.0)
    yield fitted("the whole gradient were multiplied by {k:.6g}", torch.zeros_like(exact), exact)
    yield fitted("the loss's direct path were multiplied by {k:.6g}", by_state, exact - by_state)
    yield fitted("the part through the state were multiplied by {k:.6g}", exact - by_state, by_state)
    yield Mistake(
        "the influence were multiplied by {k:.6g} whenever it is carried",
        lambda: _searched(found, 1.0, lambda k: gradient(linear, change=lambda step: k * step.dynamics)),
    )
    yield Mistake(
        "every diagonal entry of the dynamics Jacobian were off by {k:.6g}: a decay taken as another one, or as the "
        "identity",
        lambda: _searched(found, 0.0, lambda k: gradient(linear, change=lambda step: _shifted(step, k))),
    )


def _cut_at_borders(k: int) -> Callable[[int], bool]:
    return lambda t: (t + 1) % k != 0


def _fitted(found: Tensor, base: Tensor, direction: Tensor) -> Numbered:
    """The best ``base + k · direction``."""
    size = float(direction @ direction)
    if size:
        k = float((found - base) @ direction) / size
        yield k, base + k * direction


def _searched(found: Tensor, first: float, function: Callable[[float], Tensor]) -> Numbered:
    """The k near ``first`` for which a function comes closest to what was found."""
    k, width = first, 1e-6
    for _ in range(_NEWTON):
        value = function(k)
        slope = (function(k + width) - value) / width
        size = float(slope @ slope)
        change = float((found - value) @ slope) / size if size else 0.0
        k += max(-0.5, min(0.5, change))
        if abs(change) < 1e-12 or not abs(k) < 10:
            break
    yield k, function(k)


def _sliding(linear: LinearizedStream) -> Numbered:
    """Each horizon k from 2 on, and the gradient if every loss is pulled back through its last k steps only."""
    steps = linear.steps
    by_horizon = [torch.zeros_like(steps[0].direct) for _ in steps]
    for t, step in enumerate(steps):
        adjoint, total = step.adjoint, step.direct
        for past, whole in enumerate(by_horizon):
            if 0 < past <= t:
                earlier, later = steps[t - past], steps[t - past + 1]
                if later.fresh is not None:
                    adjoint = adjoint.masked_fill(later.fresh.unsqueeze(1), 0.0)
                total = total + torch.einsum("bh,bhp->p", adjoint, earlier.immediate)
                adjoint = torch.einsum("bh,bhi->bi", adjoint, earlier.dynamics)
            whole += total
    yield from ((k, by_horizon[k - 1]) for k in range(2, len(steps)))


def _active(linear: LinearizedStream, step: LinearizedStep) -> Tensor:
    """The entries of θ that each sample uses, Boolean (B, P)."""
    parts = []
    batch = len(step.adjoint)
    for name, shape in linear.shapes.items():
        if name in step.sparsity.active:
            used = torch.zeros(batch, shape[0], dtype=torch.bool, device=step.adjoint.device)
            used.scatter_(1, step.sparsity.active[name], True)
            parts.append(used.repeat_interleave(shape.numel() // shape[0], dim=1))
        else:
            parts.append(torch.ones(batch, shape.numel(), dtype=torch.bool, device=step.adjoint.device))
    return torch.cat(parts, dim=1)


def _diagonal(step: LinearizedStep) -> Tensor:
    return torch.diag_embed(step.dynamics.diagonal(dim1=1, dim2=2))


def _shifted(step: LinearizedStep, by: float) -> Tensor:
    return step.dynamics + by * torch.eye(step.dynamics.shape[1]).to(step.dynamics)


def _without_decay(step: LinearizedStep) -> Tensor:
    """J with 1 on the diagonal of entries that depend on themselves alone."""
    diagonal = step.dynamics.diagonal(dim1=1, dim2=2)
    alone = (step.dynamics != 0).sum(dim=2).eq(1) & (diagonal != 0)
    return torch.where(alone.unsqueeze(2), torch.eye(diagonal.shape[1]).to(step.dynamics), step.dynamics)


def _entries(step: LinearizedStep, rows: Tensor | None) -> Tensor:
    """The entries of the state in some of its rows, Boolean (B, H)."""
    n, batch = step.h.shape[1], len(step.h)
    if rows is None:
        return torch.ones(batch, step.adjoint.shape[1], dtype=torch.bool, device=step.h.device)
    chosen = torch.zeros(batch, n, dtype=torch.bool, device=step.h.device).scatter_(1, rows, True)
    return chosen.repeat_interleave(step.adjoint.shape[1] // n, dim=1)


def _without_own_columns(step: LinearizedStep) -> Tensor:
    """The rows written depend only on the rows read."""
    written, read = _entries(step, step.sparsity.writes), _entries(step, step.sparsity.reads)
    return step.dynamics.masked_fill(written.unsqueeze(2) & (written & ~read).unsqueeze(1), 0.0)


def _without_read_columns(step: LinearizedStep) -> Tensor:
    """The rows written depend only on themselves."""
    written = _entries(step, step.sparsity.writes)
    return step.dynamics.masked_fill(written.unsqueeze(2) & ~written.unsqueeze(1), 0.0)


def _without_copied_rows(step: LinearizedStep) -> Tensor:
    return step.dynamics * _entries(step, step.sparsity.writes).unsqueeze(2)


_SPARSE = (
    ("the columns of the rows written were dropped where they are not read", _without_own_columns),
    ("the columns of the rows read were dropped where they are not written", _without_read_columns),
    ("rows that are not written lost their influence", _without_copied_rows),
)
