"""Judging what a learner delivered by its law, element by element, and finding the first step at which it is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtrl._utils.formatting import first_line
from rtrl.cells.protocol import call_cell
from rtrl.testing.compare import RELATIVE, worst_difference
from rtrl.testing.driver import trainable
from rtrl.testing.laws import Exact, Law, Unbiased, shortened
from rtrl.testing.learner_checks.diagnosis import diagnose
from rtrl.testing.learner_checks.driver import LearnerFailed, StreamDriver, drive
from rtrl.testing.report import Found
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_FLOOR_OF_ALL = 1e-6  # the smallest scale of a slice that cancels to almost nothing, relative to all parameters
_LINEAR = 40  # so many steps are searched one by one, more of them by halving
_WHOLE = 40  # so many steps are looked at for the mistake, unless the first bad one comes later


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A value that is not what the law says: where, both values, and how it is said."""

    where: str
    found: str
    expected: str
    step: int | None = None
    message: str = ""


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Mismatch | None:
    """The entry with the largest error, if it is more than rounding."""
    worst = worst_difference(found, expected, floor_of_all=_FLOOR_OF_ALL, nonzero="none")
    if worst.error <= RELATIVE:
        return None
    return Mismatch(f"parameter {worst.place}", f"{worst.actual:.17g}", f"{worst.expected:.17g}")


def judge(law: Law, spec: LearnerSpec, stream: Stream, seed: int) -> Mismatch | None:
    """What is wrong with the gradient of one stream; None if nothing is."""
    try:
        if isinstance(law, Unbiased):
            return _judge_mean(law, spec, stream, seed)
        outcome = drive(spec, stream)
        return compare(outcome.gradients, law.reference(stream, outcome.learner))
    except LearnerFailed as failed:
        return Mismatch("", "", "", failed.step, str(failed))


def _judge_mean(law: Unbiased, spec: LearnerSpec, stream: Stream, seed: int) -> Mismatch | None:
    exact = law.reference(stream, None)
    names = list(exact)
    flat = torch.cat([exact[name].flatten() for name in names])
    size = float(flat.norm())
    own = flat / size if size else flat
    draws = []
    for draw in range(law.draws):
        torch.manual_seed((seed << 20) + draw)
        gradients = drive(spec, stream).gradients
        value = torch.cat([gradients[name].flatten() for name in names])
        draws.append(torch.cat([value, (value @ own).reshape(1)]))
    values = torch.stack(draws)
    wanted = torch.cat([flat, torch.tensor([size], dtype=flat.dtype, device=flat.device)])
    error = values.std(dim=0) / law.draws**0.5
    allowed = law.quantile(len(wanted)) * error + RELATIVE * size  # the second, for what no chance enters
    gap = (values.mean(dim=0) - wanted).abs().nan_to_num(nan=torch.inf)
    if float(error.max()) == 0 and bool((gap > allowed).any()):
        return Mismatch("", "", "", None, "all draws are equal; a learner that draws must do so from torch's generator")
    if bool((gap > allowed).any()):
        worst = int((gap / allowed).argmax())
        where = _element(exact, worst) if worst < len(flat) else "the component along the exact gradient"
        beyond = float(gap[worst] / error[worst]) if float(error[worst]) else float("inf")
        return Mismatch(
            f"{where}, mean of {law.draws} draws",
            f"{float(values.mean(dim=0)[worst]):.6g} ({beyond:.3g} standard errors off)",
            f"{float(wanted[worst]):.6g}",
        )
    if size and float(allowed[-1]) >= size:
        return Mismatch(
            "the component along the exact gradient",
            f"{float(values.mean(dim=0)[-1]):.3g} ± {float(allowed[-1]):.3g}",
            f"{size:.3g}",
            message="the draws scatter so much that no gradient at all would pass as well; ask for more draws",
        )
    return None


def _element(exact: dict[str, Tensor], flat: int) -> str:
    for name, value in exact.items():
        if flat < value.numel():
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), value.shape)]
            return f"parameter {name}{index if index else ''}"
        flat -= value.numel()
    raise IndexError(flat)


def gradient_failures(
    spec: LearnerSpec, stream: Stream, seed: int, treatment: str = "", plain: Stream | None = None
) -> Iterator[Found]:
    """What is wrong with the gradient after a stream, at the first step after which it is.

    Args:
        treatment: what is done to the stream, in words. plain: the stream without it.
    """
    law = spec.law
    stream = shortened(law, stream)
    name = f"{stream.name}, {treatment}" if treatment else stream.name
    reference = (law if isinstance(law, Exact) else Exact()).reference(stream, None)
    if not any(bool(value.any()) for value in reference.values()):
        yield Found(f"{name}: the exact gradient is zero everywhere, so this stream proves nothing")
        return
    if not all(bool(torch.isfinite(value).all()) for value in reference.values()):
        yield Found(f"{name}: the exact gradient is not finite, so this stream proves nothing")
        return
    whole = judge(law, spec, stream, seed)
    if whole is None:
        return
    if whole.message:
        yield Found(f"{name}: {whole.message}", whole.step, None, whole.where, whole.found, whole.expected)
        return
    steps, first = _first_bad(lambda n: judge(law, spec, stream.prefix(n), seed), _lossy(stream), whole)
    bad = stream.prefix(steps)
    sample, lone = None, ""
    if bad.batch_size > 1:
        alone = [judge(law, spec, bad.alone(b), seed) for b in range(bad.batch_size)]
        sample = next((b for b, wrong in enumerate(alone) if wrong is not None), None)
        if sample is None:
            lone = "; each sample alone is right, so it is the batch that goes wrong: samples meet, or are not summed"
        else:
            first = alone[sample] or first
    suspect = ""
    if isinstance(law, Exact) and not isinstance(law, Unbiased):
        # More steps tell more mistakes apart, less of them hide a second one.
        suspect = diagnose(spec, stream.prefix(max(steps, _WHOLE)))
        if not suspect and (early := diagnose(spec, bad)):
            suspect = f"{early}, up to step {steps - 1}"
    asked = "BPTT gives" if type(law) is Exact else f"{law} asks for"
    if plain is not None and judge(law, spec, plain.prefix(steps), seed) is not None:
        name = f"{stream.name} (as without {treatment})"
    yield Found(
        f"{name}: the gradient is not what {asked}{lone}{suspect}",
        first.step if first.step is not None else steps - 1,
        sample,
        first.where,
        first.found,
        first.expected,
    )


def _lossy(stream: Stream) -> list[int]:
    """The numbers of steps after which a new loss has fallen, the whole stream last."""
    found = []
    h: Tensor = stream.cell.init_state(stream.batch_size)  # type: ignore[operator]
    with torch.no_grad():
        for t, x in enumerate(stream.xs):
            y, h, _ = call_cell(stream.cell, x, h, None)
            if stream.loss(t, y) is not None:
                found.append(t + 1)
    return sorted({*found, stream.steps})


def _first_bad(wrong: Callable[[int], Mismatch | None], candidates: list[int], whole: Mismatch) -> tuple[int, Mismatch]:
    """The least number of steps after which the gradient is wrong, and how; of many, one at which it becomes wrong."""
    if len(candidates) <= _LINEAR:
        for n in candidates[:-1]:
            mismatch = wrong(n)
            if mismatch is not None:
                return n, mismatch
        return candidates[-1], whole
    right, bad, mismatch = -1, len(candidates) - 1, whole
    while bad - right > 1:
        middle = (right + bad) // 2
        found = wrong(candidates[middle])
        if found is None:
            right = middle
        else:
            bad, mismatch = middle, found
    return candidates[bad], mismatch


def influence_failures(spec: LearnerSpec, stream: Stream) -> Iterator[Found]:
    """What is wrong with the influences that a learner says it holds, (B, H, P), column by column: before the first
    step, in mid-stream and at the end, asked for without a delivery; and what asking does to the gradient."""
    stream = shortened(spec.law, stream)
    driver = StreamDriver(spec, stream)
    learner = driver.learner
    for name in trainable(driver.cell):
        if bool((_influence(learner, name, None) != 0).any()):
            yield Found(f"{stream.name}: before the first step, the influence of {name!r} is not zero")
            return
    middle = stream.steps // 2
    for t, _ in driver.steps():
        if t + 1 not in (middle, stream.steps):
            continue
        for name, wanted in spec.law.reference_influence(stream.prefix(t + 1), learner).items():
            wrong = _wrong_influence(_influence(learner, name, t), wanted)
            if wrong is not None:
                message = f"{stream.name}: the influence is not that of the law on the state after {t + 1} steps"
                sample, where, found, expected = wrong
                yield Found(message, t, sample, f"parameter {name}{where}", found, expected)
                return
    wrong_after = compare(driver.sync_and_read(), spec.law.reference(stream, learner))
    if wrong_after is not None:
        message = f"{stream.name}: after influence() was asked for in mid-stream, the gradient is wrong"
        yield Found(message, stream.steps - 1, None, wrong_after.where, wrong_after.found, wrong_after.expected)


def _influence(learner: Any, name: str, step: int | None) -> Tensor:
    try:
        found = learner.influence(name)
    except Exception as error:
        raise LearnerFailed(f"influence({name!r}) raised {first_line(error)}", step) from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise LearnerFailed(f"influence({name!r}) must be a floating-point tensor (B, H, P), got {found!r:.80}", step)
    return found.detach().clone()


def _wrong_influence(found: Tensor, wanted: Tensor) -> tuple[int | None, str, str, str] | None:
    """Sample, place, and both values of the worst entry, if one is wrong."""
    if found.shape != wanted.shape:
        return None, "", f"shape {tuple(found.shape)}", f"shape {tuple(wanted.shape)}"
    worst = worst_difference({"": found}, {"": wanted}, group="column", nonzero="none")
    if worst.error <= RELATIVE:
        return None
    b, i, p = worst.index
    where = f", entry {i} of the state, entry {p} of the parameter"
    return b, where, f"{worst.actual:.17g}", f"{worst.expected:.17g}"
