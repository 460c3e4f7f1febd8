"""Decide by its law whether a learner's gradient is right, and find the first step at which each parameter is wrong."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rtrl.cells.protocol import call_cell
from rtrl.testing.laws import Exact, Gradients, Law, Unbiased, shortened
from rtrl.testing.learner_checks.diagnosis import diagnose
from rtrl.testing.learner_checks.driver import LearnerFailed, drive
from rtrl.testing.learner_checks.mean_verdict import evaluate_mean
from rtrl.testing.learner_checks.mismatch import (
    Mismatch,
    compare,
    errors_by_parameter,
    parameter_verdicts,
    worst,
)
from rtrl.testing.report import Found, ParameterVerdict
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

__all__ = ["Mismatch", "compare", "evaluate", "gradient_failures"]

_LINEAR_SEARCH = 40  # up to this many candidates, the first wrong step is searched one by one, beyond it by halving
_DIAGNOSED = 40  # the number of steps that the diagnosis looks at, unless the first wrong step comes later


@dataclass(frozen=True)
class _Outcome:
    """What a learner delivers on a stream: what is wrong with it, if anything, and by parameter where that is known."""

    mismatch: Mismatch | None
    wrong: Mapping[str, bool] = field(default_factory=dict)
    parameters: tuple[Gradients, Gradients] | None = None  # found and expected

    def is_wrong(self, name: str) -> bool:
        """Whether a parameter is wrong; all are if nothing was delivered."""
        return self.wrong.get(name, self.mismatch is not None)


def evaluate(
    law: Law, spec: LearnerSpec, stream: Stream, seed: int, reference: Gradients | None = None
) -> Mismatch | None:
    """What is wrong with the gradient of one stream, or None; ``reference`` is the law's, if it is known already."""
    return _outcome(law, spec, stream, seed, reference).mismatch


def _outcome(law: Law, spec: LearnerSpec, stream: Stream, seed: int, reference: Gradients | None = None) -> _Outcome:
    try:
        if isinstance(law, Unbiased):
            return _Outcome(evaluate_mean(law, spec, stream, seed))
        outcome = drive(spec, stream)
        expected = law.reference(stream, outcome.learner) if reference is None else reference
        differences = errors_by_parameter(outcome.gradients, expected, spec.tolerance)
        wrong = {name: difference.error > spec.tolerance.relative for name, difference in differences.items()}
        return _Outcome(worst(differences, spec.tolerance), wrong, (outcome.gradients, expected))
    except LearnerFailed as failed:
        return _Outcome(Mismatch("", "", "", failed.step, str(failed), failed.traceback))


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
    whole = _outcome(law, spec, stream, seed, exact if isinstance(law, Exact) else None)
    if whole.mismatch is None:
        return
    if whole.mismatch.message:
        yield whole.mismatch.as_found(f"{name}: {whole.mismatch.message}", whole.mismatch.step)
        return
    search = _Search(spec, stream, seed, whole)
    steps, first = search.first_wrong()
    shortest = stream.prefix(steps)
    sample, about_samples = None, ""
    if shortest.batch_size > 1 and spec.batch is None:
        sample, alone, tried = _wrong_sample(spec, shortest, seed)
        if alone is not None:
            first = alone
        elif tried:
            about_samples = (
                "; each sample alone is right, so the error is in the batch: samples interact, or are not summed"
            )
    diagnosis = _diagnosis(spec, stream, search, sample, seed)
    required = "BPTT gives" if type(law) is Exact else f"{law} requires"
    if plain is not None and evaluate(law, spec, plain.prefix(steps), seed) is not None:
        name = f"{stream.name} (as without {treatment})"
    message = f"{name}: the gradient is not what {required}{about_samples}{diagnosis}"
    step = first.step if first.step is not None else steps - 1
    yield first.as_found(message, step)._replace(sample=sample, parameters=search.parameters())


def _wrong_sample(spec: LearnerSpec, stream: Stream, seed: int) -> tuple[int | None, Mismatch | None, bool]:
    """The first sample that is wrong alone, what is wrong with it, and whether every sample could be tried."""
    for b in range(stream.batch_size):
        mismatch = evaluate(spec.law, spec, stream.alone(b), seed)
        if mismatch is not None:
            return (None, None, False) if mismatch.message else (b, mismatch, True)
    return None, None, True


def _diagnosis(spec: LearnerSpec, stream: Stream, search: "_Search", sample: int | None, seed: int) -> str:
    """Words about a known mistake, or about another law that holds, or none."""
    variant = spec.law.variant()
    if variant is not None and evaluate(variant, spec, stream, seed) is None:
        return f"; {variant} holds"
    if not isinstance(spec.law, Exact) or isinstance(spec.law, Unbiased) or spec.dtype != torch.float64:
        return ""
    # More steps tell more mistakes apart, fewer hide a second mistake.
    steps, _ = search.first_wrong()
    for n, words in ((max(steps, _DIAGNOSED), ""), (steps, f", up to step {steps - 1}")):
        diagnosis = diagnose(spec, stream.prefix(n), sample, search.found(min(n, stream.steps)))
        if diagnosis:
            return diagnosis + words
        if steps == stream.steps:
            break
    return ""


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


class _Search:
    """The search for the first wrong step, of the whole gradient and of each parameter, over prefixes of a stream."""

    def __init__(self, spec: LearnerSpec, stream: Stream, seed: int, whole: _Outcome) -> None:
        self._spec, self._stream, self._seed, self._whole = spec, stream, seed, whole
        self._candidates = _steps_with_loss(stream)
        self._known = {self._candidates[-1]: whole}

    def first_wrong(self) -> tuple[int, Mismatch]:
        """The fewest steps after which the gradient is wrong; among many candidates, some step where it turns wrong."""
        n = self._first(lambda outcome: outcome.mismatch is not None)
        mismatch = self._after(n).mismatch
        assert mismatch is not None
        return n, mismatch

    def parameters(self) -> tuple[ParameterVerdict, ...]:
        """What is right and wrong, by parameter."""
        if self._whole.parameters is None:
            return ()
        wrong = [name for name in self._whole.wrong if self._whole.is_wrong(name)]
        first = {name: self._first(lambda outcome, name=name: outcome.is_wrong(name)) - 1 for name in wrong}  # type: ignore[misc]
        return parameter_verdicts(*self._whole.parameters, first, self._spec.tolerance)

    def found(self, steps: int) -> Gradients | None:
        """What the learner delivers after these steps, if it is known."""
        known = self._known.get(steps)
        return None if known is None or known.parameters is None else known.parameters[0]

    def _after(self, steps: int) -> _Outcome:
        if steps not in self._known:
            self._known[steps] = _outcome(self._spec.law, self._spec, self._stream.prefix(steps), self._seed)
        return self._known[steps]

    def _first(self, is_wrong: Callable[[_Outcome], bool]) -> int:
        if len(self._candidates) <= _LINEAR_SEARCH:
            return next(n for n in self._candidates if is_wrong(self._after(n)))
        right, wrong = -1, len(self._candidates) - 1
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if is_wrong(self._after(self._candidates[middle])):
                wrong = middle
            else:
                right = middle
        return self._candidates[wrong]
