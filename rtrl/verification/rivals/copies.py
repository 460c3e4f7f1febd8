"""Cells of one form that learn side by side, each with its own parameters and its own data: seeds and rates in one
run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

CHUNK = 2**23  # numbers of Jacobians that are written at once


@dataclass(frozen=True)
class Recorded:
    """Consecutive steps of K copies with B samples each.

    Attributes:
        xs: the inputs (T, K, B, ...).
        hs: the states before each step (T, K, B, ...).
        ys: the outputs (T, K, B, d_out).
        last: the state after the last step (K, B, ...).
    """

    xs: Tensor
    hs: Tensor
    ys: Tensor
    last: Tensor


class Copies:
    """K cells that differ in the values of their parameters alone.

    Args:
        cells: modules of one form, without sparsity; their parameters are copied.

    Attributes:
        cell: the first of the cells, for its form.
        values: name → the parameters of all copies (K, ...), leaves that require grad.
    """

    def __init__(self, cells: Sequence[nn.Module]) -> None:
        self.cell: Any = cells[0]
        named = [dict(cell.named_parameters()) for cell in cells]
        self.values = {name: torch.stack([each[name].detach() for each in named]).requires_grad_() for name in named[0]}
        self._step = vmap(self._one)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def _one(self, values: dict[str, Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, after = functional_call(self.cell, values, (x, h))[:2]
        return y, after

    def first_state(self, batch_size: int) -> Tensor:
        """Return the first state (K, B, ...)."""
        first: Tensor = self.cell.init_state(batch_size).detach()
        return first.expand(len(self), *first.shape)

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of all copies, with a graph.

        Args:
            x: the inputs (K, B, ...).
            h: the states (K, B, ...).

        Returns:
            The outputs (K, B, d_out) and the next states.
        """
        y, after = self._step(self.values, x, h)
        return y, after

    @torch.no_grad()
    def record(self, xs: Tensor, h: Tensor) -> Recorded:
        """Take T steps from the state h, without a graph."""
        hs, ys = [], []
        for x in xs:
            hs.append(h)
            y, h = self.step(x, h)
            ys.append(y)
        return Recorded(xs, torch.stack(hs), torch.stack(ys), h)

    def direct(self, run: Recorded, dys: Tensor) -> tuple[Tensor, Tensor]:
        """Return what losses reach within their own steps.

        Args:
            run: the steps.
            dys: the gradients of the losses at the outputs (T, K, B, d_out).

        Returns:
            The adjoints (T, K, B, H), and the gradient by parameter with the states held fixed (K, P).
        """
        steps, copies, batch = dys.shape[:3]
        x, h, dy = (_copies_first(value) for value in (run.xs, run.hs, dys))
        h = h.detach().requires_grad_()
        y, _ = self.step(x, h)
        by_h, *by_theta = torch.autograd.grad(y, [h, *self.values.values()], dy, materialize_grads=True)
        adjoint = by_h.view(copies, steps, batch, -1).transpose(0, 1)
        return adjoint, torch.cat([part.flatten(1) for part in by_theta], dim=1)

    @torch.no_grad()
    def jacobians(self, run: Recorded) -> tuple[Tensor, Tensor]:
        """Return the dynamics Jacobians (T, K, B, H, H) and the immediate ones (T, K, B, H, P) of all steps."""

        def after(values: dict[str, Tensor], h: Tensor, x: Tensor) -> Tensor:
            return self._one(values, x.unsqueeze(0), h.unsqueeze(0))[1].flatten()

        each = vmap(vmap(jacrev(after, argnums=(0, 1)), in_dims=(None, 0, 0)))
        x, h = _copies_first(run.xs), _copies_first(run.hs)
        by_theta, by_h = each({name: value.detach() for name, value in self.values.items()}, h, x)
        steps, _, batch = run.xs.shape[:3]
        immediate = torch.cat([part.flatten(3) for part in by_theta.values()], dim=3)
        dynamics = by_h.flatten(3)
        return tuple(part.unflatten(1, (steps, batch)).transpose(0, 1) for part in (dynamics, immediate))

    def numbers_per_step(self, run: Recorded) -> int:
        """Return how many numbers the Jacobians of one step are."""
        size = run.hs[0, 0, 0].numel()
        theta = sum(value[0].numel() for value in self.values.values())
        return run.xs.shape[1] * run.xs.shape[2] * size * (size + theta)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Split (K, P) by parameter."""
        parts = flat.split([value[0].numel() for value in self.values.values()], dim=1)
        return {name: part.view_as(value) for (name, value), part in zip(self.values.items(), parts, strict=True)}


def _copies_first(value: Tensor) -> Tensor:
    """(T, K, B, ...) as (K, T · B, ...)."""
    return value.transpose(0, 1).flatten(1, 2)
