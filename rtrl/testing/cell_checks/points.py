"""The points at which a cell is checked: the steps as given, and generic ones near them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rtrl._engine import checks
from rtrl._utils import index_sets, pytrees
from rtrl.cells.protocol import Sparsity, call_cell, check_sparsity, own_copy, takes_replay
from rtrl.errors import CellError, ConfigError

Heads = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Point:
    """One step at one point: what goes in, the cell with its parameters there, and the choices made there.

    Attributes:
        cell: a copy that is the checks' own. x: a tree (B, ...). h: (B, n, ...).
        sparsity: what the cell declared, run freely. replay: the same, if the cell takes it.
        step: its number. generic: whether state and parameters were disturbed.
    """

    cell: nn.Module
    x: Any
    h: Tensor
    step: int
    generic: bool = False
    sparsity: Sparsity = field(default_factory=Sparsity)
    replay: Sparsity | None = None

    def fresh(self) -> "Point":
        """The same point with a copy of the cell, so that one check cannot spoil another."""
        return replace(self, cell=copy.deepcopy(self.cell))

    def run(self, *, free: bool = False, grad: bool = False) -> tuple[Any, Tensor, Sparsity]:
        """One step on copies of x and h; ``free`` lets the cell choose anew."""
        with torch.set_grad_enabled(grad):
            x, h = pytrees.map_tensors(torch.clone, self.x), self.h.clone()
            return call_cell(self.cell, x, h, None if free else self.replay)

    def sample(self, i: int) -> "Point":
        """Sample i alone."""
        parts = pytrees.map_tensors(lambda t: t[i : i + 1], (self.x, self.h, self.sparsity, self.replay))
        return replace(self, x=parts[0], h=parts[1], sparsity=parts[2], replay=parts[3])

    def leaf(self) -> "Point":
        """The same point with a state that takes a gradient."""
        return replace(self, h=self.h.detach().clone().requires_grad_())

    def heads(self, y: Any, h_next: Tensor) -> Heads:
        """What must not depend on undeclared things: the written rows (B, w, ...), and y leaf by leaf."""
        return {"the written rows": index_sets.gather(h_next, self.sparsity.writes), **leaves(y, self.h.shape[0])}

    def chosen(self) -> "Point":
        """The same point with the choices that the cell makes there.

        Raises:
            RTRLError: what came back is malformed.
        """
        sparsity = self.run(free=True)[2]
        check_sparsity(sparsity, self.h, dict(self.cell.named_parameters()))
        sparsity = own_copy(sparsity)
        return replace(self, sparsity=sparsity, replay=sparsity if takes_replay(self.cell) else None)


def leaves(y: Any, batch: int) -> Heads:
    """The floating-point leaves of y that have one entry a sample, under readable names."""
    found, _ = pytree.tree_flatten_with_path(y)
    return {
        f"y{pytree.keystr(path)}": leaf
        for path, leaf in found
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and leaf.shape[0] == batch
    }


@dataclass(slots=True)
class Subject:
    """A cell under test.

    Attributes:
        given: its steps in the cell's own dtype. points: the same in float64 and, beside them, generic ones.
        trouble: why it could not be run at all, with the step.
        notes: what is allowed, but worth knowing; the checks add to them.
    """

    given: list[Point]
    points: list[Point] = field(default_factory=list)
    trouble: tuple[str, int] | None = None
    notes: list[str] = field(default_factory=list)
    draw: Callable[[Tensor, float], Tensor] = field(default=lambda value, scale: value)

    def disturbed(self, point: Point, scale: float = 0.5) -> Point:
        """A generic point near another one, with choices of its own; the point itself where that leads nowhere."""
        cell = copy.deepcopy(point.cell)
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.copy_(self.draw(parameter, 0.1))
        h = self.draw(point.h, scale)
        for attempt in (replace(point, cell=cell, h=h, generic=True), replace(point, h=h, generic=True)):
            try:
                y, h_next, _ = attempt.run(free=True)
                if checks.finite(h_next) and all(checks.finite(t) for t in pytrees.tensors(y)):
                    return attempt.chosen()
            except CellError:
                raise
            except Exception:  # the point may lie outside the cell's domain
                continue
        return point


def generator_draw(seed: int) -> Callable[[Tensor, float], Tensor]:
    """What disturbs tensors, with random numbers of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Tensor, scale: float) -> Tensor:
        if not value.is_floating_point():
            return value.detach().clone()
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return value.detach() + scale * noise * (1 + value.detach().abs())

    return draw


def cast(point: Point, dtype: torch.dtype) -> Point:
    """The same step in another dtype, choices aside."""
    x = pytrees.map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, point.x)
    cell = copy.deepcopy(point.cell).to(dtype)
    return Point(cell, x, point.h.to(dtype), point.step)


def copied(cell: nn.Module) -> nn.Module:
    """A copy of a cell.

    Raises:
        ConfigError: there can be none.
    """
    try:
        return copy.deepcopy(cell)
    except Exception as error:
        raise ConfigError(f"the cell cannot be copied, so it cannot be checked without changing it: {error}") from error


def probe(cell: nn.Module, xs: list[Any], h: Tensor, seed: int) -> Subject:
    """Walk a copy of the cell through its steps, as far as it goes."""
    draw = generator_draw(seed)
    if h.shape[0] == 1:  # two samples, or nothing could be said of how they meet
        xs = [pytrees.map_tensors(lambda t: torch.cat([t, t]), x) for x in xs]
        h = torch.cat([h, draw(h, 0.1)])
    subject = Subject([], draw=draw)
    walker = copy.deepcopy(
        cell
    )  # a cell with a hidden state changes as it walks; the points start from the cell as given
    step = 0
    try:
        for step, x in enumerate(xs):
            point = replace(Point(walker, x, h, step).chosen(), cell=copy.deepcopy(cell))
            subject.given.append(point)
            h_next = Point(walker, x, h, step).run(free=True)[1]
            if (
                h_next.shape == h.shape
                and h_next.dtype == h.dtype
                and h_next.device == h.device
                and checks.finite(h_next)
            ):
                h = h_next.detach()
    except Exception as error:
        subject.trouble = (f"{type(error).__name__}: {error}", step)
    return subject


def lay_out(subject: Subject) -> None:
    """Fill ``subject.points``: float64 where the cell runs there and keeps it, else its own dtype."""
    wide: list[Point] = []
    try:
        for point in subject.given:
            wide.append(cast(point, torch.float64).chosen())
            if wide[-1].run(free=True)[1].dtype != torch.float64:
                raise TypeError("the cell does not keep float64")
    except Exception:  # the check of dtypes says so
        wide = subject.given
    subject.points = [p for point in wide for p in (point, subject.disturbed(point))]
