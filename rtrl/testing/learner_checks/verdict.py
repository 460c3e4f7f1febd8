"""Decide by its law whether a learner's gradient is right, and find the first step at which it is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtrl._utils.formatting import first_line
from rtrl.cells.protocol import call_cell
from rtrl.testing.compare import FLOAT64, RELATIVE, Tolerance, worst_difference
from rtrl.testing.driver import trainable
from rtrl.testing.laws import Exact, Gradients, Law, Unbiased, shortened
from rtrl.testing.learner_checks.diagnosis import diagnose
from rtrl.testing.learner_checks.driver import LearnerFailed, StreamDriver, drive
from rtrl.testing.report import Found
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_FLOOR_OF_ALL = 1e-6  # the smallest scale of a slice that cancels to almost nothing, relative to all parameters
_LINEAR_SEARCH = 40  # up to this many candidates, the first wrong step is searched one by one, beyond it by halving
_DIAGNOSED = 40  # the number of steps that the diagnosis looks at, unless the first wrong step comes later


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A value that differs from the law's: its place, both values, and a message where the place does not say it."""

    where: str
    found: str
    expected: str
    step: int | None = None
    message: str = ""
    traceback: str = ""

    def as_found(self, message: str, step: int | None = None) -> Found:
        """What a check reports of it."""
        return Found(message, step, None, self.where, self.found, self.expected, self.traceback)


def compare(found: Gradients, expected: Gradients, tolerance: Tolerance = FLOAT64) -> Mismatch | None:
    """The entry with the largest error, if it is larger than rounding explains."""
    worst = worst_difference(found, expected, floor=tolerance.floor, floor_of_all=_FLOOR_OF_ALL, nonzero="none")
    if worst.error <= tolerance.relative:
        return None
    return Mismatch(f"parameter {worst.place}", f"{worst.actual:.17g}", f"{worst.expected:.17g}")


def evaluate(
    law: Law, spec: LearnerSpec, stream: Stream, seed: int, reference: Gradients | None = None
) -> Mismatch | None:
    """What is wrong with the gradient of one stream, or None; ``reference`` is the law's, if it is known already."""
    try:
        if isinstance(law, Unbiased):
            return _evaluate_mean(law, spec, stream, seed)
        outcome = drive(spec, stream)
        expected = law.reference(stream, outcome.learner) if reference is None else reference
        return compare(outcome.gradients, expected, spec.tolerance)
    except LearnerFailed as failed:
        return Mismatch("", "", "", failed.step, str(failed), failed.traceback)


def _evaluate_mean(law: Unbiased, spec: LearnerSpec, stream: Stream, seed: int) -> Mismatch | None:
    """Up to four times as many draws as declared, while they scatter too much."""
    exact = law.reference(stream, None)
    directions = {words: _joined(part) for words, part in law.directions(stream).items()}
    directions = {words: part for words, part in directions.items() if bool(part.any())}
    draws: list[Tensor] = []
    for n in (law.draws, 2 * law.draws, 4 * law.draws):
        for draw in range(len(draws), n):
            torch.manual_seed((seed << 20) + draw)
            gradients = drive(spec, stream).gradients
            draws.append(_joined({name: gradients[name] for name in exact}))
        mismatch = _judge_mean(law, torch.stack(draws), exact, directions)
        if mismatch is None or not mismatch.message.endswith("use more draws"):
            return mismatch
    return mismatch


def _judge_mean(law: Unbiased, draws: Tensor, exact: Gradients, directions: dict[str, Tensor]) -> Mismatch | None:
    flat = _joined(exact)
    units = torch.stack([flat * 0, *(part / part.norm() for part in directions.values())])[1:]
    values = torch.cat([draws, draws @ units.T], dim=1)
    expected = torch.cat([flat, units @ flat])
    mean, error = values.mean(dim=0), values.std(dim=0) / len(draws) ** 0.5
    rounding = RELATIVE * float(flat.norm())  # for entries without chance
    allowed = law.quantile(len(expected)) * error + rounding
    gap = (mean - expected).abs().nan_to_num(nan=torch.inf)
    if float(error.max()) == 0 and bool((gap > allowed).any()):
        return Mismatch("", "", "", None, "all draws are equal; a learner must draw from PyTorch's global generator")
    if bool((gap > allowed).any()):
        worst = int((gap / allowed).argmax())
        where = _entry(exact, worst) if worst < len(flat) else _along(list(directions)[worst - len(flat)])
        n_errors = float(gap[worst] / error[worst]) if float(error[worst]) else float("inf")
        found = f"{float(mean[worst]):.6g} ({n_errors:.3g} standard errors off)"
        return Mismatch(f"{where}, mean of {len(draws)} draws", found, f"{float(expected[worst]):.6g}")
    for i, (words, direction) in enumerate(directions.items(), len(flat)):
        size = float(direction.norm())  # by which a gradient without this part is off
        if float(allowed[i]) >= size:
            found = f"{float(mean[i]):.3g} ± {float(allowed[i]):.3g}"
            message = "the draws scatter so much that a gradient without it would pass as well; use more draws"
            return Mismatch(_along(words), found, f"{float(expected[i]):.3g}", message=message)
    return None


def _joined(gradient: Gradients) -> Tensor:
    return torch.cat([value.flatten() for value in gradient.values()])


def _along(words: str) -> str:
    return f"the component along {words}"


def _entry(exact: Gradients, flat: int) -> str:
    for name, value in exact.items():
        if flat < value.numel():
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), value.shape)]
            return f"parameter {name}{index if index else ''}"
        flat -= value.numel()
    raise IndexError(flat)


def gradient_failures(
    spec: LearnerSpec, stream: Stream, seed: int, treatment: str = "", plain: Stream | None = None
) -> Iterator[Found]:
    """What is wrong with the gradient after a stream, at the first step after which it is wrong.

    Args:
        treatment: what is done to the stream, in words.
        plain: the stream without it.
    """
    law = spec.law
    stream = shortened(law, stream)
    name = f"{stream.name}, {treatment}" if treatment else stream.name
    exact = law.reference(stream, None) if isinstance(law, Exact) else Exact().reference(stream, None)
    if not any(bool(value.any()) for value in exact.values()):
        yield Found(f"{name}: the exact gradient is zero everywhere, so this stream proves nothing")
        return
    if not all(bool(torch.isfinite(value).all()) for value in exact.values()):
        yield Found(f"{name}: the exact gradient is not finite, so this stream proves nothing")
        return
    whole = evaluate(law, spec, stream, seed, exact if isinstance(law, Exact) else None)
    if whole is None:
        return
    if whole.message:
        yield whole.as_found(f"{name}: {whole.message}", whole.step)
        return
    steps, first = _first_wrong(lambda n: evaluate(law, spec, stream.prefix(n), seed), _steps_with_loss(stream), whole)
    shortest = stream.prefix(steps)
    sample, about_samples = None, ""
    if shortest.batch_size > 1 and spec.batch is None:
        alone = [evaluate(law, spec, shortest.alone(b), seed) for b in range(shortest.batch_size)]
        tried = not any(mismatch is not None and mismatch.message for mismatch in alone)
        sample = next((b for b, mismatch in enumerate(alone) if mismatch is not None), None) if tried else None
        if tried and sample is None:
            about_samples = (
                "; each sample alone is right, so the error is in the batch: samples interact, or are not summed"
            )
        elif sample is not None:
            first = alone[sample] or first
    variant = law.variant()
    diagnosis = ""
    if variant is not None and evaluate(variant, spec, stream, seed) is None:
        diagnosis = f"; {variant} holds"
    if isinstance(law, Exact) and not isinstance(law, Unbiased) and spec.dtype == torch.float64:
        # More steps tell more mistakes apart, fewer hide a second mistake.
        diagnosis = diagnose(spec, stream.prefix(max(steps, _DIAGNOSED)))
        if not diagnosis and (early := diagnose(spec, shortest)):
            diagnosis = f"{early}, up to step {steps - 1}"
    required = "BPTT gives" if type(law) is Exact else f"{law} requires"
    if plain is not None and evaluate(law, spec, plain.prefix(steps), seed) is not None:
        name = f"{stream.name} (as without {treatment})"
    message = f"{name}: the gradient is not what {required}{about_samples}{diagnosis}"
    step = first.step if first.step is not None else steps - 1
    yield first.as_found(message, step)._replace(sample=sample)


def _steps_with_loss(stream: Stream) -> list[int]:
    """The numbers of steps after which there is a new loss, and the whole stream."""
    found = []
    h: Tensor = stream.cell.init_state(stream.batch_size)  # type: ignore[operator]
    with torch.no_grad():
        for t, x in enumerate(stream.xs):
            y, h, _ = call_cell(stream.cell, x, h, None)
            if stream.loss(t, y) is not None:
                found.append(t + 1)
    return sorted({*found, stream.steps})


def _first_wrong(
    mismatch_after: Callable[[int], Mismatch | None], candidates: list[int], whole: Mismatch
) -> tuple[int, Mismatch]:
    """The fewest steps after which the gradient is wrong; among many candidates, some step at which it turns wrong."""
    if len(candidates) <= _LINEAR_SEARCH:
        for n in candidates[:-1]:
            mismatch = mismatch_after(n)
            if mismatch is not None:
                return n, mismatch
        return candidates[-1], whole
    right, wrong, mismatch = -1, len(candidates) - 1, whole
    while wrong - right > 1:
        middle = (right + wrong) // 2
        found = mismatch_after(candidates[middle])
        if found is None:
            right = middle
        else:
            wrong, mismatch = middle, found
    return candidates[wrong], mismatch


def influence_failures(spec: LearnerSpec, stream: Stream) -> Iterator[Found]:
    """What is wrong with the influences (B, H, P) before the first step, in mid-stream and at the end, read without a
    sync; and what reading them does to the gradient."""
    stream = shortened(spec.law, stream)
    driver = StreamDriver(spec, stream)
    learner = driver.learner
    for name in trainable(driver.cell):
        if bool((_influence(learner, name, None) != 0).any()):
            yield Found(f"{stream.name}: before the first step, the influence of {name!r} is not zero")
            return
    for t, _ in driver.steps():
        if t + 1 not in (stream.steps // 2, stream.steps):
            continue
        for name, expected in spec.law.reference_influence(stream.prefix(t + 1), learner).items():
            failure = _influence_failure(_influence(learner, name, t), expected, spec.tolerance)
            if failure is not None:
                message = f"{stream.name}: the influence is not that of the law on the state after {t + 1} steps"
                sample, where, *values = failure
                yield Found(message, t, sample, f"parameter {name}{where}", *values)
                return
    mismatch = compare(driver.sync_and_read(), spec.law.reference(stream, learner), spec.tolerance)
    if mismatch is not None:
        message = f"{stream.name}: after influence() was called in mid-stream, the gradient is wrong"
        yield mismatch.as_found(message, stream.steps - 1)


def _influence(learner: Any, name: str, step: int | None) -> Tensor:
    try:
        found = learner.influence(name)
    except Exception as error:
        raise LearnerFailed(f"influence({name!r}) raised {first_line(error)}", step) from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise LearnerFailed(f"influence({name!r}) must be a floating-point tensor (B, H, P), got {found!r:.80}", step)
    return found.detach().clone()


def _influence_failure(
    found: Tensor, expected: Tensor, tolerance: Tolerance
) -> tuple[int | None, str, str, str] | None:
    """The sample, the place and both values of the worst entry, if one is wrong."""
    if found.shape != expected.shape:
        return None, "", f"shape {tuple(found.shape)}", f"shape {tuple(expected.shape)}"
    worst = worst_difference({"": found}, {"": expected}, group="column", floor=tolerance.floor, nonzero="none")
    if worst.error <= tolerance.relative:
        return None
    b, i, p = worst.index
    where = f", entry {i} of the state, entry {p} of the parameter"
    return b, where, f"{worst.actual:.17g}", f"{worst.expected:.17g}"
