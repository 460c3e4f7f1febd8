"""A value that differs from what a law requires, and what is wrong with each parameter."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rtrl.testing.compare import FLOAT64, Difference, Tolerance, differences
from rtrl.testing.laws import Gradients
from rtrl.testing.report import Found, ParameterVerdict

_FLOOR_OF_ALL = 1e-6  # the smallest scale of a slice that cancels to almost nothing, relative to all parameters
_CONSTANT = 1e-9  # the largest relative deviation from a constant ratio


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
    return worst(errors_by_parameter(found, expected, tolerance), tolerance)


def errors_by_parameter(found: Gradients, expected: Gradients, tolerance: Tolerance) -> dict[str, Difference]:
    """The largest error of each parameter."""
    return differences(found, expected, floor=tolerance.floor, floor_of_all=_FLOOR_OF_ALL, nonzero="none")


def worst(errors: Mapping[str, Difference], tolerance: Tolerance) -> Mismatch | None:
    """The largest error of all parameters, if it is larger than rounding explains."""
    largest = max(errors.values(), key=lambda difference: difference.error)
    if largest.error <= tolerance.relative:
        return None
    return Mismatch(f"parameter {largest.place}", f"{largest.actual:.17g}", f"{largest.expected:.17g}")


def parameter_verdicts(
    found: Gradients, expected: Gradients, first_steps: Mapping[str, int], tolerance: Tolerance
) -> tuple[ParameterVerdict, ...]:
    """What is right and wrong after a whole stream; ``first_steps`` has the first bad step of each wrong parameter."""
    return tuple(
        ParameterVerdict(
            name,
            difference.error,
            first_steps.get(name),
            _constant_factor(found[name].to(expected[name]), expected[name]) if name in first_steps else None,
        )
        for name, difference in errors_by_parameter(found, expected, tolerance).items()
    )


def _constant_factor(found: Tensor, expected: Tensor) -> float | None:
    """The ratio found / expected, if it is the same for all entries."""
    size = float(expected.square().sum())
    factor = float((found * expected).sum()) / size if size else float("nan")
    allowed = _CONSTANT * max(1.0, abs(factor)) * float(expected.abs().max()) if size else 0.0
    return factor if float((found - factor * expected).abs().max()) <= allowed else None
