"""What "equal" means in this suite: element by element, at rounding error, against a reference that is known to say
something.

The tolerance is 1e-10 of the scale of an element's own group (a slice of a parameter, a column of an influence matrix),
plus 1e-14 of the largest entry for groups that cancel to almost nothing. It is never loosened to make a test pass.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

RELATIVE = 1e-10
FLOOR = 1e-14


def worst(actual: Tensor, expected: Tensor, dim: int | tuple[int, ...]) -> float:
    """The largest error in units of the tolerance; up to 1 is equal. Groups run along ``dim``."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert bool(torch.isfinite(expected).all()), "the reference itself is not finite"
    assert bool(torch.isfinite(actual).all()), "NaN or infinity"
    if expected.numel() == 0:
        return 0.0
    size = expected.abs()
    allowed = RELATIVE * size.amax(dim=dim, keepdim=True) + FLOOR * size.max()
    error = (actual - expected).abs()
    return float(torch.where(error == 0, 0.0, error / allowed).max())


def _slices(value: Tensor) -> Tensor:
    return value.reshape(value.shape[0], -1) if value.ndim else value.reshape(1, 1)


def _assert_equal(
    what: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    group: Callable[[Tensor], Tensor],
    zero: bool,
) -> None:
    assert actual.keys() == expected.keys()
    if not zero:
        assert any(bool(v.count_nonzero()) for v in expected.values()), (
            "the reference is zero everywhere: it proves nothing"
        )
    errors = {name: worst(group(actual[name]), group(expected[name]), dim=1) for name in expected}
    bad = {name: error for name, error in errors.items() if not error <= 1}
    assert not bad, f"{what} differ, in units of the tolerance: {bad}"


def assert_gradients_equal(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, may_be_zero: bool = False
) -> None:
    """Each parameter's gradient, slice by slice of its first dimension; the reference as a whole must not be zero."""
    _assert_equal("gradients", actual, expected, _slices, may_be_zero)


def assert_influences_equal(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, may_be_zero: bool = False
) -> None:
    """Each influence matrix (B, H, P), column by column; the reference as a whole must not be zero."""
    _assert_equal("influences", actual, expected, lambda value: value, may_be_zero)
