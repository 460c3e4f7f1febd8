"""Each step of a stream, linearised by autograd on the cell's own parameters: what laws and diagnoses compute with."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtrl.cells.protocol import Sparsity, call_cell
from rtrl.testing.streams import Stream


@dataclass(frozen=True, slots=True)
class LinearizedStep:
    """One step; P counts the entries of all trainable parameters, in the cell's own order.

    Attributes:
        x: its input.
        h, h_next: the state before it, after its resets, and the state after it, both (B, ...).
        dynamics: J (B, H, H).
        immediate: B (B, H, P).
        adjoint: ∂ℓ/∂h (B, H) of its loss, with all that depends on h.
        new_adjoint: ∂ℓ/∂h_next (B, H), as far as y is computed from the h_next that the cell returns.
        direct: ∂ℓ/∂θ (P,) with h held fixed.
        sparsity: what the cell declared.
        fresh: the samples (B,) that are reset before it, or None.
        fresh_influence: the influence (B, H, P) of the first state, for samples that are reset.
    """

    x: Tensor
    h: Tensor
    h_next: Tensor
    dynamics: Tensor
    immediate: Tensor
    adjoint: Tensor
    new_adjoint: Tensor
    direct: Tensor
    sparsity: Sparsity
    fresh: Tensor | None
    fresh_influence: Tensor

    def restarted(self, influence: Tensor) -> Tensor:
        """An influence (B, H, P) after the resets of this step."""
        if self.fresh is None:
            return influence
        return torch.where(self.fresh.reshape(-1, 1, 1), self.fresh_influence[..., : influence.shape[2]], influence)


@dataclass(frozen=True, slots=True)
class LinearizedStream:
    """All steps of a stream.

    Attributes:
        shapes: of the trainable parameters, by name, in the order of the entries of P.
        steps: one per step.
        first_influence: ∂h₀/∂θ (B, H, P); zero unless the first state is learned.
    """

    shapes: Mapping[str, torch.Size]
    steps: Sequence[LinearizedStep]
    first_influence: Tensor

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        """Split the last dimension, P, by parameter; a gradient (P,) takes the parameter's shape."""
        parts = values.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        named = dict(zip(self.shapes, parts, strict=True))
        return {n: part.reshape(self.shapes[n]) for n, part in named.items()} if values.ndim == 1 else named

    def joined(self, values: Mapping[str, Tensor]) -> Tensor:
        """Join the gradients of all parameters to one (P,)."""
        return torch.cat([values[name].flatten() for name in self.shapes])


def linearized(stream: Stream) -> LinearizedStream:
    """Linearise every step of a stream, one backward pass per sample and entry of the state."""
    cell = copy.deepcopy(stream.cell)
    theta = {name: p for name, p in cell.named_parameters() if p.requires_grad}
    inputs = list(theta.values())
    start = {name: p.detach().clone() for name, p in theta.items()}
    steps: list[LinearizedStep] = []
    first: Tensor | None = None
    state: Tensor | None = None
    for t in range(stream.steps):
        with torch.no_grad():
            for name, offset in ({} if stream.offsets is None else stream.offsets[t]).items():
                theta[name].copy_(start[name] + offset)
            for name in () if stream.offsets is None else start.keys() - stream.offsets[t].keys():
                theta[name].copy_(start[name])
        fresh = None if stream.resets is None or not bool(stream.resets[t].any()) else stream.resets[t]
        begun, begun_influence = _first_state(cell, stream.batch_size, inputs)
        first = begun_influence if first is None else first
        state = begun if state is None else state
        if fresh is not None:
            state = torch.where(fresh.reshape(-1, *[1] * (state.ndim - 1)), begun, state)
        h = state.detach().clone().requires_grad_()
        with torch.enable_grad():
            y, h_next, sparsity = call_cell(cell, stream.xs[t], h, None)
            loss = stream.loss(t, y)
        dynamics, immediate = _jacobians(h_next, h, inputs)
        adjoint, *by_theta, new = _pulled(loss, [h, *inputs, h_next])
        direct = torch.cat([g.flatten() for g in by_theta])
        state = h_next.detach()
        steps.append(
            LinearizedStep(
                *(stream.xs[t], h.detach(), state, dynamics, immediate, adjoint.flatten(1), new.flatten(1), direct),
                *(sparsity, fresh, begun_influence),
            )
        )
    assert first is not None
    return LinearizedStream({name: p.shape for name, p in theta.items()}, steps, first)


def states_received(stream: Stream) -> list[Tensor]:
    """The state that each step receives, before its resets, by forward passes only."""
    cell, states = copy.deepcopy(stream.cell), []
    with torch.no_grad():
        start = {name: p.clone() for name, p in cell.named_parameters()}
        h: Tensor = cell.init_state(stream.batch_size)  # type: ignore[operator]
        for t in range(stream.steps):
            states.append(h)
            for name, p in cell.named_parameters():
                p.copy_(start[name] if stream.offsets is None else start[name] + stream.offsets[t].get(name, 0.0))
            if stream.resets is not None:
                fresh: Tensor = cell.init_state(stream.batch_size)  # type: ignore[operator]
                h = torch.where(stream.resets[t].reshape(-1, *[1] * (h.ndim - 1)), fresh, h)
            h = call_cell(cell, stream.xs[t], h, None)[1]
    return states


def _first_state(cell: nn.Module, batch_size: int, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The first state and its influence (B, H, P)."""
    with torch.enable_grad():
        h: Tensor = cell.init_state(batch_size)  # type: ignore[operator]
    batch, size, count = batch_size, h[0].numel(), sum(p.numel() for p in inputs)
    if not h.requires_grad:
        return h.detach(), h.new_zeros(batch, size, count)
    return h.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in _rows(h, inputs)]).reshape(
        batch, size, count
    )


def _jacobians(h_next: Tensor, h: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    batch, size = h.flatten(1).shape
    dynamics = h.new_zeros(batch, size, size)
    immediate = h.new_zeros(batch, size, sum(p.numel() for p in inputs))
    for i, (by_state, *by_theta) in enumerate(_rows(h_next, [h, *inputs])):
        dynamics[i // size, i % size] = by_state.flatten(1)[i // size]
        immediate[i // size, i % size] = torch.cat([g.flatten() for g in by_theta])
    return dynamics.detach(), immediate.detach()


def _rows(h_next: Tensor, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The derivatives of one entry of the state after another."""
    with torch.enable_grad():
        entries = h_next.flatten().unbind()
    return (_pulled(entry, inputs) for entry in entries)


def _pulled(value: Tensor | None, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The derivatives of a number, zeros where it does not depend on an input."""
    if value is None or not value.requires_grad:
        return tuple(torch.zeros_like(leaf).detach() for leaf in inputs)
    asked = [i for i, leaf in enumerate(inputs) if leaf.requires_grad]
    found = torch.autograd.grad(
        value.reshape(()), [inputs[i] for i in asked], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    grads = dict(zip(asked, found, strict=True))
    return tuple(grads[i].detach() if i in grads else torch.zeros_like(leaf) for i, leaf in enumerate(inputs))
