"""What is kept of a step until its block closes, and what linearising a run of steps gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rtrl._engine.output_jacobian import DenseOutputJacobian, Response
from rtrl._engine.taps import Tap
from rtrl.cells.protocol import Sparsity


@dataclass(slots=True)
class Step:
    """What is kept of one step until its block closes.

    Attributes:
        x: the input, a tree of tensors (B, ...).
        h: (B, n, ...), the state that the step received.
        sparsity: what the cell declared, or was made to do.
        outputs: the floating-point tensors of y, as leaves whose ``.grad`` collects the gradient of the losses.
        number: the absolute number of the step, for messages.
    """

    x: Any
    h: Tensor
    sparsity: Sparsity
    outputs: list[Tensor]
    number: int


@dataclass(frozen=True, slots=True)
class LinearTap:
    """A ``Tap`` with its derivatives, over the m steps and B samples of a group.

    Attributes:
        tap: the use; its ``index`` and ``inputs`` have N = B·m samples, one sample's steps after one another.
        response: ∂h_next[writes]/∂z of the N samples; None if z reaches y alone.
        earned: (B·m, K, L, O), ∂ℓ/∂z through y; None if no loss reaches it.
    """

    tap: Tap
    response: Response | None
    earned: Tensor | None


@dataclass(frozen=True, slots=True)
class Linearization:
    """m steps of one kind, linearised at their own states and at the present parameters.

    Attributes:
        times: positions of the steps in their block, ascending.
        writes, cols: LongTensors (B, m, w) and (B, m, c), or None for all rows: the rows and columns of the dynamics
            Jacobian.
        jacobian: ``jacobian(start, stop)`` gives (B, stop − start, w·width, c·width), ∂h_next[writes]/∂h[cols] of these
            of the m steps.
        adjoint: (B, m, c·width), ∂ℓ/∂h[cols] through each step's own y; None if it is zero.
        adjoint_next: (B, m, w·width), ∂ℓ/∂h_next[writes] through each step's own y, on top of ``adjoint``; None
            if it is zero.
        taps: the linear uses of parameters.
        active: for each sliced parameter, LongTensor (B, m, k).
        general: names of parameters with uses that are no taps and that the next state depends on.
        lossless: no loss was given at any of the steps.
        direct: gradient through y, summed over steps and samples, of parameters with uses that are no taps.
        jacobians: (B, U, m, w·width) weights → the general parameters' weighted immediate Jacobians (B, U, *shape),
            all uses included.
    """

    times: list[int]
    writes: Tensor | None
    cols: Tensor | None
    jacobian: Callable[[int, int], Tensor]
    adjoint: Tensor | None
    adjoint_next: Tensor | None
    taps: list[LinearTap]
    active: Mapping[str, Tensor]
    general: list[str]
    lossless: bool
    direct: dict[str, Tensor]
    jacobians: Callable[[Tensor], dict[str, Tensor]]


def joined(pieces: Sequence[Linearization]) -> list[Linearization]:
    """Consecutive runs of steps of one kind as one, so that what is done a tap is done once a block; pieces whose taps
    differ stay apart."""
    if len(pieces) == 1 or len({_form(piece) for piece in pieces}) > 1 or not _form(pieces[0])[1]:
        return list(pieces)
    first = pieces[0]
    spans = [len(piece.times) for piece in pieces]
    jacobians = torch.cat([piece.jacobian(0, span) for piece, span in zip(pieces, spans, strict=True)], dim=1)
    size = jacobians.shape[0]
    taps = []
    shared: dict[int, tuple[DenseOutputJacobian | None, Tensor | None]] = {}  # a weight and its bias share theirs
    for column in zip(*(piece.taps for piece in pieces), strict=True):
        key = id(column[0].response)
        if key not in shared:
            values = _over_samples(
                [c.response.values if isinstance(c.response, DenseOutputJacobian) else None for c in column], size, 1
            )
            earned = _filled([c.earned for c in column], [size * span for span in spans], 0)
            shared[key] = None if values is None else DenseOutputJacobian(values), _over_samples(earned, size)
        tap = replace(
            column[0].tap,
            index=_over_samples([c.tap.index for c in column], size),
            inputs=_over_samples([c.tap.inputs for c in column], size),
        )
        taps.append(LinearTap(tap, *shared[key]))
    direct: dict[str, Tensor] = {}
    for piece in pieces:
        _add(direct, piece.direct)

    def weighted(weights: Tensor) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for piece, weight in zip(pieces, weights.split(spans, dim=2), strict=True):
            _add(total, piece.jacobians(weight))
        return total

    return [
        Linearization(
            times=[t for piece in pieces for t in piece.times],
            writes=_over_steps([piece.writes for piece in pieces]),
            cols=_over_steps([piece.cols for piece in pieces]),
            jacobian=lambda start, stop: jacobians[:, start:stop],
            adjoint=_over_steps(_filled([piece.adjoint for piece in pieces], spans, 1)),
            adjoint_next=_over_steps(_filled([piece.adjoint_next for piece in pieces], spans, 1)),
            taps=taps,
            active={name: torch.cat([piece.active[name] for piece in pieces], dim=1) for name in first.active},
            general=first.general,
            lossless=all(piece.lossless for piece in pieces),
            direct=direct,
            jacobians=weighted,
        )
    ]


def _form(piece: Linearization) -> tuple[Any, ...]:
    """What pieces must share to be joined."""
    uses = tuple(
        (tap.tap.name, tap.tap.shape, tap.tap.transposed, tap.tap.index is None, tap.tap.inputs is None)
        for tap in piece.taps
    )
    dense = all(isinstance(tap.response, DenseOutputJacobian) for tap in piece.taps)
    sets = tuple(None if index is None else index.shape[2] for index in (piece.writes, piece.cols))
    return (uses, dense, sets, tuple(piece.general))


def _over_samples(parts: Sequence[Tensor | None], size: int, dim: int = 0) -> Tensor | None:
    """Join tensors that have the N = B·m samples in dimension ``dim``; None if one is None."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    split = [part.unflatten(dim, (size, -1)) for part in known]
    return torch.cat(split, dim=dim + 1).flatten(dim, dim + 1)


def _over_steps(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join tensors (B, m, ...); None if one is None."""
    known = [part for part in parts if part is not None]
    return torch.cat(known, dim=1) if len(known) == len(parts) else None


def _filled(parts: Sequence[Tensor | None], counts: Sequence[int], dim: int) -> list[Tensor | None]:
    """Zeros where one piece has nothing but another has; ``counts`` are their sizes of dimension ``dim``."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return list(parts)
    shapes = [(*like.shape[:dim], count, *like.shape[dim + 1 :]) for count in counts]
    return [like.new_zeros(shape) if part is None else part for part, shape in zip(parts, shapes, strict=True)]


def _add(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value
