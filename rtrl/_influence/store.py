"""The stored influence of each parameter, slice by slice; each slice knows up to which block it is up to date.

A slice (of one parameter, for one sample) that has never been active has no influence and takes no memory.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtrl._influence.saved_checks import check_rows
from rtrl._influence.transition import Transition
from rtrl._utils import index_sets
from rtrl.errors import ConfigError

BUFFER_NUMBERS = 2**20
"""How many numbers ``advance`` buffers at a time."""


class ParameterInfluence:
    """``∂h/∂θ`` for one parameter, as rows (H, p): one for each (sample, slice) that has been active since the sample's
    last reset.

    Args:
        shape: the parameter's shape.
        sliced: keep one row per slice of its first dimension; else one row holds the whole parameter.
        batch_size: B.
        state_size: H.
        like: a tensor of the dtype and device to use.

    Attributes:
        values: (R, H, p).
        sample, slice: LongTensors (R,) on the same device.
        last_block: LongTensor (R,) on the CPU: up to which block each row is up to date; ``values[r]`` is the influence
            on the state after the first ``last_block[r]`` blocks.
    """

    def __init__(self, shape: torch.Size, sliced: bool, batch_size: int, state_size: int, like: Tensor) -> None:
        self.shape, self.sliced = shape, sliced
        self.slices = shape[0] if sliced else 1
        self.batch_size = batch_size
        self.values = torch.empty(
            0, state_size, shape.numel() // max(self.slices, 1), dtype=like.dtype, device=like.device
        )
        self.sample = torch.empty(0, dtype=torch.int64, device=like.device)
        self.slice = torch.empty_like(self.sample)
        self.last_block = torch.empty(0, dtype=torch.int64, device="cpu")
        self._row = torch.full((batch_size * self.slices,), -1, dtype=torch.int64, device="cpu")  # key → row
        self._in_use = 0  # how many rows are

    def allocate(self, keys: Tensor, now: int) -> Tensor:
        """Return the rows (on the CPU) of the keys ``sample · slices + slice``; new ones start at zero, up to date with
        block ``now``."""
        keys = keys.cpu()
        new = keys[self._row[keys] < 0]
        if new.numel():
            in_use = torch.zeros(self.values.shape[0], dtype=torch.bool, device="cpu")
            in_use[self._row[self._row >= 0]] = True
            free = (~in_use).nonzero().flatten()[: new.numel()]
            grow = new.numel() - free.numel()
            rows = torch.cat([free, torch.arange(grow, device="cpu") + self.values.shape[0]])
            if grow:
                self.values = torch.cat([self.values, self.values.new_zeros(grow, *self.values.shape[1:])])
                self.sample = torch.cat([self.sample, self.sample.new_full((grow,), -1)])
                self.slice = torch.cat([self.slice, self.slice.new_full((grow,), -1)])
                self.last_block = torch.cat([self.last_block, self.last_block.new_full((grow,), now)])
            there = rows.to(self.values.device)
            self.values[there] = 0.0
            self.sample[there] = (new // self.slices).to(there.device)
            self.slice[there] = (new % self.slices).to(there.device)
            self.last_block[rows] = now
            self._row[new] = rows
            self._in_use += new.numel()
        return self._row[keys]

    def add_first(self, influence: Tensor, now: int) -> None:
        """Add ``∂h₀/∂θ`` (B, H, P) of samples that have just restarted, and zeros elsewhere; slices without any take no
        memory."""
        by_slice = influence.unflatten(2, (self.slices, -1)).transpose(1, 2).flatten(0, 1)  # (keys, H, p)
        keys = torch.arange(len(by_slice), device=by_slice.device)
        if self.sliced:
            keys = by_slice.count_nonzero(dim=(1, 2)).nonzero().flatten()
        rows = self.allocate(keys, now).to(self.values.device)  # it may replace the values
        self.values[rows] += by_slice[keys]

    @property
    def is_full(self) -> bool:
        """Whether every slice of every sample has a row."""
        return self._in_use == self.batch_size * self.slices

    def active_rows(self) -> Tensor:
        """The rows in use, ascending, on the CPU."""
        return self._row[self._row >= 0].sort().values

    def clear_samples(self, samples: Tensor) -> None:
        """Clear all influence on these samples (Boolean (B,), CPU); their rows are reused by slices that become active
        later."""
        cleared = samples.repeat_interleave(self.slices) & (self._row >= 0)
        rows = self._row[cleared].to(self.values.device)
        self.sample[rows] = -1
        self.slice[rows] = -1
        self._row[cleared] = -1
        self._in_use -= rows.numel()

    def to_dense(self) -> Tensor:
        """Return the influence as one tensor (B, H, P); every row must be up to date."""
        size, state_size = self.batch_size, self.values.shape[1]
        out = self.values.new_zeros(size, self.slices, state_size, self.values.shape[2])
        rows = self.active_rows().to(self.values.device)
        out[self.sample[rows], self.slice[rows]] = self.values[rows]
        return out.transpose(1, 2).reshape(size, state_size, -1)

    def accumulate_grad(self, rows: Tensor, adjoints: Tensor, gradient: Tensor) -> None:
        """Add ``Σ_r adjoint_r @ S_r`` to a gradient of the parameter's shape, in place; adjoints are (R, H), one for
        each of these rows."""
        if not rows.numel():
            return
        all_rows = torch.equal(rows, torch.arange(self.values.shape[0], device="cpu"))
        here = rows.to(self.values.device)
        values = self.values if all_rows else self.values[here]
        per_row = torch.bmm(adjoints.unsqueeze(1), values).squeeze(1)
        # The sum over samples without index_add_, many times slower on a CPU: the rows of a slice side by side.
        slices, place = self.slice[here].unique(return_inverse=True)
        order = place.argsort(stable=True)
        count = place.bincount(minlength=slices.numel())
        rank = torch.arange(len(order), device=per_row.device) - (count.cumsum(0) - count)[place[order]]
        side_by_side = per_row.new_zeros(slices.numel(), int(count.max()), per_row.shape[1])
        side_by_side[place[order], rank] = per_row[order]
        gradient.view(self.slices, per_row.shape[1])[slices] += side_by_side.sum(dim=1)

    def contract(self, rows: Tensor, adjoints: Tensor, per_sample: bool) -> Tensor:
        """Return ``Σ_r adjoint_r @ S_r`` of these rows for L adjoints (L, R, H) of each: (L, B, *shape) if
        ``per_sample``, else (L, 1, *shape)."""
        count, here = len(adjoints), rows.to(self.values.device)
        whole = not self.sliced and rows.numel() == self.batch_size
        values = self.values if whole else self.values[here]
        if whole and not per_sample:
            return (adjoints.flatten(1) @ values.flatten(0, 1)).view(count, 1, *self.shape)
        per_row = torch.bmm(adjoints.transpose(0, 1), values).transpose(1, 2)  # (R, p, L): L last, to add up quickly
        out = per_row.new_zeros(self.batch_size if per_sample else 1, self.slices, *per_row.shape[1:])
        sample = self.sample[here] if per_sample else torch.zeros_like(here)
        out.index_put_((sample, self.slice[here]), per_row, accumulate=True)
        return out.movedim(3, 0).reshape(count, -1, *self.shape)

    def advance(self, block: Transition, gradient: Tensor) -> None:
        """Apply one block to every row of a parameter kept whole, in place: ``gradient += v S``, then ``S ← Φ S``. The
        caller sets ``last_block``.

        Cost: ``(u·width + 1)·c·width·p`` multiply-adds per sample; a buffer of a few megabytes.
        """
        size, _, p = self.values.shape
        both = torch.cat([block.jacobian, block.adjoint.unsqueeze(1)], dim=1)
        added = gradient.new_zeros(p)
        span = max(1, BUFFER_NUMBERS // (size * both.shape[1]))
        if block.rows is None:
            buffer = self.values.new_empty(size, both.shape[1], min(span, p))
            for start in range(0, p, span):
                columns = self.values[:, :, start : start + span]
                product = buffer[:, :, : columns.shape[2]]
                if size == 1:
                    torch.mm(both[0], columns[0], out=product[0])
                else:
                    torch.bmm(both, columns, out=product)
                columns.copy_(product[:, :-1])
                torch.sum(product[:, -1], dim=0, out=added[start : start + span])
            gradient += added.view(gradient.shape)
            return
        slots = self.values.view(size * block.n, block.width, p)
        rows, cols = index_sets.flat(block.rows, block.n, size), index_sets.flat(block.cols, block.n, size)
        for start in range(0, p, span):
            columns = slots[:, :, start : start + span]
            read = columns if cols is None else columns[cols]
            product = torch.bmm(both, read.reshape(size, both.shape[2], columns.shape[2]))
            columns[rows] = product[:, :-1].reshape(rows.numel(), *columns.shape[1:])
            torch.sum(product[:, -1], dim=0, out=added[start : start + span])
        gradient += added.view(gradient.shape)

    def add_products(
        self, rows: Tensor, block: Transition, left: Tensor, right: Tensor, transposed: bool, part: slice = slice(None)
    ) -> None:
        """Add ``leftᵀ right`` to these rows, on the state rows that ``block`` writes.

        Args:
            rows: LongTensor (C,), CPU.
            block: the transition of the block.
            left: (C, X, R·O), R = u·width.
            right: (C, X, I).
            transposed: the parameter's entries stand in the order (I, O), not (O, I).
            part: only these R of the u·width entries of the state; whole rows of it unless ``block`` writes all.

        Cost: ``C·X·R·O·I`` multiply-adds; a buffer of the result's size where it does not lie in one piece.
        """
        first, count = int(rows[0]), rows.numel()
        contiguous = count == 1 or bool((rows == torch.arange(first, first + count, device="cpu")).all())
        if contiguous and block.rows is None and not transposed and self.values.is_contiguous():
            target = self.values[first : first + count, part].unflatten(2, (-1, right.shape[2])).flatten(1, 2)
            if count == 1:
                target[0].addmm_(left[0].mT, right[0])
            else:
                target.baddbmm_(left.mT, right)
            return
        immediate = torch.bmm(left.mT, right)
        entries = immediate.shape[1] * right.shape[2] // self.values.shape[2]
        if transposed:
            immediate = immediate.unflatten(1, (entries, -1)).transpose(2, 3)
        self.add(rows, block, immediate.reshape(count, entries, self.values.shape[2]), part)

    def add(self, rows: Tensor, block: Transition, immediate: Tensor, part: slice = slice(None)) -> None:
        """Add an immediate influence (rows, R, p) to these rows, see ``add_products``."""
        whole = not self.sliced and rows.numel() == self.batch_size
        if block.rows is None:
            if whole:
                self.values[:, part].add_(immediate)
            else:
                self.values[:, part].index_add_(0, rows.to(self.values.device), immediate)
            return
        here = rows.to(self.values.device)
        first, last, _ = part.indices(block.rows.shape[1] * block.width)
        state_rows = block.rows[self.sample[here], first // block.width : last // block.width]
        slots = self.values.unflatten(1, (block.n, block.width))
        slots[here[:, None], state_rows] += immediate.unflatten(1, (-1, block.width))

    @property
    def n_bytes(self) -> int:
        """Bytes held, including free rows and bookkeeping."""
        return sum(
            t.numel() * t.element_size() for t in (self.values, self.sample, self.slice, self.last_block, self._row)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that is held, as copied tensors and numbers."""
        return {
            "sliced": self.sliced,
            "values": self.values.clone(),
            "sample": self.sample.clone(),
            "slice": self.slice.clone(),
            "last_block": self.last_block.clone(),
            "row": self._row.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ConfigError: it is damaged, or was taken of another parameter shape, state or batch.
        """
        count = state["values"].shape[0]
        if any(
            tuple(state[k].shape) != (count,) or state[k].dtype != torch.int64
            for k in ("sample", "slice", "last_block")
        ):
            raise ConfigError(
                "the saved influence is damaged: its rows do not fit their samples, slices and last blocks"
            )
        if state["row"].dtype != torch.int64 or (state["row"].numel() and int(state["row"].max()) >= count):
            raise ConfigError("the saved influence is damaged: a slice refers to a row that does not exist")
        if state["values"].dtype != self.values.dtype:
            raise ConfigError(f"the saved influence is {state['values'].dtype}, this learner needs {self.values.dtype}")
        if state["values"].shape[1:] != self.values.shape[1:] or state["row"].shape != self._row.shape:
            raise ConfigError(
                f"the saved influence has rows of shape {tuple(state['values'].shape[1:])} for "
                f"{state['row'].numel()} slices, "
                f"this learner needs {tuple(self.values.shape[1:])} for {self._row.numel()}"
            )
        check_rows(state, self.slices)
        device = self.values.device
        self.values = state["values"].to(device, copy=True)
        self.sample, self.slice = (state[k].to(device, copy=True) for k in ("sample", "slice"))
        self.last_block, self._row = state["last_block"].cpu().clone(), state["row"].cpu().clone()
        self._in_use = int((self._row >= 0).sum())
