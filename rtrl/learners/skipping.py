"""Steps with NaN or infinity that are skipped: as if they had not been taken, and counted."""

from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from rtrl._engine import checks, losses
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.sequence import count_steps
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.protocol import Sparsity, call_cell
from rtrl.errors import NonFiniteError
from rtrl.learners.base import Learner

OnNonFinite = Literal["raise", "skip"]
"""What a learner does about NaN and infinity."""


class SkippingLearner(Learner):
    """A learner that may skip steps with NaN or infinity in them; ``BlockRTRL`` is built on it.

    Attributes:
        on_nonfinite: what is done about NaN and infinity.
        skipped_steps: how many steps were skipped.
    """

    skipped_steps: int = 0
    _skipped_leaves: tuple[Tensor, ...] = ()  # of the newest y that was skipped: losses there are ignored

    def _step_or_skip(self, x: Any, replay: Sparsity | None) -> Any:
        self._close_full_block()
        before = self._steps_taken
        try:
            return self._take_step(x, replay)
        except NonFiniteError:
            if self._damage is not None or self._steps_taken != before:
                raise
        with torch.no_grad():
            y, _, _ = call_cell(self._stepping, x, self._state.clone(), replay)
        return self._skipped(y, 1)

    def _steps_or_skip(self, xs: Any) -> Any:
        self._close_full_block()
        before = self._steps_taken
        try:
            return self._take_steps(xs)
        except NonFiniteError:
            if self._damage is not None or self._steps_taken != before:
                raise
        h, ys = self._state.clone(), []
        with torch.no_grad():
            for k in range(count_steps(xs)):
                y, h, _ = call_cell(self._stepping, pytrees.map_tensors(itemgetter(k), xs), h, None)
                ys.append(y)
        return self._skipped(pytrees.stack(ys), len(ys))

    def _add_or_skip(self, loss: Tensor) -> None:
        if isinstance(loss, Tensor) and loss.requires_grad and self._skipped_leaves:
            skipped = set(map(id, self._skipped_leaves))
            if not checks.reached_leaves(loss).keys().isdisjoint(skipped):
                return
        try:
            self._add_loss(loss)
        except NonFiniteError:
            self._skip_newest()

    def _close_full_block(self) -> None:
        """Process a full block before the next step is taken, which begins at another state if the block is skipped."""
        if len(self._open_steps) >= self.block:
            self._close()

    def _skipped(self, y: Any, count: int) -> Any:
        """Count steps, and return what the cell gave for them: leaves whose losses are ignored."""
        y = pytrees.map_tensors(lambda leaf: leaf.detach().clone(), y)
        self._skipped_leaves = tuple(leaf.requires_grad_() for leaf in pytrees.tensors(y) if is_continuous(leaf))
        self.skipped_steps += count
        return y

    def _skip_newest(self) -> None:
        """Go back to the state before the newest step, or before all that were taken with it."""
        steps, newest = self._open_steps, self._open_steps[-1]
        together = newest.sequence is not None
        count = sum(step.sequence is newest.sequence for step in steps) if together else 1
        self._skip(steps[:-count], steps[-count:])

    def _skip_block(self) -> None:
        """Go back to the state before the open block."""
        self._skip([], self._open_steps)

    def _skip(self, kept: list[RecordedStep], skipped: list[RecordedStep]) -> None:
        """Go back to the state before some of the open steps, the last ones; samples that restarted since stay so."""
        state, restarted = skipped[0].h.detach(), skipped[0].restarted if kept else None
        restarts = [(step.restarted, step.h.detach()) for step in skipped[1:]] + [(self._restarting, self._state)]
        for samples, restart in restarts:
            if samples is not None:
                state = torch.where(samples.reshape(-1, *[1] * (state.ndim - 1)), restart, state)
                restarted = samples if restarted is None else restarted | samples
        leaves = {id(leaf): (leaf, step.number) for step in skipped for leaf in step.leaves}
        self._damage = "steps were not skipped as a whole"
        if kept and restarted is not None and kept[-1].reached is None:
            kept[-1].reached = skipped[0].h.detach()
        self._open_steps, self._seen_losses, self._restarting = kept, [], restarted if kept else None
        self._state, self._steps_taken = state.clone(), skipped[0].number
        self.skipped_steps += len(skipped)
        self._skipped_leaves = tuple(leaf for leaf, _ in leaves.values())
        losses.close_leaves(leaves.values())
        if not kept and restarted is not None:
            self._clear(restarted, False)
        self._damage = None
