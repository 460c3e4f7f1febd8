"""The references of the gradient claim that need more than one call of an oracle."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import oracles
from rtrl.cells.moe import RecurrentMoE
from rtrl.verification.gradients.driver import Segment, Snapshot
from rtrl.verification.harness.compare import Comparison, void

SHARPNESS = 1e-5
"""A difference whose own relative error estimate exceeds this is not a check; another direction is drawn."""
_DIRECTIONS = 3


@dataclass(frozen=True, slots=True)
class Slope:
    """The derivative of the loss along a direction, with an estimate of its error, from forward passes alone."""

    direction: Mapping[str, Tensor]
    value: float
    estimate: float


def finite_differences(cell: RecurrentMoE, segment: Segment, sliced: Collection[str], seed: int) -> list[Slope]:
    """Return slopes along random directions: all parameters, the sliced ones alone, all again.

    A direction on which the choices flip within every difference gives no sharp value; then another is drawn and
    smaller steps are taken, independently of the learner.
    """
    generator = torch.Generator().manual_seed(seed)
    slopes: list[Slope] = []
    for attempt in range(4 * _DIRECTIONS):
        names = sliced if len(slopes) % 2 else tuple(name for name, _ in cell.named_parameters())
        direction = {
            n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            for n, p in cell.named_parameters()
            if n in names
        }
        step = 1e-2 / 4 ** (attempt - len(slopes))
        slope = Slope(
            direction, *oracles.directional_difference(cell, segment.inputs, segment.loss, direction, step=step)
        )
        if slope.value != 0 and slope.estimate <= SHARPNESS * abs(slope.value):
            slopes.append(slope)
        if len(slopes) == _DIRECTIONS:
            break
    return slopes


def compare_slopes(snapshot: Snapshot, slopes: list[Slope], rounding: float) -> Comparison:
    """Compare a gradient with slopes: the error relative to each slope, which its own estimate bounds (plus
    ``rounding``)."""
    if len(slopes) < _DIRECTIONS:
        return void(f"only {len(slopes)} of {_DIRECTIONS} directions have a sharp finite difference", SHARPNESS)
    worst: list[tuple[float, Comparison]] = []
    for number, slope in enumerate(slopes):
        tolerance = slope.estimate / abs(slope.value) + rounding
        parts = {name: snapshot.gradient[name] for name in slope.direction}
        if any(part is None for part in parts.values()):
            return void("a parameter has no gradient", tolerance)
        total = sum(float((part * slope.direction[name]).sum()) for name, part in parts.items() if part is not None)
        error = abs(total - slope.value) / abs(slope.value)
        share = error / tolerance if math.isfinite(error) else math.inf
        worst.append((share, Comparison(error, tolerance, len(slopes), f"direction {number}")))
    return max(worst, key=lambda pair: pair[0])[1]


def dense_rtrl(
    cell: RecurrentMoE, segment: Segment, checkpoints: tuple[int, ...], resets: Tensor | None = None,
    offsets: list[dict[str, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:  # fmt: skip
    """Return the gradient after the last step and the influences at checkpoints, by the textbook recursion."""
    gradient, influences = oracles.dense_rtrl(
        cell, segment.inputs, segment.loss, resets=resets, offsets=offsets, return_influence=True
    )
    return gradient, {t: influences[t] for t in checkpoints}
