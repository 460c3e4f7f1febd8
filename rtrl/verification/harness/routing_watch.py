"""See what a mixture chooses by itself while a learner runs it."""

from typing import Any

from torch import Tensor, nn

from rtrl.cells.protocol import Sparsity


class WatchRouting:
    """Inside ``with``, keep every ``Sparsity`` that the cell chooses by itself; replays are ignored.

    Attributes:
        steps: all of them, in order.
    """

    def __init__(self, cell: nn.Module) -> None:
        self._cell = cell
        self.steps: list[Sparsity] = []

    @property
    def used(self) -> Sparsity | None:
        """The newest choice; None before the first."""
        return self.steps[-1] if self.steps else None

    def __enter__(self) -> "WatchRouting":
        self._handle = self._cell.register_forward_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: tuple[Any, Tensor, Sparsity]) -> None:
        if kwargs.get("replay") is None:
            self.steps.append(out[2])
