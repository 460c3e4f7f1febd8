"""Compare gradients and influences with a reference, so that nothing passes without having been compared."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from rtrl.testing.compare import Group, NotComparable, worst_difference

FLOOR = 1e-6
"""The smallest scale of a slice or a column, relative to its parameter's largest entry."""
TOO_LARGE = 1e9
"""A reference above this has exploded: beside its last steps nothing else could be seen."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of comparing tensors by name.

    Attributes:
        error: the largest relative error; NaN if nothing could be compared.
        tolerance: the largest error that passes.
        compared: how many entries whose reference is not zero were compared.
        where: the parameter of the largest error.
        problem: why the comparison is void; None if it is not.
    """

    error: float
    tolerance: float
    compared: int
    where: str = ""
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether something was compared, nothing was wrong with the reference, and the error is within the tolerance
        (NaN never is)."""
        return self.problem is None and self.compared > 0 and self.error <= self.tolerance


def void(problem: str, tolerance: float) -> Comparison:
    """Return a comparison that could not be made; it never passes."""
    return Comparison(math.nan, tolerance, 0, problem=problem)


def compare_gradients(
    found: Mapping[str, Tensor | None], reference: Mapping[str, Tensor], sliced: Collection[str], tolerance: float
) -> Comparison:
    """Compare gradients relative to the largest entry of each parameter, or of each slice where a parameter is sliced.

    So an expert that is seldom used is not hidden by the others.

    Args:
        found: parameter name → gradient.
        reference: the same names and shapes.
        sliced: the parameters that are kept slice by slice.
        tolerance: the largest error that passes.
    """
    groups: dict[str, Group] = {name: "slice" if name in sliced else "tensor" for name in reference}
    return _compare("gradient", found, reference, groups, tolerance)


def compare_influences(
    found: Mapping[str, Tensor | None], reference: Mapping[str, Tensor], inert: Collection[str], tolerance: float
) -> Comparison:
    """Compare influences relative to the largest entry of each column: one sample and one entry of a parameter.

    Args:
        found: parameter name → influence (B, H, P).
        reference: the same names and shapes.
        inert: the parameters that cannot reach the state: both sides must be exactly zero. Any other must not be.
        tolerance: the largest error that passes.
    """
    moving = [name for name in reference if name in inert and bool(reference[name].any())]
    moving += [name for name, value in found.items() if name in inert and value is not None and bool(value.any())]
    if moving:
        return void(f"{moving[0]} cannot reach the state, but has an influence on it", tolerance)
    found = {name: value for name, value in found.items() if name not in inert}
    reference = {name: value for name, value in reference.items() if name not in inert}
    return _compare("influence", found, reference, dict.fromkeys(reference, "column"), tolerance)


def _compare(
    what: str,
    found: Mapping[str, Tensor | None],
    reference: Mapping[str, Tensor],
    groups: Mapping[str, Group],
    tolerance: float,
) -> Comparison:
    exploded = [name for name, value in reference.items() if value.numel() and float(value.abs().max()) > TOO_LARGE]
    if exploded:
        return void(f"the reference {what} of {exploded[0]} explodes", tolerance)
    actual = {name: value for name, value in found.items() if value is not None}
    try:
        worst = worst_difference(actual, reference, group=lambda name: groups[name], floor=FLOOR, nonzero="each")
    except NotComparable as error:
        return void(f"{what}: {error}", tolerance)
    if not math.isfinite(worst.error):
        return void(f"NaN or infinity in the {what} of {worst.name}", tolerance)
    return Comparison(worst.error, tolerance, worst.n_compared, worst.name)
