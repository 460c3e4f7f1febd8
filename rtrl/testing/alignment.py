"""Compare the gradients of learners with the exact one, live and along one trajectory."""

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
from rtrl.testing.lockstep import LearnerRun, MakeLearner, RngState, item_of, seed_for

OnDelivery = Callable[[int, dict[str, float]], object]
_LONGEST_BLOCK = 32  # of the default reference, however rare the syncs are
_END = object()


class Measures(NamedTuple):
    """The four numbers of ``alignment`` for one parameter, relative to its exact gradient.

    Where the exact gradient is zero, the cosine is nan, and the others are nan or, for a nonzero gradient, inf.
    """

    cosine: float
    norm_ratio: float
    bias: float
    spread: float | None


@dataclass(frozen=True, slots=True)
class Alignment:
    """The comparison of one learner with the exact one; ``alignment`` has the equations.

    Attributes:
        name: of the learner.
        cosine: of the whole stream's gradient, mean over repeats; nan if the gradient of a repeat is zero.
        norm_ratio: of the whole stream's gradient, mean over repeats; 0 if the gradient is zero.
        bias: the systematic part of the error.
        spread: the part of the error that differs between repeats; None with one repeat, 0.0 for a deterministic
            learner.
        cosines: one per sync, mean over repeats; nan where the gradient of a repeat is zero. Syncs with an exact
            gradient of zero are left out.
        steps: the step of each of these syncs, the same for all learners.
        by_parameter: the four numbers of each parameter, by name.
        repeats: R.
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
        """The root mean square ``bias`` of an unbiased rule, ``spread / √R``; None with one repeat."""
        return None if self.spread is None else self.spread / math.sqrt(self.repeats)


class Alignments(dict[str, Alignment]):
    """The ``Alignment`` of each learner, by name; ``str`` makes a table of it."""

    def __str__(self) -> str:
        """Make a table with one line per learner."""
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
    """Run learners and an exact one in lockstep along a stream with fixed parameters, and compare their gradients.

    Equation:
        Repeat r of R adds ``g_rd`` to ``.grad`` at sync d and the exact learner ``e_d``, both flat (P,). With
        ``G_r = Σ_d g_rd``, ``E = Σ_d e_d``, ``Ḡ = Σ_r G_r / R``:

            cosine     = mean_r ⟨G_r, E⟩ / (‖G_r‖ ‖E‖)          norm_ratio = mean_r ‖G_r‖ / ‖E‖
            bias       = ‖Ḡ − E‖ / ‖E‖ = ‖mean_rd (g_rd − e_d)‖ / ‖mean_d e_d‖
            spread     = √( Σ_r ‖G_r − Ḡ‖² / (R − 1) ) / ‖E‖    cosines[d] = mean_r ⟨g_rd, e_d⟩ / (‖g_rd‖ ‖e_d‖)

        The square of the ``bias`` of an unbiased rule is on average the square of ``spread`` over R: with more
        repeats it becomes smaller, and what remains is bias.

    Args:
        learners: name → ``make(cell, batch_size)``, which returns a new learner with ``step(x) -> y``,
            ``backward(loss)`` and ``sync()``, which adds to ``.grad`` of that cell's parameters.
        cell: copied for each learner and repeat, and never changed.
        stream: pairs of x, a tree of tensors with the batch as dimension 0, and ``loss(y)``, which returns a scalar
            tensor or None; the loss itself may be None. It is read once, one step at a time; cut an endless one by
            ``itertools.islice``. A loss is called once for each learner, on a copy of its y: other tensors that it
            uses receive no gradient.
        every: the number of steps between two syncs; there is a sync after the last step, too.
        exact: makes the reference; ``BlockRTRL`` with blocks of ``every`` steps, up to 32, by default.
        repeats: R, the number of runs of each learner. Each run has global random states (of PyTorch on the CPU and on
            the cell's CUDA devices, of NumPy and of Python) of its own, so that its draws are independent of all other
            runs; a learner with a fixed generator repeats itself. The stream has such states, too, and in a loss all
            learners draw the same numbers.
        seed: of all random states, in 0 … 2**32 − 1. The caller's states stay as they are.
        on_delivery: called after every sync with the number of the step, from 0 on, and the cosine of each learner so
            far by name (nan where there is none), for a live display.

    Returns:
        An ``Alignment`` for each learner, by name.

    Raises:
        ConfigError: an argument or an item of the stream is of the wrong kind, the cell has no trainable parameter,
            or the stream is empty, has no loss or an exact gradient of zero; use more steps, or other losses.
        LossError: a loss is not a scalar that depends on y.
        ParameterChangedError: a learner changed its cell.
        NonFiniteError: NaN or infinity in a gradient; the message names the learner, the step and the parameter.
        Exception: a learner raised it; a note names the learner.

    Cost:
        That of all learners, R times, and about 0.4 ms per run and step for the random states; a copy of the cell and
        P float64 numbers per run, a few times those at the end. Nothing grows with the stream but one float per
        learner and sync.

    Example:
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
    original = copied(cell)
    devices = {t.device for t in (*original.parameters(), *original.buffers()) if t.device.type == "cuda"}
    rng_state = RngState(seed_for(seed, "", 0), devices)  # of the stream; no learner has an empty name
    runs: list[LearnerRun] = []
    series: dict[str, list[float]] = {name: [] for name in learners}
    steps: list[int] = []
    step, losses = -1, 0

    def sync_all() -> None:
        exact_part = runs[0].sync_and_take(step)
        found = torch.stack([_cosine(run.sync_and_take(step), exact_part) for run in runs[1:]])
        if bool(exact_part.any()):
            steps.append(step)
            for name, cosine in zip(learners, found.reshape(-1, repeats).mean(dim=1).tolist(), strict=True):
                series[name].append(cosine)
        if on_delivery is not None:
            so_far = torch.stack([_cosine(run.total, runs[0].total) for run in runs[1:]]).reshape(-1, repeats)
            on_delivery(step, dict(zip(learners, so_far.mean(dim=1).tolist(), strict=True)))

    with torch.inference_mode(False), torch.enable_grad():
        with rng_state:
            source = iter(stream)
        while True:
            with rng_state:
                item = next(source, _END)
            if item is _END:
                break
            step += 1
            x, loss, batch = item_of(item, step)
            if not runs:
                makes = [("", 0, reference), *((n, r, make) for n, make in learners.items() for r in range(repeats))]
                runs = [
                    LearnerRun(name, i, make, original, batch, RngState(seed_for(seed, name, i + 1), devices))
                    for name, i, make in makes
                ]
            before = rng_state.state
            for run in runs:
                rng_state.state = before
                has_loss = run.advance(x, loss, rng_state, step)
                losses += has_loss and run is runs[0]
            if (step + 1) % every == 0:
                sync_all()
        if step < 0:
            raise ConfigError("the stream is empty; give at least one step with a loss")
        if not losses:
            raise ConfigError(f"none of the {step + 1} steps of the stream has a loss: there is no gradient to compare")
        if (step + 1) % every:
            sync_all()
    target = runs[0].total
    if not bool(target.any()):
        raise ConfigError("the exact gradient of the whole stream is zero: there is nothing to compare with")
    parts = dict(zip(runs[0].parameters, target.split(runs[0].sizes), strict=True))
    result = Alignments()
    for i, name in enumerate(learners):
        totals = torch.stack([run.total for run in runs[1 + i * repeats :][:repeats]])
        pairs = zip(parts.items(), totals.split(runs[0].sizes, dim=1), strict=True)
        by_parameter = {p: _measures(of_learner, of_exact) for (p, of_exact), of_learner in pairs}
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
        raise ConfigError("the cell has parameters without a shape yet; run it once before you compare learners on it")
    if not any(p.requires_grad and p.numel() for p in cell.parameters()):
        raise ConfigError("the cell has no parameter that requires a gradient")
    if isinstance(stream, Tensor | str | bytes) or not isinstance(stream, Iterable):
        raise ConfigError(f"stream must be an iterable of pairs (x, loss), got {type(stream).__name__}")
    validation.integer("every", every)
    validation.integer("repeats", repeats)
    validation.integer("seed", seed, 0, 2**32 - 1)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """The cosine of vectors along the last dimension, scaled so that no square underflows; nan where one is zero."""
    first, second = (v / v.abs().amax(dim=-1, keepdim=True) for v in (first, second))
    cosine: Tensor = (first * second).sum(dim=-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    return cosine.clamp(-1, 1)


def _measures(totals: Tensor, exact: Tensor) -> Measures:
    """Compare the totals (R, P) of a learner with the exact one (P,)."""
    repeats, largest = len(totals), exact.abs().max()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    cosine, totals, exact = _cosine(totals, exact).mean(), totals / scale, exact / scale
    off = totals - totals[0]  # relative to the first repeat, so that equal repeats have a spread of exactly zero
    mean, size = off.mean(dim=0), exact.norm()
    bias, spread = (totals[0] - exact + mean).norm() / size, (off - mean).norm() / math.sqrt(max(repeats - 1, 1)) / size
    numbers = torch.stack([cosine, totals.norm(dim=1).mean() / size, bias, spread]).tolist()
    return Measures(numbers[0], numbers[1], numbers[2], numbers[3] if repeats > 1 else None)
