"""The points at which a cell is checked: the given steps, and perturbed points near them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rtrl._engine import checks
from rtrl._utils import index_sets, pytrees
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.protocol import Sparsity, call_cell, check_sparsity, own_copy, takes_replay
from rtrl.errors import CellError, ConfigError

Heads = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """The input of one step, the cell with its parameters, and the choices that the cell makes there.

    Attributes:
        cell: a copy for the checks.
        x: a tree (B, ...).
        h: (B, n, ...).
        step: the number of the step.
        perturbed: whether the state and the parameters are perturbed.
        sparsity: what the cell declares without a replay.
        replay: the sparsity, if the cell takes it; else None.
    """

    cell: nn.Module
    x: Any
    h: Tensor
    step: int
    perturbed: bool = False
    sparsity: Sparsity = field(default_factory=Sparsity)
    replay: Sparsity | None = None

    def with_own_cell(self) -> "EvaluationPoint":
        """Replace the cell by a copy, so that one check cannot affect another."""
        return replace(self, cell=copy.deepcopy(self.cell))

    def run(self, *, free: bool = False, grad: bool = False) -> tuple[Any, Tensor, Sparsity]:
        """Run one step on copies of x and h; with ``free`` the cell chooses again, without a replay."""
        with torch.set_grad_enabled(grad):
            x, h = pytrees.map_tensors(torch.clone, self.x), self.h.clone()
            return call_cell(self.cell, x, h, None if free else self.replay)

    def sample(self, i: int) -> "EvaluationPoint":
        """Reduce the batch to sample i."""
        parts = pytrees.map_tensors(lambda t: t[i : i + 1], (self.x, self.h, self.sparsity, self.replay))
        return replace(self, x=parts[0], h=parts[1], sparsity=parts[2], replay=parts[3])

    def with_leaf_state(self) -> "EvaluationPoint":
        """Replace the state by a leaf that requires a gradient."""
        return replace(self, h=self.h.detach().clone().requires_grad_())

    def heads(self, y: Any, h_next: Tensor) -> Heads:
        """The outputs that must only depend on declared rows: the written rows (B, w, ...), and y leaf by leaf."""
        return {"the written rows": index_sets.gather(h_next, self.sparsity.writes), **leaves(y, self.h.shape[0])}

    def chosen(self) -> "EvaluationPoint":
        """Store the choices that the cell makes at this point.

        Raises:
            RTRLError: the cell returned something malformed.
        """
        sparsity = self.run(free=True)[2]
        check_sparsity(sparsity, self.h, dict(self.cell.named_parameters()))
        sparsity = own_copy(sparsity)
        return replace(self, sparsity=sparsity, replay=sparsity if takes_replay(self.cell) else None)


def leaves(y: Any, batch: int) -> Heads:
    """The floating-point and complex leaves of y with the batch as dimension 0, under readable names."""
    found, _ = pytree.tree_flatten_with_path(y)
    return {
        f"y{pytree.keystr(path)}": leaf
        for path, leaf in found
        if isinstance(leaf, Tensor) and is_continuous(leaf) and leaf.ndim and leaf.shape[0] == batch
    }


@dataclass(slots=True)
class Subject:
    """A cell under test.

    Attributes:
        given: the given steps in the dtype of the cell.
        points: the given steps in float64, each followed by a perturbed point.
        trouble: the error that kept the cell from running, and its step; None if there is none.
        notes: facts that are allowed but worth knowing; the checks add to them.
        draw: adds noise of a scale to a tensor.
    """

    given: list[EvaluationPoint]
    points: list[EvaluationPoint] = field(default_factory=list)
    trouble: tuple[str, int] | None = None
    notes: list[str] = field(default_factory=list)
    draw: Callable[[Tensor, float], Tensor] = field(default=lambda value, scale: value)

    def perturb(self, point: EvaluationPoint, scale: float = 0.5) -> EvaluationPoint:
        """Perturb the parameters and the state, and let the cell choose there; keep the point if it cannot run."""
        cell = copy.deepcopy(point.cell)
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.copy_(self.draw(parameter, 0.1))
        h = self.draw(point.h, scale)
        for attempt in (replace(point, cell=cell, h=h, perturbed=True), replace(point, h=h, perturbed=True)):
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
    """A function that adds noise to tensors, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Tensor, scale: float) -> Tensor:
        if not is_continuous(value):
            return value.detach().clone()
        dtype = torch.complex128 if value.is_complex() else torch.float64
        noise = torch.randn(value.shape, generator=generator, dtype=dtype).to(value)
        return value.detach() + scale * noise * (1 + value.detach().abs())

    return draw


def cast(point: EvaluationPoint, dtype: torch.dtype) -> EvaluationPoint:
    """The step in another real dtype, and the complex one of its precision, without its choices."""

    def converted(value: Tensor) -> Tensor:
        if value.is_complex():
            return value.to(dtype.to_complex())
        return value.to(dtype) if value.is_floating_point() else value

    cell = copy.deepcopy(point.cell)
    complex_ones = [t for t in (*cell.parameters(), *cell.buffers()) if t.is_complex()]
    values = [converted(t.detach()) for t in complex_ones]
    for t in complex_ones:
        t.data = t.data.real  # Module.to would make it real, with a warning
    cell = cell.to(dtype)
    for t, value in zip(complex_ones, values, strict=True):
        t.data = value
    return EvaluationPoint(cell, pytrees.map_tensors(converted, point.x), converted(point.h), point.step)


def copied(cell: nn.Module) -> nn.Module:
    """Copy a cell.

    Raises:
        ConfigError: the cell cannot be copied.
    """
    try:
        return copy.deepcopy(cell)
    except Exception as error:
        raise ConfigError(f"the cell cannot be copied, so it cannot be checked without changing it: {error}") from error


def probe(cell: nn.Module, xs: list[Any], h: Tensor, seed: int) -> Subject:
    """Run a copy of the cell along its steps as far as possible, and store the point of each step."""
    draw = generator_draw(seed)
    if h.shape[0] == 1:  # with one sample, interactions could not be seen
        xs = [pytrees.map_tensors(lambda t: torch.cat([t, t]), x) for x in xs]
        h = torch.cat([h, draw(h, 0.1)])
    subject = Subject([], draw=draw)
    runner = copy.deepcopy(cell)  # an impure cell changes as it runs; the points start from the given cell
    step = 0
    try:
        for step, x in enumerate(xs):
            point = replace(EvaluationPoint(runner, x, h, step).chosen(), cell=copy.deepcopy(cell))
            subject.given.append(point)
            h_next = EvaluationPoint(runner, x, h, step).run(free=True)[1]
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


def build_points(subject: Subject) -> None:
    """Fill ``subject.points``, in float64 if the cell runs in it and keeps it, else in the dtype of the cell."""
    wide: list[EvaluationPoint] = []
    try:
        for point in subject.given:
            wide.append(cast(point, torch.float64).chosen())
            if wide[-1].run(free=True)[1].dtype != torch.float64:
                raise TypeError("the cell does not keep float64")
    except Exception:  # the check of dtypes reports it
        wide = subject.given
    subject.points = [p for point in wide for p in (point, subject.perturb(point))]
