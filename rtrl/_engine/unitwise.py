"""Steps whose units interact in recorded linear maps alone: ``h' = f(z₁, z₂, …, h)`` with f unit by unit.

With every z held fixed, ``∂h'/∂z`` and ``∂h'/∂h`` are then diagonal by unit, and so is ``∂u/∂h`` of each linear map
``z = W u``: one backward pass per part of the state gives what would take one per entry. This is found at a perturbed
point, once for each kind of step, and held against every block by a probe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl._engine import deferred
from rtrl._engine.linearization import UnitwiseOutputJacobian, largest
from rtrl._engine.probe import ProbeWeights, has_numbers, probe_weights
from rtrl._engine.taps import TapRecorder

_MOST_PARTS = 4
_LEAST_NUMBERS = 2**17  # of all output Jacobians written out: below, they take less time than the probe


@dataclass(frozen=True, slots=True)
class StateUse:
    """How one part of the state enters the next one through a linear map, ``response · W · scale``.

    Attributes:
        response: (N, S, G, U), ``∂h'[s, i]/∂z[g, i]``.
        weight: (G, U, U), the columns of W that meet the part.
        part: the part.
        scale: (N, U), ``∂u[i]/∂h[part, i]``; None for ones.
    """

    response: Tensor
    weight: Tensor
    part: int
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class UnitwiseStateJacobian:
    """``∂h'/∂h`` of N samples as its factors, over a state of S parts of U units.

    Attributes:
        like: (N, ...), the states.
        shape: (S, U).
        uses: the linear maps that take the state.
        direct: (N, S, S', U), how units of the state act on themselves outside all linear maps; None if they do not.
    """

    like: Tensor
    shape: tuple[int, int]
    uses: Sequence[StateUse]
    direct: Tensor | None

    def of_steps(self, start: int, stop: int, size: int) -> Tensor:
        """Steps ``start … stop − 1`` of ``size`` samples, every entry written out: (B, stop − start, S·U, S·U)."""
        m = len(self.like) // size
        if size == 1 or stop - start == m:
            at: Tensor | slice = slice(start * size, stop * size)
        else:
            at = torch.arange(size * m, device=self.like.device).view(size, m)[:, start:stop].flatten()
        jacobian: Tensor = self.written_out(at).unflatten(0, (size, stop - start))
        return jacobian

    def written_out(self, at: Tensor | slice) -> Tensor:
        """The samples ``at``, every entry written out: (E, S·U, S·U).

        Cost: ``E·S·G·U²`` multiplications for each linear map of the state.
        """
        parts, u = self.shape
        direct = None if self.direct is None else self.direct[at]
        count = self.like[at].shape[0]
        jacobian = self.like.new_empty(count, parts, u, parts, u)
        for part in range(parts):
            block = jacobian[:, :, :, part]  # (E, S, U, U)
            empty = True
            for use in self.uses:
                if use.part != part:
                    continue
                response = use.response[at]
                scale = None if use.scale is None else use.scale[at, None, None, :]
                for g in range(use.weight.shape[0]):
                    gate, weight = response[:, :, g, :, None], use.weight[g]
                    if scale is not None:
                        weight = weight * scale
                    if empty:
                        torch.mul(gate, weight, out=block)
                    else:
                        block.addcmul_(gate, weight)
                    empty = False
            if empty:
                block.zero_()
            if direct is not None:
                block.diagonal(dim1=2, dim2=3).add_(direct[:, :, part])
        return jacobian.view(count, parts * u, parts * u)


@dataclass(frozen=True, slots=True)
class UnitwisePattern:
    """What was found at a perturbed point.

    Attributes:
        parts: S, the number of parts of the state.
        columns: for each recorded output, part of the state → the first of the U inputs that are this part.
    """

    parts: int
    columns: Sequence[Mapping[int, int]]


@dataclass(frozen=True, slots=True)
class UnitwiseDerivatives:
    """The derivatives of a batch of steps.

    Attributes:
        output_jacobians: one for each recorded output; None if the next state does not depend on it.
        state_jacobian: ``∂h'/∂h``.
    """

    output_jacobians: Sequence[UnitwiseOutputJacobian | None]
    state_jacobian: UnitwiseStateJacobian


def find_pattern(
    h_next: Tensor, h: Tensor, recorder: TapRecorder, weights: Mapping[str, Tensor]
) -> UnitwisePattern | None:
    """Look for the pattern at a perturbed point.

    Args:
        h_next: (N, H), the next states.
        h: (N, n, ...), the states, which require grad.
        recorder: the recorded uses, gated.
        weights: name → parameter.

    Returns:
        The pattern; None if the units interact elsewhere, too, or if the steps are small.

    Cost: some backward passes over the batch.
    """
    if recorder.valve is None or not h_next.requires_grad:
        return None
    outputs = [taps[0].output for taps in recorder.by_output]
    size = h_next.shape[1]
    if size * sum(output.numel() for output in outputs) < _LEAST_NUMBERS:
        return None
    if not has_numbers(h_next):
        return None
    with recorder.valve.shut():
        reached = _pull(h_next, outputs, h_next.new_ones(()))
        sources = [None if grad is None else source for grad, source in zip(reached, recorder.sources, strict=True)]
        inputs = [None if source is None else _numbered(source, h) for source in sources]
    for parts in range(1, _MOST_PARTS + 1):
        if size % parts or size // parts <= parts:
            continue
        pattern = UnitwisePattern(parts, [_columns(numbers, size // parts) for numbers in inputs])
        if unitwise_derivatives(h_next, h, recorder, weights, pattern, 0) is not None:
            return pattern
    return None


def _numbered(source: Tensor, h: Tensor) -> Tensor | None:
    """Which input of a linear map each entry of the state is, (N, H): NaN for none. It is right where each entry is one
    input at most."""
    numbers = torch.arange(source[0].numel(), device=h.device).to(source).view(source.shape[1:])
    plain, weighted = (_pull(source, [h], weights)[0] for weights in (torch.ones_like(numbers), numbers))
    return None if plain is None or weighted is None else (weighted / plain).flatten(1)


def _columns(numbered: Tensor | None, units: int) -> dict[int, int]:
    """Part of the state → the first of the inputs that are this part, of those parts that are inputs in order."""
    if numbered is None:
        return {}
    first = (numbered - torch.arange(numbered.shape[1], device=numbered.device) % units).unflatten(1, (-1, units))
    columns = {}
    for part in range(first.shape[1]):
        known = first[:, part][~first[:, part].isnan()]
        if known.numel() and bool(((known - known[0]).abs() < 0.5).all()) and int(known[0].round()) >= 0:
            columns[part] = int(known[0].round())
    return columns


def unitwise_derivatives(
    h_next: Tensor,
    h: Tensor,
    recorder: TapRecorder,
    weights: Mapping[str, Tensor],
    pattern: UnitwisePattern,
    seed: int,
) -> UnitwiseDerivatives | None:
    """Take the derivatives of a batch of steps with one backward pass per part of the state, and hold the pattern
    against them by a probe.

    Args:
        h_next, h, recorder, weights: see ``find_pattern``.
        pattern: what was found there.
        seed: of the probe.

    Returns:
        The derivatives; None if the pattern does not hold here, or a derivative is not finite.

    Cost: per part of the state, and for the inputs of each linear map that takes the state, one backward pass and two
        or more for the probe, none of which goes through a linear map.
    """
    valve, parts, units = recorder.valve, pattern.parts, h_next.shape[1] // pattern.parts
    if valve is None or not h_next.requires_grad or len(pattern.columns) != len(recorder.by_output):
        return None
    if torch.finfo(h.dtype).max < 2.0**100:  # the probe's weights would overflow
        return None
    outputs = [taps[0].output for taps in recorder.by_output]
    with valve.shut():
        rows = _unitwise_rows(h_next, [h, *outputs], parts, probe_weights(units, h, seed))
        if rows is None:
            return None
        direct, *responses = (_stacked(column, units) for column in zip(*rows, strict=True))
        uses: list[StateUse] = []
        for place, response in enumerate(responses):
            if response is None:
                continue
            found = _state_uses(h, recorder, place, response, weights, pattern, seed)
            if found is None:
                return None
            uses += found
    jacobians = _shared(responses)
    return UnitwiseDerivatives(jacobians, UnitwiseStateJacobian(h.detach(), (parts, units), uses, direct))


def _unitwise_rows(
    head: Tensor, inputs: Sequence[Tensor], parts: int, probe: Sequence[ProbeWeights]
) -> list[list[Tensor | None]] | None:
    """For each part of the head (N, S·U), the gradient of the sum of its units at the inputs; None if units mix."""
    units = head.shape[1] // parts
    rows = []
    for part in range(parts):
        seed = head.new_zeros(parts, units)
        seed[part] = 1.0
        plain = _pull(head, inputs, seed.flatten())
        if not all(_is_whole(grad, units) for grad in plain):
            return None
        for weights in probe:
            seed[part] = weights.values
            for weighted, grad in zip(_pull(head, inputs, seed.flatten()), plain, strict=True):
                if grad is None or weighted is None:
                    continue
                shape = (len(grad), -1, units)
                if not weights.agree(weighted.reshape(shape), grad.reshape(shape)):
                    return None
        rows.append(plain)
    return rows


def _is_whole(grad: Tensor | None, units: int) -> bool:
    """Whether a gradient (N, ...) is finite, with room below infinity, and has several entries for each unit."""
    if grad is None:
        return True
    return grad[0].numel() % units == 0 and deferred.holds(largest(grad) < torch.finfo(grad.dtype).max * 2.0**-20)


def _is_one(value: Tensor) -> bool:
    """Whether all entries are 1, where the host can read them without waiting."""
    return deferred.on_host(value) and bool((value == 1).all())


def _stacked(column: Sequence[Tensor | None], units: int) -> Tensor | None:
    """The gradients (N, ...) of one input from each part, as (N, S, G, U); None if there are none."""
    first = next((grad for grad in column if grad is not None), None)
    if first is None:
        return None
    rows = [torch.zeros_like(first) if grad is None else grad for grad in column]
    return torch.stack([row.reshape(len(first), -1, units) for row in rows], dim=1)


def _state_uses(
    h: Tensor,
    recorder: TapRecorder,
    place: int,
    response: Tensor,
    weights: Mapping[str, Tensor],
    pattern: UnitwisePattern,
    seed: int,
) -> list[StateUse] | None:
    """How the state enters one recorded output; None if otherwise than the pattern says."""
    tap = recorder.by_output[place][0]
    n, units = response.shape[0], response.shape[3]
    if tap.shape[:2] != (1, 1) or tap.shape[2] != response.shape[2] * units:
        return None
    if tap.output.is_leaf:
        return []
    source, columns = recorder.sources[place], pattern.columns[place]
    if source is None or tap.index is not None or source.shape[0] != n:
        return None
    weight = weights[tap.name].detach()
    weight = weight.T if tap.transposed else weight
    if any(first + units > weight.shape[1] for first in columns.values()):
        return None
    pieces = [
        (part, weight[:, first : first + units].unflatten(0, (-1, units))) for part, first in sorted(columns.items())
    ]
    if source is h:
        return [StateUse(response, piece, part) for part, piece in pieces]
    others = [taps[0].output for taps in recorder.by_output]
    plain, *through = _pull(source, [h, *others], source.new_ones(()))
    if any(grad is not None for grad in through):
        return None
    if plain is None:
        return []
    plain = plain.reshape(n, pattern.parts, units)
    if not _is_whole(plain, units):
        return None
    for probe in probe_weights(source[0].numel(), h, seed):
        (weighted,) = _pull(source, [h], probe.values.view(source.shape[1:]))
        scale = probe.values.new_zeros(pattern.parts, units)
        for part, first in columns.items():
            scale[part] = probe.values[first : first + units]
        if weighted is None or not probe.agree(weighted.view_as(plain), plain, scale):
            return None
    return [
        StateUse(response, piece, part, None if _is_one(plain[:, part]) else plain[:, part]) for part, piece in pieces
    ]


def _pull(head: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor | None]:
    """The gradients of a head (N, ...) weighted alike in every sample; None where it does not depend on an input."""
    if not (head.requires_grad and inputs):
        return [None] * len(inputs)
    seed = weights.expand_as(head).contiguous()
    return list(torch.autograd.grad(head, inputs, seed, retain_graph=True, allow_unused=True))


def _shared(responses: Sequence[Tensor | None]) -> list[UnitwiseOutputJacobian | None]:
    """An output Jacobian for each response, one for those that are equal: what is computed from it is computed once."""
    jacobians: list[UnitwiseOutputJacobian] = []
    shared: list[UnitwiseOutputJacobian | None] = []
    for response in responses:
        known = None
        if response is not None:
            known = next((j for j in jacobians if deferred.on_host(response) and torch.equal(j.values, response)), None)
            if known is None:
                known = UnitwiseOutputJacobian(response)
                jacobians.append(known)
        shared.append(known)
    return shared
