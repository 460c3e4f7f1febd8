"""A live comparison of learners: how far the gradient of each is from the exact one, along one trajectory."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.testing.cell_checks.points import copied
from rtrl.testing.lockstep import Draws, MakeLearner, Run, item_of, seed_for

OnDelivery = Callable[[int, dict[str, float]], object]
_LONGEST_BLOCK = 32  # of the default reference: a rare delivery should not cost it a block as long
_END = object()


class Measures(NamedTuple):
    """The four numbers of ``alignment``, of one parameter alone, relative to its own exact gradient.

    Where that is zero, the cosine is nan, and the others are nan or, for a learner that delivers something, inf.
    """

    cosine: float
    norm_ratio: float
    bias: float
    spread: float | None


@dataclass(frozen=True, slots=True)
class Alignment:
    """How one learner compares with the exact one; ``alignment`` has the equations.

    Attributes:
        cosine, norm_ratio: of the whole stream's gradient, mean over repeats. A learner that delivers nothing has norm
            ratio 0 and cosine nan; with one such repeat among several, the cosine is nan as well.
        bias: the systematic part of the error. spread: what scatters between repeats; None with one repeat, 0.0 for
            a learner that leaves nothing to chance.
        cosines: one a delivery, mean over repeats; nan where a repeat delivers nothing. steps: the step of each, the
            same for all learners. Deliveries with an exact gradient of zero are in neither.
        by_parameter: name → the same four numbers of this parameter. repeats: R.
    """

    name: str
    cosine: float
    norm_ratio: float
    bias: float
    spread: float | None
    cosines: tuple[float, ...]
    steps: tuple[int, ...]
    by_parameter: Mapping[str, Measures]
    repeats: int

    @property
    def by_chance(self) -> float | None:
        """``spread / √R``: the bias that a rule without any shows, root mean square; None with one repeat."""
        return None if self.spread is None else self.spread / math.sqrt(self.repeats)


class Alignments(dict[str, Alignment]):
    """name → ``Alignment``, in the order of the learners; ``str`` makes a table of it."""

    def __str__(self) -> str:
        """One line a learner."""
        rows: list[tuple[str, ...]] = [("learner", "cosine", "norm ratio", "bias", "by chance", "spread")]
        for a in self.values():
            sizes = ["-" if size is None else f"{size:.2g}" for size in (a.bias, a.by_chance, a.spread)]
            rows.append((a.name, f"{a.cosine:.4f}", f"{a.norm_ratio:.4f}", *sizes))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(text.rjust(n) for text, n in zip(row[1:], widths[1:], strict=True)) for row in rows]
        return "\n".join(f"{row[0].ljust(widths[0])}  {line}" for row, line in zip(rows, lines, strict=True))


def alignment(
    learners: Mapping[str, MakeLearner],
    cell: nn.Module,
    stream: Iterable[tuple[Any, Callable[[Any], Tensor | None] | None]],
    *,
    every: int = 1,
    exact: MakeLearner | None = None,
    repeats: int = 1,
    seed: int = 0,
    on_delivery: OnDelivery | None = None,
) -> Alignments:
    """Walk learners and an exact one side by side along a stream, with parameters that stay, and compare what they add
    to ``.grad``.

    Equation, where repeat r of R delivers ``g_rd`` at delivery d and the exact learner ``e_d``, both flat (P,), with
    ``G_r = Σ_d g_rd``, ``E = Σ_d e_d``, ``Ḡ = Σ_r G_r / R``:

        cosine     = mean_r ⟨G_r, E⟩ / (‖G_r‖ ‖E‖)          norm_ratio = mean_r ‖G_r‖ / ‖E‖
        bias       = ‖Ḡ − E‖ / ‖E‖ = ‖mean_rd (g_rd − e_d)‖ / ‖mean_d e_d‖
        spread     = √( Σ_r ‖G_r − Ḡ‖² / (R − 1) ) / ‖E‖    cosines[d] = mean_r ⟨g_rd, e_d⟩ / (‖g_rd‖ ‖e_d‖)

    Of a rule without bias, the square of ``bias`` is on average that of ``spread`` over R: more repeats make it
    smaller, and what stays is bias.

    Args:
        learners: name → ``make(cell, batch_size)``, a new learner with ``step(x) -> y``, ``backward(loss)`` and
            ``sync()``, which adds to ``.grad`` of that cell's parameters.
        cell: copied for each learner and repeat, itself never changed.
        stream: pairs of x, a tree of tensors with the batch as dimension 0, and ``loss(y)``, a scalar tensor or None;
            the loss itself may be None. Taken once, one step at a time; cut an endless one by ``itertools.islice``.
            A loss is called once for each learner, on a copy of its y: what else it reaches gets no gradient.
        every: deliveries come after so many steps, and after the last one.
        exact: makes the reference; ``BlockRTRL`` with blocks of ``every`` steps, up to 32, by default.
        repeats: R, how often each learner is run. Each run has global random states (PyTorch's on the CPU and on the
            cell's CUDA devices, NumPy's, Python's) of its own, so draws are independent of each other and of which
            other learners there are; a learner with a fixed generator of its own repeats itself. The stream has such
            states, too, and in a loss all learners meet the same ones.
        seed: of all of these, in 0 … 2**32 − 1. The caller's states stay as they are.
        on_delivery: called with the step's number, from 0 on, and name → the cosine up to there (nan where there is
            none), for a live display; after every delivery.

    Raises:
        ConfigError: an argument or an item of the stream is of the wrong kind; the cell has no trainable parameter;
            the stream is empty or without loss, or its exact gradient is zero, so that nothing can be compared: give
            more steps, or other losses.
        LossError: a loss is no scalar that depends on y. ParameterChangedError: a learner changed its cell.
        NonFiniteError: NaN or infinity in a gradient; names the learner, the step and the parameter.
        And whatever a learner raises, with a note that names it.

    Cost: that of all learners, R times, and about 0.4 ms a run and step for the random states; a copy of the cell and
        P float64 numbers for each run, a few times those at the end. Nothing grows with the stream but one float for
        each learner and delivery.

    >>> import torch, rtrl
    >>> from rtrl.learners import BPTT, TBPTT
    >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4)).double()
    >>> stream = [(torch.ones(2, 3, dtype=torch.float64), lambda y: y.square().sum())] * 6
    >>> learners = {"bptt": BPTT, "last step": lambda cell, batch: TBPTT(cell, batch, horizon=1)}
    >>> found = alignment(learners, cell, stream, every=4)
    >>> found["bptt"].bias < 1e-12 < found["last step"].bias, found["bptt"].steps
    (True, (3, 5))
    >>> str(found).split()[:3]  # a table
    ['learner', 'cosine', 'norm']
    """
    _check(learners, cell, stream, every, exact, repeats, seed, on_delivery)
    reference = exact or (lambda cell, batch: BlockRTRL(cell, batch, block=min(every, _LONGEST_BLOCK)))
    own = copied(cell)
    devices = {t.device for t in (*own.parameters(), *own.buffers()) if t.device.type == "cuda"}
    draws = Draws(seed_for(seed, "", 0), devices)  # of the stream; no learner has an empty name
    runs: list[Run] = []
    series: dict[str, list[float]] = {name: [] for name in learners}
    steps: list[int] = []
    step, losses = -1, 0

    def deliver() -> None:
        piece = runs[0].deliver(step)
        found = torch.stack([_cosine(run.deliver(step), piece) for run in runs[1:]])
        if bool(piece.any()):
            steps.append(step)
            for name, cosine in zip(learners, found.reshape(-1, repeats).mean(dim=1).tolist(), strict=True):
                series[name].append(cosine)
        if on_delivery is not None:
            so_far = torch.stack([_cosine(run.total, runs[0].total) for run in runs[1:]]).reshape(-1, repeats)
            on_delivery(step, dict(zip(learners, so_far.mean(dim=1).tolist(), strict=True)))

    with torch.inference_mode(False), torch.enable_grad():
        with draws:
            source = iter(stream)
        while True:
            with draws:
                item = next(source, _END)
            if item is _END:
                break
            step += 1
            x, loss, batch = item_of(item, step)
            if not runs:
                makes = [("", 0, reference), *((n, r, make) for n, make in learners.items() for r in range(repeats))]
                runs = [Run(n, r, make, own, batch, Draws(seed_for(seed, n, r + 1), devices)) for n, r, make in makes]
            before = draws.state
            for run in runs:
                draws.state = before
                given = run.walk(x, loss, draws, step)
                losses += given and run is runs[0]
            if (step + 1) % every == 0:
                deliver()
        if step < 0:
            raise ConfigError("the stream is empty; give at least one step with a loss")
        if not losses:
            raise ConfigError(f"none of the {step + 1} steps of the stream has a loss: there is no gradient to compare")
        if (step + 1) % every:
            deliver()
    target = runs[0].total
    if not bool(target.any()):
        raise ConfigError("the exact gradient of the whole stream is zero: there is nothing to compare with")
    parts = dict(zip(runs[0].parameters, target.split(runs[0].sizes), strict=True))
    result = Alignments()
    for i, name in enumerate(learners):
        totals = torch.stack([run.total for run in runs[1 + i * repeats :][:repeats]])
        mine = zip(parts.items(), totals.split(runs[0].sizes, dim=1), strict=True)
        by_parameter = {p: _measures(of_learner, of_exact) for (p, of_exact), of_learner in mine}
        whole = _measures(totals, target)
        result[name] = Alignment(name, *whole, tuple(series[name]), tuple(steps), by_parameter, repeats)
    return result


def _check(
    learners: Any, cell: Any, stream: Any, every: Any, exact: Any, repeats: Any, seed: Any, on_delivery: Any
) -> None:
    if not isinstance(learners, Mapping) or not learners:
        raise ConfigError(f"learners must map at least one name to make(cell, batch_size), got {learners!r}")
    for name, make in learners.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"the name of a learner must be a string that is not empty, got {name!r}")
        if not callable(make):
            raise ConfigError(f"learner {name!r} must be a callable make(cell, batch_size), got {type(make).__name__}")
    for what, function in (("exact", exact), ("on_delivery", on_delivery)):
        if function is not None and not callable(function):
            raise ConfigError(f"{what} must be callable or None, got {type(function).__name__}")
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in cell.parameters()):
        raise ConfigError("the cell has parameters without a shape yet; run it once before learners are compared on it")
    if not any(p.requires_grad and p.numel() for p in cell.parameters()):
        raise ConfigError("the cell has no parameter that requires a gradient")
    if isinstance(stream, Tensor | str | bytes) or not isinstance(stream, Iterable):
        raise ConfigError(f"stream must be an iterable of pairs (x, loss), got {type(stream).__name__}")
    validation.integer("every", every)
    validation.integer("repeats", repeats)
    validation.integer("seed", seed, 0, 2**32 - 1)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of vectors along the last dimension; nan where one is zero. Scaled first, so that no square underflows."""
    one, other = (v / v.abs().amax(dim=-1, keepdim=True) for v in (one, other))
    cosine: Tensor = (one * other).sum(dim=-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    return cosine.clamp(-1, 1)


def _measures(totals: Tensor, exact: Tensor) -> Measures:
    """Of totals (R, P) against the exact one (P,)."""
    repeats, largest = len(totals), exact.abs().max()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    cosine, totals, exact = _cosine(totals, exact).mean(), totals / scale, exact / scale
    off = totals - totals[0]  # from the first repeat, so that equal ones have a spread of exactly zero
    mean, size = off.mean(dim=0), exact.norm()
    bias, spread = (totals[0] - exact + mean).norm() / size, (off - mean).norm() / math.sqrt(max(repeats - 1, 1)) / size
    numbers = torch.stack([cosine, totals.norm(dim=1).mean() / size, bias, spread]).tolist()
    return Measures(numbers[0], numbers[1], numbers[2], numbers[3] if repeats > 1 else None)
