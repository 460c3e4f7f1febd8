"""Witnesses of stored influences: one random combination of each row's columns, brought up to date block by block.

A stored influence S (H, p) of a slice and a random vector u (p,) give the witness ``s = S u``. While the slice is
dormant, ``s ← Φ s`` and the gradient that it contributes, along u, grows by ``v s``. That takes one column where the
slice has p, so it is done at every block, without a tree and without a plan; and when the slice has been brought up to
date, ``S u`` must be s.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.errors import AuditError

Draw = Callable[[Sequence[int], Tensor], Tensor]

YOURS_IS_RIGHT = (
    "The fault is in the learner, not in the cell; nothing was delivered. Please report it; reset(discard=True) starts "
    "again"
)
_ROUNDING = 1000  # how many rounding errors of the largest number met are accepted
_SPREAD = 100  # how many times the change that rounding errors at the start make is accepted


def project(influence: ParameterInfluence, direction: Tensor) -> Tensor:
    """Return ``S u`` for every row of an influence, (R, H)."""
    return influence.values @ direction


def contract(influence: ParameterInfluence, cotangent: Tensor, rows: Tensor) -> Tensor:
    """Return ``Σ w S`` over rows of an influence and its samples, (slices, p), for a cotangent w (B, H)."""
    here = rows.to(influence.values.device)
    per_row = torch.bmm(cotangent[influence.sample].unsqueeze(1), influence.values).squeeze(1)[here]
    total = per_row.new_zeros(influence.slices, per_row.shape[1])
    return total.index_add_(0, influence.slice[here], per_row)


def apply_block(block: Transition, value: Tensor) -> Tensor:
    """Replace witnesses (B, K, H) by ``Φ s``, in place; return ``v s``, (B, K)."""
    size, count, _ = value.shape
    slots = value.view(size, count, block.n, block.width)

    def wide(index: Tensor) -> Tensor:
        return index[:, None, :, None].expand(-1, count, -1, block.width)

    read = slots if block.cols is None else slots.gather(2, wide(block.cols))
    read = read.flatten(2)
    gradient = (read @ block.adjoint.unsqueeze(2)).squeeze(2)
    changed = (read @ block.jacobian.mT).unflatten(2, (-1, block.width))
    if block.rows is None:
        slots.copy_(changed)
    else:
        slots.scatter_(2, wide(block.rows), changed)
    return gradient


def check(what: str, found: Tensor, right: Tensor, scale: Tensor | float, spread: Tensor | float = 0.0) -> None:
    """Refuse a difference that rounding errors do not explain.

    Args:
        what: what is compared, for the message.
        found, right: (K, ...), compared entry by entry.
        scale: the largest number met on the way, (K, 1) or one for all.
        spread: how far the right values move if their start moves by rounding errors, like ``right`` or (K, 1).

    Raises:
        AuditError: naming ``what``.
    """
    if not found.numel():
        return
    eps = torch.finfo(right.dtype).eps
    largest = right.abs().flatten(1).amax(dim=1).reshape(-1, *[1] * (right.ndim - 1))
    allowed = eps**0.5 * largest + _ROUNDING * eps * scale + _SPREAD * spread
    error = (found - right).abs()
    if not bool((error <= allowed).all()):
        worst = float(torch.where(error <= allowed, 0.0, error).max() / largest.max().clamp(min=1e-300))
        raise AuditError(
            f"{what} differs by {worst:.1e} relative to its largest entry from what it must be. {YOURS_IS_RIGHT}"
        )


class DormantWitness:
    """The witnesses of rows of influences that are kept slice by slice, each from an audited block in which it was
    active until it is active again.

    Args:
        state: (B, n, ...), any state.
        draw: draws normal numbers of a shape, like a tensor.

    Attributes:
        age: the number of blocks since the last audited one.
    """

    def __init__(self, state: Tensor, draw: Draw) -> None:
        self._draw, self.age = draw, 0
        self._directions: dict[str, Tensor] = {}
        self._places: dict[str, Tensor] = {}  # row of the influence → place among the witnesses, -1 if not followed
        size, numbers = state.shape[0], state[0].numel()
        self._value, self._shaken = state.new_zeros(size, 0, numbers), state.new_zeros(size, 0, numbers)
        self._peak, self._gradient = state.new_zeros(size, 0), state.new_zeros(size, 0)
        self._shaken_gradient, self._gradient_peak = state.new_zeros(size, 0), state.new_zeros(size, 0)

    def follow(self, influences: Mapping[str, ParameterInfluence], rows: Mapping[str, Tensor]) -> None:
        """Follow rows (by parameter, LongTensors on the CPU) that are up to date, beside those followed so far."""
        self.age = 0
        size, device = self._value.shape[0], self._value.device
        former, samples = [], []
        for name, own in rows.items():
            influence = influences[name]
            if name not in self._directions:
                self._directions[name] = self._draw((influence.values.shape[2],), influence.values)
            places = torch.full((influence.values.shape[0],), -1, dtype=torch.int64, device="cpu")
            known = self._places.get(name, places)
            places[: len(known)] = known
            places[own] = -1
            older = (places >= 0).nonzero().flatten()
            former.append(places[older])
            samples.append(influence.sample.cpu()[torch.cat([older, own])])
            places[own] = 0
            self._places[name] = places
        sample = torch.cat(samples)
        counts = sample.bincount(minlength=size)
        longest = int(counts.max())
        order, place = sample.argsort(stable=True), torch.empty_like(sample)
        place[order] = torch.arange(len(sample), device="cpu") - (counts.cumsum(0) - counts)[sample[order]]
        place += sample * longest
        value, shaken = (self._value.new_zeros(size * longest, self._value.shape[2]) for _ in range(2))
        numbers = [self._peak.new_zeros(size * longest) for _ in range(4)]
        kept = [self._peak, self._gradient, self._shaken_gradient, self._gradient_peak]
        eps, start = torch.finfo(value.dtype).eps, 0
        for (name, own), old in zip(rows.items(), former, strict=True):
            older = ((self._places[name] >= 0).index_fill(0, own, False)).nonzero().flatten()
            middle, stop = start + len(older), start + len(older) + len(own)
            there, here, old = place[start:middle].to(device), place[middle:stop].to(device), old.to(device)
            value[there], shaken[there] = self._value.flatten(0, 1)[old], self._shaken.flatten(0, 1)[old]
            for new, before in zip(numbers, kept, strict=True):
                new[there] = before.flatten()[old]
            value[here] = project(influences[name], self._directions[name])[own.to(device)]
            shaken[here] = value[here] * (1 + eps * self._draw(value[here].shape, value))
            numbers[0][here] = value[here].abs().amax(dim=1)
            self._places[name][older], self._places[name][own] = place[start:middle], place[middle:stop]
            start = stop
        self._value, self._shaken = (held.view(size, longest, held.shape[1]) for held in (value, shaken))
        peak, *gradients = (held.view(size, longest) for held in numbers)
        self._peak, (self._gradient, self._shaken_gradient, self._gradient_peak) = peak, gradients

    def append(self, block: Transition) -> None:
        """Bring all witnesses up to date with one more block."""
        self.age += 1
        if not self._value.numel():
            return
        change, shaken_change = (apply_block(block, value) for value in (self._value, self._shaken))
        self._gradient += change
        self._shaken_gradient += shaken_change
        self._gradient_peak = torch.maximum(self._gradient_peak, self._gradient.abs())
        self._peak = torch.maximum(self._peak, self._value.abs().amax(dim=2))

    def _followed(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these rows (CPU) are followed, and their places."""
        places = self._places.get(name)
        if places is None:
            return rows.new_zeros(len(rows), dtype=torch.bool), rows[:0]
        known = torch.where(rows < len(places), places[rows.clamp(max=max(len(places) - 1, 0))], -1)
        return known >= 0, known[known >= 0].to(self._value.device)

    def check_rows(self, name: str, influence: ParameterInfluence, rows: Tensor) -> None:
        """Check the followed ones of these rows, which have just been brought up to date.

        Raises:
            AuditError: their influence is not what it must be.
        """
        followed, places = self._followed(name, rows)
        if not places.numel():
            return
        found = influence.values[rows[followed].to(places.device)] @ self._directions[name]
        right, shaken = (value.flatten(0, 1)[places] for value in (self._value, self._shaken))
        peak = self._peak.flatten()[places].unsqueeze(1)
        what = f"the influence of dormant slices of parameter {name!r}, brought up to date,"
        check(what, found, right, peak, (shaken - right).abs().amax(dim=1, keepdim=True))

    def slices_of(self, name: str, influence: ParameterInfluence, rows: Tensor, now: int) -> Tensor:
        """Return the slices whose gradient ``check_gradient`` can check when these rows (CPU) are accumulated up to
        block ``now``: no row of theirs is dormant and not followed."""
        followed, _ = self._followed(name, rows)
        if not bool(followed.any()):
            return rows[:0]
        slices = influence.slice.cpu()[rows]
        unknown = slices[~followed & (influence.last_block[rows] < now)]
        known: Tensor = slices[followed].unique()
        return known.masked_select(~torch.isin(known, unknown))

    def along(self, name: str, gradient: Tensor, slices: Tensor) -> Tensor:
        """Return a parameter's gradient in these slices (CPU), along the direction of its witnesses."""
        direction = self._directions[name]
        return gradient.reshape(-1, direction.numel())[slices.to(gradient.device)] @ direction

    def check_gradient(
        self,
        name: str,
        influence: ParameterInfluence,
        rows: Tensor,
        slices: Tensor,
        before: Tensor,
        gradient: Tensor,
    ) -> None:
        """Check the gradient that was accumulated for these rows.

        Args:
            name: the parameter.
            influence: its influence.
            rows: LongTensor, CPU, the rows.
            slices: what ``slices_of`` returned for them.
            before: what ``along`` returned for the gradient before.
            gradient: the parameter's gradient now.

        Raises:
            AuditError: it is not what the blocks since the last accumulation contribute.
        """
        followed, places = self._followed(name, rows)
        own = influence.slice[rows[followed].to(places.device)]
        device = places.device
        sums = [
            value.new_zeros(influence.slices).index_add_(0, own, value.flatten()[places])[slices.to(device), None]
            for value in (self._gradient, self._shaken_gradient, self._gradient_peak)
        ]
        right, shaken, peak = sums
        held = gradient.abs().max() * self._directions[name].abs().sum()
        change = (self.along(name, gradient, slices) - before).unsqueeze(1)
        what = f"the gradient that dormant slices of parameter {name!r} contribute"
        check(what, change, right, peak + held, (shaken - right).abs())

    def settle(self, name: str, rows: Tensor) -> None:
        """Take note that the gradient of these rows (CPU) is accumulated up to now."""
        _, places = self._followed(name, rows)
        for value in (self._gradient, self._shaken_gradient, self._gradient_peak):
            value.view(-1)[places] = 0.0

    def forget(self, name: str, rows: Tensor) -> None:
        """Follow these rows (CPU) no longer."""
        places = self._places.get(name)
        if places is not None:
            places[rows[rows < len(places)]] = -1
