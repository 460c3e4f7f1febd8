"""Decide by its law whether the influences that a learner hands out are right."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rtrl._utils.formatting import first_line
from rtrl.testing.compare import Tolerance, worst_difference
from rtrl.testing.driver import trainable
from rtrl.testing.laws import shortened
from rtrl.testing.learner_checks.driver import LearnerFailed, StreamDriver
from rtrl.testing.learner_checks.mismatch import compare
from rtrl.testing.report import Found
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream


def influence_failures(spec: LearnerSpec, stream: Stream) -> Iterator[Found]:
    """What is wrong with the influences (B, H, P) before the first step, in mid-stream and at the end, read without a
    sync; and what reading them does to the gradient."""
    stream = shortened(spec.law, stream)
    driver = StreamDriver(spec, stream)
    for name in trainable(driver.cell):
        if bool((_influence(driver.learner, name, None) != 0).any()):
            yield Found(f"{stream.name}: before the first step, the influence of {name!r} is not zero")
            return
    for t, _ in driver.steps():
        if t + 1 not in (stream.steps // 2, stream.steps):
            continue
        for name, expected in spec.law.reference_influence(stream.prefix(t + 1), driver.learner).items():
            failure = _influence_failure(_influence(driver.learner, name, t), expected, spec.tolerance)
            if failure is not None:
                message = f"{stream.name}: the influence is not that of the law on the state after {t + 1} steps"
                sample, where, *values = failure
                yield Found(message, t, sample, f"parameter {name}{where}", *values)
                return
    mismatch = compare(driver.sync_and_read(), spec.law.reference(stream, driver.learner), spec.tolerance)
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
