"""A step that was taken, with all that is needed to run it once more under a graph."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, losses
from rtrl._utils import pytrees
from rtrl._utils.functional_call import functional_call
from rtrl.cells.protocol import Sparsity, call_cell
from rtrl.errors import CellError, ConfigError


class Values:
    """A copy of a cell's parameters and buffers at one moment; the trainable ones are leaves of their own.

    Attributes:
        trainable: name → leaf (the parameter's shape), in the order of the cell's own parameters.
    """

    def __init__(self, cell: nn.Module) -> None:
        self._take(cell, self._held(cell))

    def _take(self, cell: nn.Module, held: Mapping[str, Tensor]) -> None:
        self._cell = cell
        self._all = {name: value.detach().clone() for name, value in held.items()}
        self.trainable = {n: self._all[n].requires_grad_() for n, p in cell.named_parameters() if p.requires_grad}

    @classmethod
    def of(cls, cell: nn.Module, copies: Mapping[str, Tensor]) -> "Values":
        """The values that ``copies`` gave, on the devices of the cell.

        Raises:
            ConfigError: they are not those of such a cell.
        """
        held = cls._held(cell)
        if held.keys() != copies.keys() or any(
            copies[n].shape != v.shape or copies[n].dtype != v.dtype for n, v in held.items()
        ):
            raise ConfigError("the saved parameters are not those of this cell")
        values = cls.__new__(cls)
        values._take(cell, {name: copies[name].to(value.device) for name, value in held.items()})
        return values

    def copies(self) -> dict[str, Tensor]:
        """Name → a copy of the value."""
        return {name: value.detach().clone() for name, value in self._all.items()}

    @staticmethod
    def _held(cell: nn.Module) -> dict[str, Tensor]:
        return {**dict(cell.named_parameters()), **dict(cell.named_buffers())}

    @property
    def tensors(self) -> list[Tensor]:
        """All that was copied."""
        return list(self._all.values())

    def current(self, cell: nn.Module) -> bool:
        """Whether the cell still holds these values."""
        now = self._held(cell)
        return now.keys() == self._all.keys() and all(torch.equal(now[n], v) for n, v in self._all.items())

    def __call__(self, x: Any, h: Tensor, **replay: Sparsity) -> Any:
        """One step of the cell with these values."""
        return functional_call(self._cell, self._all, (x, h), replay)


@dataclass(eq=False)
class Step:
    """One step of a stream.

    Args:
        x, h, h_next: what went in and came out, without a graph. replay: the choices made, if the cell routes.
        values: the parameters it was taken with. cut: Boolean (B,), the samples whose h is a constant.
        outputs: the floating-point leaves of y that were handed out; adjoints: the gradients of the losses at them.
        open_: whether it still takes losses; given: those it got.
    """

    number: int
    x: Any
    h: Tensor
    h_next: Tensor
    replay: Sparsity | None
    values: Values
    cut: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    adjoints: list[Tensor | None] = field(default_factory=list)
    open_: losses.Open = field(default_factory=losses.Open)
    given: list["weakref.ref[Tensor]"] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Bytes held by this step alone."""
        replay = () if self.replay is None else tuple(self.replay)
        return pytrees.n_bytes([self.x, self.h, self.outputs, [a for a in self.adjoints if a is not None], replay])

    def take_adjoints(self) -> None:
        """Move the losses' gradients from the leaves into ``adjoints``.

        Raises:
            NonFiniteError: NaN or infinity in one of them.
        """
        for leaf in self.outputs:
            if leaf.grad is not None:
                checks.check_finite("the gradient of the loss at y", leaf.grad, self.number)
        self.adjoints = [None if leaf.grad is None else leaf.grad.detach().clone() for leaf in self.outputs]

    @property
    def owed(self) -> bool:
        """Whether a loss of this step is still to be earned."""
        return any(adjoint is not None for adjoint in self.adjoints)

    def again(self, h: Tensor, sample: int | None = None) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Run the step once more from ``h`` with a graph: the pairs (y, its adjoint) that carry a loss, and h_next.

        Args:
            h: the state (B, n, ...), or (1, n, ...) if one sample alone is run.
            sample: that sample; None for the batch.

        Raises:
            CellError: it does something else than it did.
        """

        def rows(value: Tensor) -> Tensor:
            return value if sample is None else value[sample : sample + 1]

        replay = None if self.replay is None else pytrees.map_tensors(rows, self.replay)
        with torch.enable_grad():
            y, h_next, _ = call_cell(self.values, pytrees.map_tensors(rows, self.x), h, replay)
        ys = [leaf for leaf in pytrees.tensors(y) if leaf.is_floating_point()]
        same = len(ys) == len(self.outputs) and checks.nearly_equal(h_next.detach(), rows(self.h_next))
        if not same or not all(
            map(checks.nearly_equal, [y.detach() for y in ys], [rows(y.detach()) for y in self.outputs])
        ):
            alone = "" if sample is None else f" with sample {sample} alone"
            raise CellError(
                f"step {self.number}: run again{alone}, the cell gives another y or next state; it must be a pure "
                "function of (x, h, parameters) in which samples do not meet"
            )
        pairs = [(y, rows(a)) for y, a in zip(ys, self.adjoints, strict=True) if a is not None and y.requires_grad]
        return pairs, h_next
