"""Faults of what ``BlockRTRL`` carries from block to block: each makes gradients wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rtrl._engine.block import BlockResult
from rtrl._engine.row_block import RowBlockResult
from rtrl._influence.catch_up import catch_up
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition, compose
from rtrl.learners.audit import BlockAudit
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.learners.carried import CarriedInfluence
from rtrl.learners.carried_rows import CarriedRows
from rtrl.learners.single_steps import SingleSteps
from rtrl.verification.broken.fault import Patch, break_, original


def _plant(patch: Patch, whole: type[CarriedInfluence], **rows: Callable[..., Any]) -> None:
    """Carry influences in a wrong way: those of the whole state, and those of independent rows."""
    patch(BlockRTRL, "_carries", whole)
    for name, method in rows.items():
        patch(CarriedRows, name, method)
    if rows:  # the quicker way for single steps would go past what is broken
        patch(SingleSteps, "takes", lambda self, step, carried: False)
        patch(SingleSteps, "try_out", lambda self, *args: None)


def _everyone(influence: Any) -> Tensor:
    return torch.ones(influence.batch_size, dtype=torch.bool)


class _Truncates(CarriedInfluence):
    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        for influence in self.influences.values():
            influence.clear_samples(_everyone(influence))
        super().add(result, audit)


@break_("truncate")
def truncate(patch: Patch) -> None:
    """The influence at the block's start is thrown away: the gradient is cut off at every block border."""
    stage = original(CarriedRows, "stage")

    def cut(self: CarriedRows, result: RowBlockResult, audit: BlockAudit | None, span: str) -> None:
        for influence in self.influences.values():
            influence.clear_samples(_everyone(influence))
        stage(self, result, audit, span)

    _plant(patch, _Truncates, stage=cut)


@break_("cut-every-5-steps")
def cut_every_5_steps(patch: Patch) -> None:
    """The influence is thrown away whenever five steps have been processed: the gradient reaches back no further."""
    at_once = original(BlockRTRL, "_process_at_once")

    def process(self: BlockRTRL) -> bool:
        first, last = self._open_steps[0].number, self._open_steps[-1].number
        if first // 5 == (last + 1) // 5:
            return bool(at_once(self))
        for influence in self._carried.influences.values():
            influence.clear_samples(_everyone(influence))
        return False

    patch(BlockRTRL, "_process_at_once", process)


class _ForgetsDormantLosses(CarriedInfluence):
    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        assert self.history is not None
        last = self.history.now - 1
        super()._accumulate_pending(
            {name: own[self.influences[name].last_block[own] >= last] for name, own in rows.items()}
        )


@break_("forget-dormant-losses")
def forget_dormant_losses(patch: Patch) -> None:
    """Dormant slices receive no gradient for the losses while they were dormant."""
    _plant(patch, _ForgetsDormantLosses)


class _DoesNotCatchUp(CarriedInfluence):
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


@break_("no-catch-up")
def no_catch_up(patch: Patch) -> None:
    """The influence of dormant slices is propagated through the last block alone."""
    _plant(patch, _DoesNotCatchUp)


class _AveragesTheBatch(CarriedInfluence):
    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        super().add(result, audit)
        for influence in self.influences.values():
            if not influence.sliced and influence.values.shape[0]:
                influence.values[:] = influence.values.mean(dim=0, keepdim=True)


@break_("batch-mean")
def batch_mean(patch: Patch) -> None:
    """One influence for the whole batch, the mean over the samples."""
    add = original(CarriedRows, "add")

    def mean(self: CarriedRows, result: RowBlockResult, audit: BlockAudit | None) -> None:
        add(self, result, audit)
        for influence in self.influences.values():
            for part in influence.parts.values():
                part[:] = part.mean(dim=0, keepdim=True)

    _plant(patch, _AveragesTheBatch, add=mean)


class _OffByOne(CarriedInfluence):
    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        assert self.history is not None
        catch_up(self.history, [(self.influences[name], own) for name, own in rows.items()])
        self._accumulate_pending(rows)
        for name, own in rows.items():
            self.influences[name].last_block[own] = self.history.now


@break_("off-by-one")
def off_by_one(patch: Patch) -> None:
    """The adjoint is applied to the influence after its block, not to the one before it."""

    def late(self: CarriedRows, result: RowBlockResult, audit: BlockAudit | None) -> None:
        for name, influence in self.influences.items():
            influence.commit()
            if influence.parts:
                self._gradient(name).add_(influence.contract(result.transition.adjoint).sum(dim=0))
        for name, gradient in result.gradient.items():
            self._gradient(name).add_(gradient)
        self.now += 1

    advance = original(ParameterInfluence, "advance")

    def late_whole(self: ParameterInfluence, block: Transition, gradient: Tensor) -> None:
        advance(self, block, torch.zeros_like(gradient))
        after, self.values = self.values, self.values.clone()
        advance(self, block, gradient)
        self.values = after

    patch(ParameterInfluence, "advance", late_whole)
    _plant(patch, _OffByOne, add=late)


class _DropsExpired(CarriedInfluence):
    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        oldest = None if self.history is None else self.history.next_overwritten
        if oldest is not None:
            for influence in self.influences.values():
                held = influence.active_rows()
                influence.values[held[influence.last_block[held] <= oldest].to(influence.values.device)] = 0.0
        super().add(result, audit)


@break_("drop-expired")
def drop_expired(patch: Patch) -> None:
    """Slices that are dormant for longer than the window lose their influence instead of being caught up."""
    _plant(patch, _DropsExpired)


class _ReversesProducts(CarriedInfluence):
    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        assert self.history is not None
        self.history.tree.combine = _backwards
        super().add(result, audit)


def _backwards(first: Transition, second: Transition) -> Transition:
    return compose(second, first)


@break_("reverse-products")
def reverse_products(patch: Patch) -> None:
    """The tree composes blocks latest first."""
    _plant(patch, _ReversesProducts)


class _KeepsInfluenceOverResets(CarriedInfluence):
    def clear(self, samples: Tensor, discard: bool) -> None:
        return


@break_("keep-over-resets")
def keep_over_resets(patch: Patch) -> None:
    """A reset restarts the state, but does not clear the influence."""
    reset = original(BlockRTRL, "reset")

    def after_closing(self: BlockRTRL, *args: Any, **options: Any) -> None:
        self._close()  # so that it is the reset that clears the influence
        reset(self, *args, **options)

    patch(BlockRTRL, "reset", after_closing)
    _plant(patch, _KeepsInfluenceOverResets, clear=lambda self, samples, discard: None)


class _CountsTwice(CarriedInfluence):
    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        until, self.accumulated_until = self.accumulated_until, 0
        super()._accumulate_pending(rows)
        self.accumulated_until = until


@break_("count-twice")
def count_twice(patch: Patch) -> None:
    """What a sync accumulated for dormant slices is accumulated once more when they are reactivated."""
    _plant(patch, _CountsTwice)
