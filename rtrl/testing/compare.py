"""Compare gradients and influences with a reference, entry by entry, at the size of rounding errors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rtrl.errors import RTRLError

RELATIVE = 1e-10
"""The largest relative error that counts as rounding in float64."""
FLOOR = 1e-4
"""The smallest scale of a group of entries, relative to the largest entry of its tensor."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The errors that count as rounding.

    Attributes:
        relative: the largest relative error.
        floor: the smallest scale of a group of entries, relative to the largest entry of its tensor.
    """

    relative: float
    floor: float


FLOAT64 = Tolerance(RELATIVE, FLOOR)
FLOAT32 = Tolerance(1e-3, 0.1)
"""Of a learner in float32 against a reference in float64; it shows a wrong gradient, not a badly rounded one."""

Group = Literal["slice", "column", "tensor"]
"""Entries that share a scale: a slice of dimension 0, a column along dimension 1, or the whole tensor."""


class NotComparable(RTRLError, AssertionError):
    """The reference proves nothing, or the two sides do not have the same form."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest relative error of a comparison, and its place.

    Attributes:
        error: the largest ``|actual − expected| / scale``; infinity for NaN and for an error where the scale is zero.
        name: the tensor.
        index: the entry.
        actual: its value.
        expected: the value of the reference.
        n_compared: the number of entries whose reference is not zero.
    """

    error: float
    name: str
    index: tuple[int, ...]
    actual: float | complex
    expected: float | complex
    n_compared: int

    @property
    def place(self) -> str:
        """The tensor and the entry, such as ``weight[0, 2]``."""
        return f"{self.name}{list(self.index) if self.index else ''}"

    def __str__(self) -> str:
        """Return the error, its place and both values."""
        return f"relative error {self.error:.3g} at {self.place}: {self.actual:.17g}, expected {self.expected:.17g}"


def worst_difference(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    group: Group | Callable[[str], Group] = "slice",
    floor: float = FLOOR,
    floor_of_all: float = 0.0,
    nonzero: Literal["any", "each", "none"] = "any",
) -> Difference:
    """Find the entry with the largest relative error.

    Equation:
        error = |actual − expected| / scale, where scale is the largest |expected| of the entry's group, but at least
        ``floor`` times that of its tensor, and at least ``floor_of_all`` times that of all tensors.

    Args:
        actual: tensors by name.
        expected: the reference, with the same names and shapes.
        group: which entries share a scale; a function chooses by the name of the tensor.
        floor: the smallest scale, relative to the tensor.
        floor_of_all: the smallest scale, relative to all tensors.
        nonzero: what of the reference must not be zero: any tensor, each tensor, or none.

    Raises:
        NotComparable: names or shapes differ, nothing is compared, or the reference is zero or not finite. Use a
            stream whose reference can be compared.

    Example:
        >>> difference = worst_difference({"w": torch.tensor([1.0, 2.5])}, {"w": torch.tensor([1.0, 2.0])})
        >>> difference.place, difference.error
        ('w[1]', 0.25)
    """
    found = differences(actual, expected, group=group, floor=floor, floor_of_all=floor_of_all, nonzero=nonzero)
    return max(found.values(), key=lambda difference: difference.error)


def differences(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    group: Group | Callable[[str], Group] = "slice",
    floor: float = FLOOR,
    floor_of_all: float = 0.0,
    nonzero: Literal["any", "each", "none"] = "any",
) -> dict[str, Difference]:
    """Find the entry with the largest relative error of each tensor, as ``worst_difference`` does of all."""
    _check_comparable(actual, expected, nonzero)
    top = max(_largest(value) for value in expected.values())
    n_compared = sum(int(value.count_nonzero()) for value in expected.values())
    found: dict[str, Difference] = {}
    for name, reference in expected.items():
        if not reference.numel():
            continue
        wide = torch.promote_types(reference.dtype, torch.float64)
        size, gap = reference.abs().double(), (actual[name].to(wide) - reference.to(wide)).abs()
        by_group = _group_largest(size, group if isinstance(group, str) else group(name))
        scale = by_group.clamp(min=max(floor * float(size.max()), floor_of_all * top))
        errors = torch.where(gap == 0, 0.0, gap / scale).nan_to_num(nan=torch.inf, posinf=torch.inf)
        index = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
        values = actual[name][index].item(), reference[index].item()
        found[name] = Difference(float(errors.max()), name, index, *values, n_compared)
    if not found:
        raise NotComparable("all tensors of the reference are empty: there is nothing to compare")
    return found


def assert_gradients_equal(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    relative: float = RELATIVE,
    may_be_zero: bool = False,
) -> None:
    """Assert that gradients are equal up to rounding, relative to each slice of a parameter's first dimension.

    Args:
        actual: gradients by parameter name.
        expected: the reference.
        relative: the largest relative error that passes.
        may_be_zero: whether the reference may be zero everywhere.

    Raises:
        AssertionError: they differ; the message names the worst entry.
        NotComparable: they cannot be compared; see ``worst_difference``.
    """
    _assert_equal("gradients", actual, expected, "slice", relative, may_be_zero)


def assert_influences_equal(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    relative: float = RELATIVE,
    may_be_zero: bool = False,
) -> None:
    """Assert that influences (B, H, P) are equal up to rounding, relative to each column.

    Args:
        actual: influences by parameter name.
        expected: the reference.
        relative: the largest relative error that passes.
        may_be_zero: whether the reference may be zero everywhere.

    Raises:
        AssertionError: they differ; the message names the worst entry.
        NotComparable: they cannot be compared; see ``worst_difference``.
    """
    _assert_equal("influences", actual, expected, "column", relative, may_be_zero)


def _assert_equal(
    what: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    group: Group,
    relative: float,
    may_be_zero: bool,
) -> None:
    if not expected and not actual and may_be_zero:
        return
    difference = worst_difference(actual, expected, group=group, nonzero="none" if may_be_zero else "any")
    assert difference.error <= relative, f"{what} differ by more than {relative:g}: {difference}"


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _group_largest(size: Tensor, group: Group) -> Tensor:
    """The largest entry of each group, in a shape that broadcasts over the tensor."""
    if group == "column":
        return size.amax(dim=1, keepdim=True)
    dims = tuple(range(1 if group == "slice" else 0, size.ndim))
    return size.amax(dim=dims, keepdim=True) if dims else size


def _check_comparable(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], nonzero: str) -> None:
    if actual.keys() != expected.keys():
        raise NotComparable(f"only one side has {', '.join(sorted(actual.keys() ^ expected.keys()))}")
    if not expected:
        raise NotComparable("the reference is empty: there is nothing to compare")
    for name, reference in expected.items():
        if actual[name].shape != reference.shape:
            shapes = f"{tuple(actual[name].shape)}, the reference {tuple(reference.shape)}"
            raise NotComparable(f"{name} has shape {shapes}")
        if not bool(torch.isfinite(reference).all()):
            raise NotComparable(f"the reference of {name} is not finite")
    zero = [name for name, reference in expected.items() if not bool(reference.any())]
    if nonzero == "each" and zero:
        raise NotComparable(f"the reference of {', '.join(zero)} is zero everywhere: it proves nothing")
    if nonzero == "any" and len(zero) == len(expected):
        raise NotComparable("the reference is zero everywhere: it proves nothing")
