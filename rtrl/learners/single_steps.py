"""Blocks of one step, processed at once where they can be: without the machinery that serves blocks of many."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from rtrl._engine.block import BlockResult
from rtrl._engine.one_step import OneStep, Trial
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.row_block import RowBlockResult
from rtrl._engine.row_step import RowStep, RowTrial
from rtrl.learners.audit import Result
from rtrl.learners.carried import CarriedInfluence
from rtrl.learners.carried_rows import CarriedRows
from rtrl.learners.closing import Carried


class SingleSteps:
    """Processes single dense steps, each kind only after it gave what the general way gave.

    Args:
        cell: the cell.
        parameters: its trainable parameters, by name.
    """

    def __init__(self, cell: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._whole, self._rows = OneStep(cell, parameters), RowStep(cell, parameters)

    @property
    def n_bytes(self) -> int:
        """Bytes held beside the influences."""
        return self._whole.n_bytes

    def takes(self, step: RecordedStep, carried: Carried) -> bool:
        """Whether steps of this kind were found to be processed here as in the general way."""
        if isinstance(carried, CarriedRows):
            return self._rows.takes(step, carried.structure)
        return type(carried) is CarriedInfluence and self._whole.takes(step)

    def process(self, step: RecordedStep, last: Tensor, carried: Carried) -> dict[str, Tensor] | None:
        """Compute what a step makes of what is carried, for ``commit``, and return the gradient of its losses.

        Args:
            step: the step, of a kind that is taken.
            last: (B, n, ...), the state after it.
            carried: what is carried.

        Returns:
            The gradient by parameter name; or None if the step must go the general way. Nothing has changed yet.
        """
        if isinstance(carried, CarriedRows):
            return self._rows.process(step, last, carried.influences)
        return self._whole.process(step, last, carried.influences, carried.now + 1)

    def commit(self, carried: Carried) -> None:
        """Take what ``process`` computed."""
        if isinstance(carried, CarriedRows):
            self._rows.commit(carried.influences)
        else:
            self._whole.commit(carried.now + 1)
        carried.count_block()

    def try_out(
        self,
        step: RecordedStep,
        last: Tensor,
        carried: Carried,
        result: Result,
        skipped: Iterable[str],
        audited: bool,
    ) -> Trial | RowTrial | None:
        """Process a step that is about to be added in the general way, too.

        Args:
            step: the step.
            last: (B, n, ...), the state after it.
            carried: what it will be added to.
            result: the step, processed in the general way.
            skipped: parameters whose uses are not recorded.
            audited: whether it was audited.

        Returns:
            What ``settle`` needs once the step has been added; None if there is nothing to compare.
        """
        if isinstance(carried, CarriedRows) and isinstance(result, RowBlockResult):
            return self._rows.try_out(step, last, carried.influences, result, skipped, audited)
        if type(carried) is CarriedInfluence and isinstance(result, BlockResult):
            return self._whole.try_out(step, last, carried.influences, carried.now, result, audited)
        return None

    def settle(self, trial: Trial | RowTrial, carried: Carried) -> dict[str, Tensor] | None:
        """Compare a trial with its step, which has been added in the general way.

        Returns:
            The gradient by parameter name, as ``process`` gives it; or None if they differ, and no step is taken from
            now on.
        """
        if isinstance(trial, RowTrial):
            return self._rows.settle(trial, carried.influences)  # type: ignore[arg-type]
        return self._whole.settle(trial, carried.now)

    def state_dict(self) -> list[list[Any]]:
        """Return the kinds of steps that are known, as plain values."""
        return self._whole.state_dict()

    def load_state_dict(self, saved: list[list[Any]]) -> None:
        """Restore what ``state_dict`` returned."""
        self._whole.load_state_dict(saved)
