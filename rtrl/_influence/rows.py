"""Influence on independent rows: each channel of a parameter keeps it on the rows that it reaches, and on no others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtrl._influence.structure import ALL, GroupReach, ParameterReach, RowMap, Structure, by_channel, from_channels
from rtrl.errors import ConfigError

_FEW = 4  # entries of a row: up to this many, a multiplication each costs less than batched small products


@dataclass(frozen=True, slots=True)
class RowTransition:
    """How a block of steps transforms an influence, group by group.

    Attributes:
        own: for each group (B, n, w, w), the Jacobian product of each of its rows.
        cross: (a, b) → (B, n_a·w_a, n_b, w_b), that of the rows of group a by those of a group b that feeds it.
        adjoint: for each group (B, n, w), the gradient of the block's losses at its first state.
    """

    own: Sequence[Tensor]
    cross: Mapping[tuple[int, int], Tensor]
    adjoint: Sequence[Tensor]

    def pull_back(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return ``w Φ`` for a cotangent w, (B, n, w) for each group."""
        pulled = [(w.unsqueeze(-2) @ own).squeeze(-2) for w, own in zip(cotangents, self.own, strict=True)]
        for (a, b), cross in self.cross.items():
            pulled[b] = pulled[b] + torch.einsum("bh,bhnw->bnw", cotangents[a].flatten(1), cross)
        return pulled


def row_products(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``left @ right`` of many small matrices (…, R, w) and (…, w, I)."""
    width = right.shape[-2]
    if width > _FEW:
        return torch.matmul(left, right, out=out)
    if out is None:
        out = right.new_empty(*right.shape[:-2], left.shape[-2], right.shape[-1])
    torch.mul(left[..., :1], right[..., :1, :], out=out)
    for j in range(1, width):
        out.addcmul_(left[..., j : j + 1], right[..., j : j + 1, :])
    return out


class RowInfluence:
    """``∂h/∂θ`` of one parameter.

    Args:
        structure: the groups.
        reach: which rows the parameter reaches.
        batch_size: B.
        like: a tensor of the dtype and device to use.

    Attributes:
        parts: for each group that is reached: (B, C, w, I) on the row of each channel, or (B, n·w, C·I) on all rows.
    """

    def __init__(self, structure: Structure, reach: ParameterReach, batch_size: int, like: Tensor) -> None:
        self.structure, self.reach, self.batch_size = structure, reach, batch_size
        self.parts = {
            a: like.new_zeros(self._shape(a, rows)) for a, rows in enumerate(reach.groups) if rows is not None
        }
        self._next: dict[int, Tensor] = {}

    def _shape(self, group: int, rows: GroupReach) -> tuple[int, ...]:
        count, each = self.reach.sizes
        n, width = self.structure.groups[group].shape
        return (self.batch_size, n * width, count * each) if rows is ALL else (self.batch_size, count, width, each)

    # ------------------------------------------------------------------ blocks

    def stage(self, block: RowTransition) -> None:
        """Compute ``Φ S`` beside S, for ``add`` and then ``commit``.

        Cost: for each element, w² multiply-adds on one row; on all rows of a group, w·H, and more for groups below.
        """
        if not self._next:
            self._next = {a: torch.empty_like(part) for a, part in self.parts.items()}
        for a, part in self.parts.items():
            rows, out = self.reach.groups[a], self._next[a]
            if isinstance(rows, RowMap):
                row_products(rows.take(block.own[a], 1), part, out=out)
                continue
            n, width = self.structure.groups[a].shape
            whole = part.unflatten(1, (n, width)), out.unflatten(1, (n, width))
            row_products(block.own[a], whole[0], out=whole[1])
            for b in range(a):
                if (a, b) in block.cross and b in self.parts:
                    self._add_from_below(out, block.cross[a, b], b)

    def _add_from_below(self, out: Tensor, cross: Tensor, b: int) -> None:
        """Add what the rows of group b pass on: out (B, H, C·I), cross (B, H, n, w)."""
        rows, part = self.reach.groups[b], self.parts[b]
        if not isinstance(rows, RowMap):
            out.baddbmm_(cross.flatten(2), part)
            return
        weights, by_channels = rows.take(cross, 2), out.unflatten(2, self.reach.sizes)
        for k in range(part.shape[2]):
            by_channels.addcmul_(weights[..., k, None], part[:, None, :, k])

    def add(self, group: int, left: Tensor, right: Tensor | None) -> None:
        """Add the immediate influence ``Σ_x left_x ⊗ right_x`` to what is staged.

        Args:
            group: one that the parameter reaches.
            left: (B, X, C, w) on the row of each channel, or (B, X, n·w, C) on all rows.
            right: (B, X, I); None for ones with I = 1.

        Cost: X multiply-adds for each number of the part.
        """
        part, size = self._next[group], self.batch_size
        if right is None:
            part += left.sum(dim=1).reshape(part.shape)
        else:
            target = part.view(size, -1, right.shape[2])
            target.baddbmm_(left.flatten(2).mT, right)

    def add_whole(self, group: int, immediate: Tensor) -> None:
        """Add an immediate influence like ``parts[group]`` to what is staged."""
        self._next[group] += immediate

    def staged(self) -> list[Tensor]:
        """Return what is staged."""
        return list(self._next.values())

    def commit(self) -> None:
        """Take what is staged."""
        self.parts, self._next = self._next, self.parts

    def contract(self, cotangents: Sequence[Tensor], *, staged: bool = False) -> Tensor:
        """Return ``w S`` of each sample, (B, *shape), for a cotangent w, (B, n, w) for each group.

        Args:
            cotangents: w.
            staged: take what is staged for S.
        """
        count, each = self.reach.sizes
        total = None
        for a, part in (self._next if staged else self.parts).items():
            rows, cotangent = self.reach.groups[a], cotangents[a]
            if isinstance(rows, RowMap):
                product = row_products(rows.take(cotangent, 1).unsqueeze(2), part).squeeze(2)
            else:
                product = torch.bmm(cotangent.flatten(1).unsqueeze(1), part).reshape(-1, count, each)
            total = product if total is None else total + product
        if total is None:
            return cotangents[0].new_zeros(self.batch_size, *self.reach.shape)
        return from_channels(total, self.reach.shape, self.reach.orientation)

    def project(self, direction: Tensor) -> list[Tensor]:
        """Return ``S u`` for a direction u of the parameter's shape: (B, n, w) for each group."""
        by_channels = by_channel(direction, self.reach.shape, self.reach.orientation)
        projected = []
        for a, group in enumerate(self.structure.groups):
            rows, out = self.reach.groups[a], direction.new_zeros(self.batch_size, *group.shape)
            if isinstance(rows, RowMap):
                out.index_add_(1, rows.index, (self.parts[a] @ by_channels.unsqueeze(-1)).squeeze(-1))
            elif rows is not None:
                out += (self.parts[a] @ by_channels.flatten()).reshape(out.shape)
            projected.append(out)
        return projected

    def clear_samples(self, samples: Tensor) -> None:
        """Clear the influence on samples, Boolean (B,)."""
        for part in self.parts.values():
            part[samples.to(part.device)] = 0.0

    # ------------------------------------------------------------------ dense form

    def to_dense(self) -> Tensor:
        """Return the influence as one tensor (B, H, P), in the parameter's own order."""
        count, each = self.reach.sizes
        numbers = sum(group.numel() for group in self.structure.groups)
        like = next(iter(self.parts.values()))
        out = like.new_zeros(self.batch_size, numbers, count, each)
        for a, part in self.parts.items():
            entries, rows = self.structure.groups[a], self.reach.groups[a]
            if isinstance(rows, RowMap):
                channel = torch.arange(count, device=part.device)[:, None]
                out[:, entries[rows.index], channel] = part
            else:
                out[:, entries.flatten()] = part.unflatten(2, (count, each))
        values = from_channels(out, self.reach.shape, self.reach.orientation)
        return values.reshape(self.batch_size, numbers, -1)

    def fits(self, influence: Tensor) -> bool:
        """Whether an influence (B, H, P) lies on the rows that the parameter reaches."""
        trial = RowInfluence(self.structure, self.reach, self.batch_size, influence)
        trial.add_dense(influence)
        kept = sum(int(part.count_nonzero()) for part in trial.parts.values())
        return kept == int(influence.count_nonzero())

    def add_dense(self, influence: Tensor) -> None:
        """Add an influence (B, H, P) that lies on the rows that the parameter reaches."""
        values = by_channel(influence.unflatten(2, self.reach.shape or (1,)), self.reach.shape, self.reach.orientation)
        for a, part in self.parts.items():
            entries, rows = self.structure.groups[a], self.reach.groups[a]
            if isinstance(rows, RowMap):
                channel = torch.arange(len(rows.index), device=part.device)[:, None]
                part += values[:, entries[rows.index], channel] * rows.present[:, None, None]
            else:
                part += values[:, entries.flatten()].flatten(2)

    # ------------------------------------------------------------------ bytes and saving

    @property
    def n_bytes(self) -> int:
        """Bytes held, the memory for what is staged included."""
        return sum(t.numel() * t.element_size() for t in (*self.parts.values(), *self._next.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the parts."""
        return {"parts": {a: part.clone() for a, part in self.parts.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ConfigError: it is damaged, or has another structure or dtype.
        """
        parts = saved["parts"] if isinstance(saved, Mapping) else None
        if not isinstance(parts, Mapping) or not all(isinstance(part, Tensor) for part in parts.values()):
            raise ConfigError("the saved influence is damaged: it is not given by groups of rows")
        if parts.keys() != self.parts.keys() or any(
            tuple(parts[a].shape) != tuple(part.shape) or parts[a].dtype != part.dtype for a, part in self.parts.items()
        ):
            raise ConfigError("the saved influence does not fit the saved structure")
        self.parts = {a: parts[a].to(part.device, copy=True) for a, part in self.parts.items()}
