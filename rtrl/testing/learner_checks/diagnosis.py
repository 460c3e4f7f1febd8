"""Diagnose a wrong gradient: compute what each known mistake gives, and compare."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rtrl.testing.compare import RELATIVE
from rtrl.testing.laws import Gradients
from rtrl.testing.learner_checks.driver import drive
from rtrl.testing.learner_checks.mistakes import Mistake, gradient, mistakes
from rtrl.testing.linearized_steps import LinearizedStream, linearized
from rtrl.testing.report import LIKELY
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_ALIKE = 1e-7  # relative; it tells two mistakes apart and ignores rounding
_ROUNDED = 1e-5  # relative; a smaller error is none of the mistakes, but may be the rounding of float32
_PAIRS = 14  # the number of steps on which two mistakes at once are tried


class _Case:
    """What a learner delivers on a stream, and what is exact, for all parameters or one."""

    def __init__(self, linear: LinearizedStream, found: Tensor) -> None:
        self.linear, self.found = linear, found
        self.exact = gradient(linear)
        self.scale = float(self.exact.abs().max())
        self.comparable = bool(self.scale) and bool(torch.isfinite(found).all())

    @property
    def batch_size(self) -> int:
        return len(self.linear.steps[0].adjoint)

    @property
    def error(self) -> float:
        return float((self.found - self.exact).abs().max()) / self.scale

    def fits(self, mistaken: Tensor) -> bool:
        """Whether a mistaken gradient is what was found, and is not the exact one."""
        differs = float((mistaken - self.exact).abs().max()) > 1e3 * _ALIKE * self.scale
        return differs and float((mistaken - self.found).abs().max()) <= _ALIKE * self.scale

    def of_parameters(self) -> Iterator[tuple[str, "_Case"]]:
        """The case of each parameter by itself."""
        stop = 0
        for name, shape in self.linear.shapes.items():
            part = slice(stop, stop := stop + shape.numel())
            steps = [
                replace(
                    step,
                    immediate=step.immediate[..., part],
                    direct=step.direct[part],
                    fresh_influence=step.fresh_influence[..., part],
                )
                for step in self.linear.steps
            ]
            yield (
                name,
                _Case(LinearizedStream({name: shape}, steps, self.linear.first_influence[..., part]), self.found[part]),
            )


def _case(spec: LearnerSpec, stream: Stream, found: Gradients | None = None) -> _Case:
    linear = linearized(stream)
    return _Case(linear, linear.joined(drive(spec, stream).gradients if found is None else found))


def diagnose(spec: LearnerSpec, stream: Stream, sample: int | None = None, found: Gradients | None = None) -> str:
    """Name the mistakes that give the whole gradient found on a stream, in words that follow the message, or none.

    One mistake is looked for in the batch, then in the failing sample alone, then two mistakes at once, then one
    mistake of each parameter. ``found`` is what the learner delivers on the stream, if it is known already.
    """
    try:
        case = _case(spec, stream, found)
        if not case.comparable:
            return ""
        if case.error <= _ROUNDED:
            return _looks(_rounding(case))
        words = _single(case)
        if not words and sample is not None and stream.batch_size > 1:
            words = _in_the_sample(_case(spec, stream.alone(sample)), case, sample)
        if not words:
            words = _pair(case if stream.steps <= _PAIRS else _case(spec, stream.prefix(_PAIRS)))
    except Exception:  # of the learner, or of a cell that cannot be linearised; then there is no diagnosis
        return ""
    return _looks(words or _by_parameter(case))


def _looks(words: str) -> str:
    return f"; {LIKELY}{words}" if words else ""


def _single(case: _Case) -> str:
    return next((words for _, words in _matches(case)), "")


def _matches(case: _Case) -> Iterator[tuple[Mistake, str]]:
    """Every kind that fits, in words with its numbers."""
    for mistake in mistakes(case.linear, case.found):
        numbers = [k for k, mistaken in mistake.gradients() if case.fits(mistaken)]
        if numbers:
            yield mistake, _worded(mistake, numbers)


def _worded(mistake: Mistake, numbers: Iterable[float]) -> str:
    """The words with a constant, or with all the numbers that may be meant."""
    numbers = list(numbers)
    if isinstance(numbers[0], float):
        return mistake.words.format(k=numbers[0])
    return mistake.words.format(k=" or ".join(map(str, numbers)) if len(numbers) < 4 else "n")


def _in_the_sample(alone: _Case, case: _Case, sample: int) -> str:
    """The mistake of the failing sample alone, and whether averaging makes it that of the batch."""
    if not alone.comparable or alone.error <= _ROUNDED:
        return ""
    for mistake, words in _matches(alone):
        if any(case.fits(gradient(case.linear, **o) / case.batch_size) for o in mistake.options.values()):
            return f"{words}, and samples were averaged, not summed"
        return f"{words} (in sample {sample} alone)"
    return ""


def _pair(case: _Case) -> str:
    """Two mistakes in different parts of the recursion, or one and a constant factor of all."""
    if not case.comparable or case.error <= _ROUNDED:
        return ""
    kinds = [mistake for mistake in mistakes(case.linear, case.found) if mistake.options]
    for first, second in itertools.combinations(kinds, 2):
        if first.part == second.part:
            continue
        for (k, one), (j, other) in itertools.product(first.options.items(), second.options.items()):
            if case.fits(gradient(case.linear, **one, **other)):
                return f"{_worded(first, [k])}, and {_worded(second, [j])}"
    for mistake in kinds:
        for k, options in mistake.options.items():
            mistaken = gradient(case.linear, **options)
            size = float(mistaken @ mistaken)
            factor = float(case.found @ mistaken) / size if size else 0.0
            if factor and case.fits(factor * mistaken):
                return f"{_worded(mistake, [k])}, and the whole gradient were multiplied by {factor:.6g}"
    return ""


def _by_parameter(case: _Case) -> str:
    """One mistake for each wrong parameter, if every one of them has one."""
    by_words: dict[str, list[str]] = {}
    for name, part in case.of_parameters():
        if float((part.found - part.exact).abs().max()) <= RELATIVE * (part.scale or case.scale):
            continue
        words = _single(part) if part.comparable else ""
        if not words:
            return ""
        by_words.setdefault(words, []).append(name)
    return ", and ".join(f"for {' and '.join(names)}, {words}" for words, names in by_words.items())


def _rounding(case: _Case) -> str:
    """Float32, or a factor close to 1, for an error that is small."""
    found, exact = case.found, case.exact
    factor = float(found @ exact) / float(exact @ exact)
    gap = float((found - exact).abs().max())
    if float((found - factor * exact).abs().max()) <= 1e-3 * gap:
        return f"the whole gradient were multiplied by {factor:.12g}"
    if torch.equal(found, found.float().double()):
        return "the gradient were in float32"
    single = gradient(_in_single(case.linear)).double()
    rounded = float((single - exact).abs().max())
    nonzero = exact != 0
    hit = (found - exact).abs()[nonzero] > 1e-12 * exact.abs()[nonzero]
    if rounded / 100 <= gap <= 100 * rounded and float(hit.double().mean()) >= 0.5:
        return "something were computed in float32"
    return ""


def _in_single(linear: LinearizedStream) -> LinearizedStream:
    fields = ("dynamics", "immediate", "adjoint", "direct", "fresh_influence")
    steps = [replace(step, **{name: getattr(step, name).float() for name in fields}) for step in linear.steps]
    return replace(linear, steps=steps, first_influence=linear.first_influence.float())
