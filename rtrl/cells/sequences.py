"""Several steps at once, for cells that can take them faster than one by one."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HasUnroll(Protocol):
    """A dense cell that takes several steps at once; ``learner.unroll`` calls it.

    Its results must be those of ``forward``, step by step, up to rounding. ``check_cell`` compares them, and a learner
    refuses a block in which they differ.
    """

    def unroll(self, xs: Any, h: Tensor) -> tuple[Any, Tensor] | None:
        """Take m steps from the state h; return None where only ``forward`` will do.

        Args:
            xs: the inputs, each tensor (m, B, ...).
            h: (B, n, ...), the state before the first step.

        Returns:
            y as ``forward`` returns it, each tensor (m, B, ...), and the states after the steps, (m, B, n, ...).
        """
        ...
