"""How far two sets of tensors are apart, defined so that nothing can agree without having been compared."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6
"""The least share of a parameter's largest entry that a smaller scale of its own may fall to."""
TOO_LARGE = 1e9
"""A reference above this has exploded: beside its last steps nothing else could be seen."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of comparing tensors by name.

    Attributes:
        error: the largest relative error; NaN if nothing could be compared.
        tolerance: what it may be at most.
        compared: how many entries with a scale that is not zero were compared.
        where: the parameter of the largest error.
        problem: why the comparison is void, whatever the error; None if it is not.
    """

    error: float
    tolerance: float
    compared: int
    where: str = ""
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Something was compared, nothing was wrong with the reference, and the error is within the tolerance (NaN
        never is)."""
        return self.problem is None and self.compared > 0 and self.error <= self.tolerance


def void(problem: str, tolerance: float) -> Comparison:
    """A comparison that could not be made; it never passes."""
    return Comparison(math.nan, tolerance, 0, problem=problem)


def compare_gradients(
    found: Mapping[str, Tensor | None], reference: Mapping[str, Tensor], sliced: Collection[str], tolerance: float
) -> Comparison:
    """The largest error of a gradient: ``max |found − reference| / scale``.

    The scale of an entry is the largest ``|reference|`` of its parameter; of its slice (row of the first dimension),
    where the parameter is kept slice by slice, but no less than ``FLOOR`` times the parameter's. So an expert that is
    seldom used is not hidden by the others.

    Args:
        found, reference: parameter name → gradient; the same names and shapes.
        sliced: the parameters that are kept slice by slice.
        tolerance: the largest error that passes.
    """
    pairs = _pairs("gradient", found, reference)
    if isinstance(pairs, str):
        return void(pairs, tolerance)
    parts = []
    for name, (a, b) in pairs.items():
        if not bool(b.any()):
            return void(f"the reference gradient of {name} is zero everywhere", tolerance)
        rows = b.abs().reshape(b.shape[0] if name in sliced else 1, -1)
        scale = rows.amax(dim=1, keepdim=True).clamp(min=FLOOR * float(rows.max()))
        parts.append((float(((a - b).abs().reshape(rows.shape) / scale).max()), int(b.count_nonzero()), name))
    return _worst(parts, tolerance)


def compare_influences(
    found: Mapping[str, Tensor | None], reference: Mapping[str, Tensor], inert: Collection[str], tolerance: float
) -> Comparison:
    """The largest error of an influence, column by column: ``max_i |found − reference|[b, i, p] / scale[b, p]``.

    The scale of a column, one sample and one entry of a parameter, is its own largest ``|reference|``, but no less than
    ``FLOOR`` times that of the parameter's largest column. A parameter in ``inert`` must have an influence of exactly
    zero on both sides; any other must not.

    Args:
        found, reference: parameter name → influence (B, H, P); the same names and shapes.
        inert: the parameters that cannot reach the state.
        tolerance: the largest error that passes.
    """
    pairs = _pairs("influence", found, reference)
    if isinstance(pairs, str):
        return void(pairs, tolerance)
    parts = []
    for name, (a, b) in pairs.items():
        if name in inert:
            if bool(a.any()) or bool(b.any()):
                return void(f"{name} cannot reach the state, but has an influence on it", tolerance)
            continue
        if not bool(b.any()):
            return void(f"the reference influence of {name} is zero everywhere", tolerance)
        columns = b.abs().amax(dim=1, keepdim=True)
        scale = columns.clamp(min=FLOOR * float(columns.max()))
        parts.append((float(((a - b).abs() / scale).max()), int(b.count_nonzero()), name))
    return _worst(parts, tolerance)


def _pairs(
    what: str, found: Mapping[str, Tensor | None], reference: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]] | str:
    """Both sides by name, in float64; or, in words, why they cannot be compared."""
    if found.keys() != reference.keys():
        return f"only one side has the {what} of {', '.join(sorted(found.keys() ^ reference.keys()))}"
    if not reference:
        return f"there is no {what} to compare"
    pairs = {}
    for name, b in reference.items():
        a = found[name]
        if a is None:
            return f"{name} has no {what}"
        if a.shape != b.shape or not b.numel():
            return f"the {what} of {name} has shape {tuple(a.shape)}, the reference {tuple(b.shape)}"
        if not bool(torch.isfinite(b).all()) or float(b.abs().max()) > TOO_LARGE:
            return f"the reference {what} of {name} explodes (largest entry {float(b.abs().max()):.1e})"
        if not bool(torch.isfinite(a).all()):
            return f"NaN or infinity in the {what} of {name}"
        pairs[name] = (a.double(), b.double())
    return pairs


def _worst(parts: list[tuple[float, int, str]], tolerance: float) -> Comparison:
    if not parts:
        return void("nothing was compared", tolerance)
    error, _, where = max(parts)
    return Comparison(error, tolerance, sum(count for _, count, _ in parts), where)
