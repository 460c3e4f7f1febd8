"""The influence, kept parameter by parameter and slice by slice, each slice with a clock of its own.

A slice (of one parameter, for one sample) that has never been active has no influence and takes no memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rtrl._influence.transition import Transition
from rtrl._utils import index_sets
from rtrl.errors import ConfigError

_SCRATCH = 2**20  # numbers


class ParameterInfluence:
    """``∂h/∂θ`` for one parameter, as rows (H, p): one for each (sample, slice) that has ever been active since its
    last reset.

    Args:
        shape: the parameter's shape. sliced: keep one row a slice of its first dimension; else one row holds the whole
            parameter.
        batch_size, state_size: B and H.
        like: a tensor of the dtype and device to use.

    Attributes:
        values: (R, H, p). sample, slice: LongTensors (R,) on the same device.
        clock: LongTensor (R,) on the CPU: ``values[r]`` is the influence on the state at this time.
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
        self.clock = torch.empty(0, dtype=torch.int64, device="cpu")
        self._row = torch.full((batch_size * self.slices,), -1, dtype=torch.int64, device="cpu")  # key → row

    def claim(self, keys: Tensor, now: int) -> Tensor:
        """The rows (on the CPU) of the keys ``sample · slices + slice``; those that are new begin at zero with their
        clock at ``now``."""
        wanted = keys.cpu()
        new = wanted[self._row[wanted] < 0]
        if new.numel():
            free = self._free()[: new.numel()]
            grow = new.numel() - free.numel()
            rows = torch.cat([free, torch.arange(grow, device="cpu") + self.values.shape[0]])
            if grow:
                self.values = torch.cat([self.values, self.values.new_zeros(grow, *self.values.shape[1:])])
                self.sample = torch.cat([self.sample, self.sample.new_full((grow,), -1)])
                self.slice = torch.cat([self.slice, self.slice.new_full((grow,), -1)])
                self.clock = torch.cat([self.clock, self.clock.new_full((grow,), now)])
            there = rows.to(self.values.device)
            self.values[there] = 0.0
            self.sample[there] = (new // self.slices).to(there.device)
            self.slice[there] = (new % self.slices).to(there.device)
            self.clock[rows] = now
            self._row[new] = rows
        return self._row[wanted]

    def held(self) -> Tensor:
        """The rows in use, ascending, on the CPU."""
        return self._row[self._row >= 0].sort().values

    def drop(self, samples: Tensor) -> None:
        """Forget all influence on these samples (Boolean (B,), CPU); their rows are reused by slices that become
        active later."""
        gone = samples.repeat_interleave(self.slices) & (self._row >= 0)
        rows = self._row[gone].to(self.values.device)
        self.sample[rows] = -1
        self.slice[rows] = -1
        self._row[gone] = -1

    def dense(self) -> Tensor:
        """The influence written out, (B, H, P); the caller has brought every row up to date."""
        size, full = self.batch_size, self.values.shape[1]
        out = self.values.new_zeros(size, self.slices, full, self.values.shape[2])
        rows = self.held().to(self.values.device)
        out[self.sample[rows], self.slice[rows]] = self.values[rows]
        return out.transpose(1, 2).reshape(size, full, -1)

    def earn(self, rows: Tensor, functional: Tensor, gradient: Tensor) -> None:
        """Add ``Σ_r functional_r @ S_r`` to a gradient of the parameter's shape, in place; functional is (R, H), one
        for each of these rows."""
        if not rows.numel():
            return
        everyone = torch.equal(rows, torch.arange(self.values.shape[0], device="cpu"))
        here = rows.to(self.values.device)
        values = self.values if everyone else self.values[here]
        owed = torch.bmm(functional.unsqueeze(1), values).squeeze(1)
        # The sum over samples without index_add_, many times slower on a CPU: the rows of a slice side by side.
        slices, place = self.slice[here].unique(return_inverse=True)
        order = place.argsort(stable=True)
        count = place.bincount(minlength=slices.numel())
        rank = torch.arange(len(order), device=owed.device) - (count.cumsum(0) - count)[place[order]]
        aside = owed.new_zeros(slices.numel(), int(count.max()), owed.shape[1])
        aside[place[order], rank] = owed[order]
        gradient.view(self.slices, owed.shape[1])[slices] += aside.sum(dim=1)

    def move(self, rows: Tensor, blocks: Sequence[Transition]) -> None:
        """Apply transitions, earliest first, to these rows: ``S ← Φ_k … Φ_1 S``. Cost: the sum of their ``apply_macs``
        times R·p."""
        if not blocks or not rows.numel():
            return
        whole = not self.sliced and rows.numel() == self.batch_size  # then row b belongs to sample b
        here = rows.to(self.values.device)
        sample = None if whole else self.sample[here]
        moved = self.values if whole else self.values[here]
        for block in blocks:
            moved = block.apply(moved, sample)
        if whole:
            self.values = moved
        else:
            self.values[here] = moved

    def advance(self, block: Transition, gradient: Tensor) -> None:
        """Lead every row of a parameter kept whole through one block, in place, and pay it: ``gradient += v S``, then
        ``S ← Φ S``; the clocks are the caller's.

        Cost: ``(u·width + 1)·c·width·p`` multiply-adds a sample; a few megabytes of scratch memory.
        """
        size, _, p = self.values.shape
        both = torch.cat([block.jacobian, block.adjoint.unsqueeze(1)], dim=1)
        paid = gradient.new_zeros(p)
        span = max(1, _SCRATCH // (size * both.shape[1]))
        if block.rows is None:
            scratch = self.values.new_empty(size, both.shape[1], min(span, p))
            for start in range(0, p, span):
                columns = self.values[:, :, start : start + span]
                moved = scratch[:, :, : columns.shape[2]]
                if size == 1:
                    torch.mm(both[0], columns[0], out=moved[0])
                else:
                    torch.bmm(both, columns, out=moved)
                columns.copy_(moved[:, :-1])
                torch.sum(moved[:, -1], dim=0, out=paid[start : start + span])
            gradient += paid.view(gradient.shape)
            return
        slots = self.values.view(size * block.n, block.width, p)
        rows, cols = (index_sets.flat(index, block.n, size) for index in (block.rows, block.cols))
        for start in range(0, p, span):
            columns = slots[:, :, start : start + span]
            read = columns if cols is None else columns[cols]
            moved = torch.bmm(both, read.reshape(size, both.shape[2], columns.shape[2]))
            if rows is None:
                columns.copy_(moved[:, :-1].reshape(columns.shape))
            else:
                columns[rows] = moved[:, :-1].reshape(rows.numel(), *columns.shape[1:])
            torch.sum(moved[:, -1], dim=0, out=paid[start : start + span])
        gradient += paid.view(gradient.shape)

    def add_products(
        self, rows: Tensor, block: Transition, left: Tensor, right: Tensor, transposed: bool, part: slice = slice(None)
    ) -> None:
        """``S += leftᵀ right`` on the state rows that ``block`` writes.

        Args:
            rows: LongTensor (C,), CPU. left: (C, X, R·O), R = u·width. right: (C, X, I).
            transposed: the parameter's entries stand in the order (I, O), not (O, I).
            part: where ``block`` writes all rows, only these R entries of the state.

        Cost: ``C·X·R·O·I`` multiply-adds; scratch memory of the result's size where it does not lie in one piece.
        """
        first, count = int(rows[0]), rows.numel()
        together = count == 1 or bool((rows == torch.arange(first, first + count, device="cpu")).all())
        if together and block.rows is None and not transposed:
            target = self.values[first : first + count, part].unflatten(2, (-1, right.shape[2])).flatten(1, 2)
            if count == 1:
                target[0].addmm_(left[0].mT, right[0])
            else:
                target.baddbmm_(left.mT, right)
            return
        born = torch.bmm(left.mT, right)
        entries = born.shape[1] * right.shape[2] // self.values.shape[2]
        if transposed:
            born = born.unflatten(1, (entries, -1)).transpose(2, 3)
        self.add(rows, block, born.reshape(count, entries, self.values.shape[2]), part)

    def add(self, rows: Tensor, block: Transition, born: Tensor, part: slice = slice(None)) -> None:
        """``S += born`` on the state rows that ``block`` writes; born is (R, u·width, p), or of fewer entries of the
        state, see ``add_products``."""
        whole = not self.sliced and rows.numel() == self.batch_size
        if block.rows is None:
            if whole:
                self.values[:, part].add_(born)
            else:
                self.values[:, part].index_add_(0, rows.to(self.values.device), born)
            return
        here = rows.to(self.values.device)
        state_rows = block.rows[self.sample[here]]
        slots = self.values.unflatten(1, (block.n, block.width))
        slots[here[:, None], state_rows] += born.unflatten(1, (-1, block.width))

    @property
    def n_bytes(self) -> int:
        """Bytes held, free rows and bookkeeping included."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.sample, self.slice, self.clock, self._row))

    def _free(self) -> Tensor:
        return (self.sample < 0).nonzero().flatten().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is held, as tensors and numbers."""
        return {
            "sliced": self.sliced,
            "values": self.values.clone(),
            "sample": self.sample.clone(),
            "slice": self.slice.clone(),
            "clock": self.clock.clone(),
            "row": self._row.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ConfigError: it was taken of another parameter shape, state or batch.
        """
        count = state["values"].shape[0]
        if any(
            tuple(state[k].shape) != (count,) or state[k].dtype != torch.int64 for k in ("sample", "slice", "clock")
        ):
            raise ConfigError(
                "the saved influence is damaged: its rows and their samples, slices and clocks do not fit"
            )
        if state["row"].dtype != torch.int64 or (state["row"].numel() and int(state["row"].max()) >= count):
            raise ConfigError("the saved influence is damaged: a slice is said to be in a row that is not there")
        if state["values"].dtype != self.values.dtype:
            raise ConfigError(f"the saved influence is {state['values'].dtype}, this learner needs {self.values.dtype}")
        if state["values"].shape[1:] != self.values.shape[1:] or state["row"].shape != self._row.shape:
            raise ConfigError(
                f"the saved influence has rows of shape {tuple(state['values'].shape[1:])} for "
                f"{state['row'].numel()} slices, "
                f"this learner needs {tuple(self.values.shape[1:])} for {self._row.numel()}"
            )
        device = self.values.device
        self.values = state["values"].to(device, copy=True)
        self.sample, self.slice = (state[k].to(device, copy=True) for k in ("sample", "slice"))
        self.clock, self._row = state["clock"].cpu().clone(), state["row"].cpu().clone()
