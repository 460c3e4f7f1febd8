"""Learners that are wrong on purpose, each in one way: the gradient check is worth something only if it stops all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtrl._engine.block import BlockResult
from rtrl._influence.catch_up import catch_up
from rtrl._influence.transition import Transition, compose
from rtrl.errors import ConfigError
from rtrl.learners.audit import BlockAudit
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.learners.carried import CarriedInfluence


class _Truncates(CarriedInfluence):
    """The influence at the block's start is thrown away: the gradient is cut off at every block border."""

    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        for influence in self.influences.values():
            influence.clear_samples(torch.ones(influence.batch_size, dtype=torch.bool))
        super().add(result, audit)


class _ForgetsDormantLosses(CarriedInfluence):
    """Dormant slices receive no gradient for the losses while they were dormant."""

    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        assert self.history is not None
        last = self.history.now - 1
        super()._accumulate_pending(
            {name: own[self.influences[name].last_block[own] >= last] for name, own in rows.items()}
        )


class _DoesNotCatchUp(CarriedInfluence):
    """The influence of dormant slices is propagated through the last block alone."""

    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        assert self.history is not None
        self._accumulate_pending(rows)
        now = self.history.now
        for name, own in rows.items():
            influence = self.influences[name]
            behind = own[influence.last_block[own] < now]
            if len(behind):
                last = self.history.tree.query(now - 1, now).select_samples(influence.sample[behind])
                influence.values[behind] = last.apply(influence.values[behind])
            influence.last_block[own] = now


class _AveragesTheBatch(CarriedInfluence):
    """One influence for the whole batch, the mean over the samples."""

    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        super().add(result, audit)
        for influence in self.influences.values():
            if not influence.sliced and influence.values.shape[0]:
                influence.values[:] = influence.values.mean(dim=0, keepdim=True)


class _OffByOne(CarriedInfluence):
    """The adjoint is applied to the influence after its block, not to the one before it."""

    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        assert self.history is not None
        catch_up(self.history, [(self.influences[name], own) for name, own in rows.items()])
        self._accumulate_pending(rows)
        for name, own in rows.items():
            self.influences[name].last_block[own] = self.history.now


class _DropsExpired(CarriedInfluence):
    """Slices that are dormant for longer than the window lose their influence instead of being caught up."""

    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        oldest = None if self.history is None else self.history.next_overwritten
        if oldest is not None:
            for influence in self.influences.values():
                held = influence.active_rows()
                influence.values[held[influence.last_block[held] <= oldest].to(influence.values.device)] = 0.0
        super().add(result, audit)


class _ReversesProducts(CarriedInfluence):
    """The tree composes blocks latest first."""

    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        def backwards(first: Transition, second: Transition) -> Transition:
            return compose(second, first)

        assert self.history is not None
        self.history.tree.combine = backwards
        super().add(result, audit)


class _KeepsInfluenceOverResets(CarriedInfluence):
    """A reset restarts the state, but does not clear the influence."""

    def clear(self, samples: Tensor, discard: bool) -> None:
        return


class _CountsTwice(CarriedInfluence):
    """What a sync accumulated for dormant slices is accumulated once more when they are reactivated."""

    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        until, self.accumulated_until = self.accumulated_until, 0
        super()._accumulate_pending(rows)
        self.accumulated_until = until


class _Broken(BlockRTRL):
    """Carries the influence of the whole state, in a way that is wrong."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "structure": "off"})


class _BrokenAtResets(_Broken):
    """Closes the block before a reset, so that it is the reset that clears the influence."""

    def reset(self, *args: Any, **options: Any) -> None:
        self._close()
        super().reset(*args, **options)


def _learner_with(carried: type[CarriedInfluence]) -> type[BlockRTRL]:
    base = _BrokenAtResets if carried is _KeepsInfluenceOverResets else _Broken
    return type(f"{carried.__name__}Learner", (base,), {"_carries": carried, "__doc__": carried.__doc__})


@dataclass(frozen=True, slots=True)
class BrokenLearner:
    """A deliberately broken learner: what is wrong with it, and the class."""

    fault: str
    learner: type[BlockRTRL]


BROKEN_LEARNERS: dict[str, BrokenLearner] = {
    name: BrokenLearner((carried.__doc__ or "").strip(), _learner_with(carried))
    for name, carried in {
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
