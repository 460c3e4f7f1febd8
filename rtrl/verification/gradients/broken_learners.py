"""Learners that are wrong on purpose, each in one way: the gradient check is worth something only if it stops all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtrl._influence.catch_up import catch_up
from rtrl._influence.transition import Transition, compose
from rtrl.cells.protocol import Sparsity
from rtrl.errors import ConfigError
from rtrl.learners.block_rtrl import BlockRTRL


class _Truncates(BlockRTRL):
    """The influence at the block's start is thrown away: the gradient is cut off at every block border."""

    def _close(self) -> None:
        if self._open_steps:
            for influence in self._influences.values():
                influence.clear_samples(torch.ones(self.batch_size, dtype=torch.bool))
        super()._close()


class _ForgetsDormantLosses(BlockRTRL):
    """Dormant slices receive no gradient for the losses while they were dormant."""

    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        assert self._history is not None
        last = self._history.now - 1
        super()._accumulate_pending(
            {name: own[self._influences[name].last_block[own] >= last] for name, own in rows.items()}
        )


class _DoesNotCatchUp(BlockRTRL):
    """The influence of dormant slices is propagated through the last block alone."""

    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        assert self._history is not None
        self._accumulate_pending(rows)
        now = self._history.now
        for name, own in rows.items():
            influence = self._influences[name]
            behind = own[influence.last_block[own] < now]
            if len(behind):
                last = self._history.tree.query(now - 1, now).select_samples(influence.sample[behind])
                influence.values[behind] = last.apply(influence.values[behind])
            influence.last_block[own] = now


class _AveragesTheBatch(BlockRTRL):
    """One influence for the whole batch, the mean over the samples."""

    def _close(self) -> None:
        super()._close()
        for influence in self._influences.values():
            if not influence.sliced and influence.values.shape[0]:
                influence.values[:] = influence.values.mean(dim=0, keepdim=True)


class _OffByOne(BlockRTRL):
    """The adjoint is applied to the influence after its block, not to the one before it."""

    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        assert self._history is not None
        catch_up(self._history, [(self._influences[name], own) for name, own in rows.items()])
        self._accumulate_pending(rows)
        for name, own in rows.items():
            self._influences[name].last_block[own] = self._history.now


class _DropsExpired(BlockRTRL):
    """Slices that are dormant for longer than the window lose their influence instead of being caught up."""

    def _close(self) -> None:
        oldest = None if self._history is None or not self._open_steps else self._history.next_overwritten
        if oldest is not None:
            for influence in self._influences.values():
                held = influence.active_rows()
                influence.values[held[influence.last_block[held] <= oldest].to(influence.values.device)] = 0.0
        super()._close()


class _ReversesProducts(BlockRTRL):
    """The tree composes blocks latest first."""

    def _allocate(self, sparsity: Sparsity) -> None:
        super()._allocate(sparsity)
        self._reverse()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self._reverse()

    def _reverse(self) -> None:
        def backwards(first: Transition, second: Transition) -> Transition:
            return compose(second, first)

        if self._history is not None:
            self._history.tree.combine = backwards


class _KeepsInfluenceOverResets(BlockRTRL):
    """A reset restarts the state, but does not clear the influence."""

    def _clear(self, samples: Tensor, discard: bool) -> None:
        return


class _CountsTwice(BlockRTRL):
    """What a sync accumulated for dormant slices is accumulated once more when they are reactivated."""

    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        until, self._accumulated_until = self._accumulated_until, 0
        super()._accumulate_pending(rows)
        self._accumulated_until = until


@dataclass(frozen=True, slots=True)
class BrokenLearner:
    """A deliberately broken learner: what is wrong with it, and the class."""

    fault: str
    learner: type[BlockRTRL]


BROKEN_LEARNERS: dict[str, BrokenLearner] = {
    name: BrokenLearner((learner.__doc__ or "").strip(), learner)
    for name, learner in {
        "truncate": _Truncates,
        "forget-dormant-losses": _ForgetsDormantLosses,
        "no-catch-up": _DoesNotCatchUp,
        "batch-mean": _AveragesTheBatch,
        "off-by-one": _OffByOne,
        "drop-expired": _DropsExpired,
        "reverse-products": _ReversesProducts,
        "keep-over-resets": _KeepsInfluenceOverResets,
        "count-twice": _CountsTwice,
    }.items()
}


def learner_type(broken: str | None) -> type[BlockRTRL]:
    """Return the learner to be checked: the real one for None, else the broken one of this name.

    Raises:
        ConfigError: no broken learner has this name.
    """
    if broken is None:
        return BlockRTRL
    if broken not in BROKEN_LEARNERS:
        raise ConfigError(f"no broken learner is called {broken!r}; there are {', '.join(BROKEN_LEARNERS)}")
    return BROKEN_LEARNERS[broken].learner
