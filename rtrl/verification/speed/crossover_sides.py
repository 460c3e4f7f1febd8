"""What ``BlockRTRL`` is timed against, each as a user would write it: eager, truncated and fused backpropagation."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import rtrl
from rtrl.verification.speed import jax_rtrl

INPUTS = 32
"""Inputs of every cell but the mixture, which has 8."""

_FUSED: dict[str, Callable[[int], nn.Module]] = {
    "RNN": lambda h: nn.RNN(INPUTS, h),
    "GRU": lambda h: nn.GRU(INPUTS, h),
}
_CELLS: dict[str, Callable[[int], nn.Module]] = {
    "RNN": lambda h: rtrl.cells.from_torch(nn.RNNCell(INPUTS, h)),
    "GRU": lambda h: rtrl.cells.from_torch(nn.GRUCell(INPUTS, h)),
    "minGRU": lambda h: rtrl.cells.MinGRU(INPUTS, h),
    "eLSTM": lambda h: rtrl.cells.ElementwiseLSTM(INPUTS, h, output_gate=False),
    "RTU": lambda h: rtrl.cells.RTU(INPUTS, h // 2),
    "mixture": lambda h: rtrl.RecurrentMoE(8, 4, h // 8, n_slots=8, n_experts=16, topk=2),
}
"""Kind of cell → the cell of H state numbers. A mixture has eight slots."""


@dataclass(frozen=True)
class Case:
    """A cell of some size, a stream of one sample, and a squared error at every step.

    Attributes:
        kind: of the cell, a key of the table above.
        hidden: H, numbers of the state.
        block: of ``BlockRTRL``, and the horizon of truncated BPTT.
        cell: the cell.
        xs: the inputs, (T, 1, inputs); the stream repeats.
        targets: of y.
    """

    kind: str
    hidden: int
    block: int
    cell: nn.Module
    xs: Tensor
    targets: Tensor

    def loss(self, t: int, y: Tensor) -> Tensor:
        """Return the squared error of step t."""
        return (y - self.targets[t]).square().sum()


def case(kind: str, hidden: int, steps: int, block: int, seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """Return a case with drawn weights and numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cell = _CELLS[kind](hidden).to(dtype)
        xs = torch.randn(steps, 1, 8 if kind == "mixture" else INPUTS, dtype=dtype)
        with torch.no_grad():
            y = cell(xs[0], cell.init_state(1))[0]  # type: ignore[operator]
        return Case(kind, hidden, block, cell, xs, torch.randn(steps, *y.shape, dtype=dtype))


class Side(Protocol):
    """Something that takes the whole stream, and gives its gradients."""

    def advance(self) -> int:
        """Take the whole stream, with the gradients of all its losses; return the number of steps."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by parameter, summed over all ``advance`` so far, or those of the last."""
        ...


class _OnCell:
    def __init__(self, found: Case) -> None:
        self.case, self.cell = found, copy.deepcopy(found.cell)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients so far."""
        return {name: p.grad.clone() for name, p in self.cell.named_parameters() if p.grad is not None}


class Online(_OnCell):
    """``BlockRTRL``, one step after the other."""

    def __init__(self, found: Case) -> None:
        super().__init__(found)
        self.learner = rtrl.BlockRTRL(self.cell, 1, block=found.block, audit="off")

    def advance(self) -> int:
        """Take the whole stream; gradients are delivered at the end of every block."""
        for t, x in enumerate(self.case.xs):
            self.learner.backward(self.case.loss(t, self.learner.step(x)))
            if self.learner.at_block_end:
                self.learner.sync()
        self.learner.sync()
        return len(self.case.xs)


class Sequences(Online):
    """``BlockRTRL``, the steps of a block at once."""

    def advance(self) -> int:
        """Take the whole stream; gradients are delivered at the end of every block."""
        for xs, targets in zip(
            self.case.xs.split(self.case.block), self.case.targets.split(self.case.block), strict=True
        ):
            self.learner.backward((self.learner.unroll(xs) - targets).square().sum())
            self.learner.sync()
        return len(self.case.xs)


class Eager(_OnCell):
    """Backpropagation through the whole stream by autograd, or cut off after every ``horizon`` steps."""

    def __init__(self, found: Case, horizon: int | None = None) -> None:
        super().__init__(found)
        self._horizon = horizon or len(found.xs)

    def advance(self) -> int:
        """Take the whole stream, from the cell's first state."""
        h, total = self.cell.init_state(1), None  # type: ignore[operator]
        for t, x in enumerate(self.case.xs):
            y, h = self.cell(x, h)[:2]
            loss = self.case.loss(t, y)
            total = loss if total is None else total + loss
            if (t + 1) % self._horizon == 0 or t + 1 == len(self.case.xs):
                total.backward()
                h, total = h.detach(), None
        return len(self.case.xs)


class Fused(_OnCell):
    """``nn.RNN`` or ``nn.GRU`` over the whole stream at once, with the cell's weights."""

    def __init__(self, found: Case) -> None:
        super().__init__(found)
        self.cell = _FUSED[found.kind](found.hidden)
        with torch.no_grad():
            for name, p in found.cell.named_parameters():
                self.cell.get_parameter(f"{name.removeprefix('cell.')}_l0").copy_(p)

    def advance(self) -> int:
        """Take the whole stream, from zeros."""
        ys, _ = self.cell(self.case.xs)
        (ys - self.case.targets).square().sum().backward()
        return len(self.case.xs)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients so far, by the cell's names."""
        return {f"cell.{name.removesuffix('_l0')}": grad for name, grad in super().gradients().items()}


class Jax:
    """Jitted RTRL in JAX over the whole stream."""

    def __init__(self, found: Case) -> None:
        named = {name.removeprefix("cell."): p for name, p in found.cell.named_parameters()}
        self._scan = jax_rtrl.JaxRTRL(named, found.xs[:, 0], found.targets[:, 0])

    def advance(self) -> int:
        """Take the whole stream, from zeros."""
        return self._scan.advance()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the last run, by the cell's names."""
        return {f"cell.{name}": grad for name, grad in self._scan.gradients().items()}


OURS, RIVALS = ("steps", "sequences"), ("eager BPTT", "TBPTT", "fused BPTT", "RTRL in JAX")
"""The two ways to run ``BlockRTRL``, and the others. ``TBPTT`` is the only one whose gradient is another."""


def sides(found: Case, jax: bool) -> dict[str, Side]:
    """Return all sides that the case has, by name.

    Args:
        found: the case.
        jax: whether RTRL in JAX is among them, where it is installed.
    """
    made: dict[str, Any] = {
        "steps": Online(found), "sequences": Sequences(found), "eager BPTT": Eager(found),
        "TBPTT": Eager(found, found.block),
    }  # fmt: skip
    if found.kind in _FUSED:
        made["fused BPTT"] = Fused(found)
        if jax and jax_rtrl.available:
            made["RTRL in JAX"] = Jax(found)
    return made
