"""What "equal" means in this suite: ``rtrl.testing.compare``, entry by entry, at rounding error, against a reference
that is not zero. The tolerance is never loosened to make a test pass."""

from torch import Tensor

from rtrl.testing.compare import RELATIVE, assert_gradients_equal, assert_influences_equal, worst_difference

__all__ = ["assert_gradients_equal", "assert_influences_equal", "worst"]


def worst(actual: Tensor, expected: Tensor, dim: int | tuple[int, ...]) -> float:
    """The largest error in units of the tolerance; up to 1 is equal. Groups run along ``dim``."""
    assert dim in (1, (1, 2))
    if actual.shape == expected.shape and not expected.numel():
        return 0.0
    group = "column" if dim == 1 else "slice"
    return worst_difference({"": actual}, {"": expected}, group=group, nonzero="none").error / RELATIVE
