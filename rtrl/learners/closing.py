"""A block of steps → what it gives, with everything checked that can be wrong, and nothing changed."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from rtrl._engine import checks, deferred
from rtrl._engine.block import BlockResult, close_block, overflowing
from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.linearizer import Linearizer
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.row_block import RowBlockResult
from rtrl._engine.slot_block import SlotBlockResult
from rtrl._influence.structure import Structure
from rtrl._utils.real_pairs import RealForms, real_numbers
from rtrl.errors import NonFiniteError, SparsityError
from rtrl.learners.audit import Result
from rtrl.learners.carried import CarriedInfluence
from rtrl.learners.carried_rows import CarriedRows
from rtrl.learners.carried_slots import CarriedSlots, by_slot

Carried = CarriedInfluence | CarriedRows | CarriedSlots
"""What is carried from block to block, in one of its forms."""


class BlockCloser:
    """Linearises blocks of steps and sweeps them: by the rows of a structure where there is one.

    Args:
        linearizer: linearises steps.
        parameters: name → trainable parameter.
        state: (B, n, ...), any state.
        given: the structure to begin with; None looks for one.
    """

    def __init__(
        self, linearizer: Linearizer, parameters: Mapping[str, Tensor], state: Tensor, given: Structure | None
    ) -> None:
        self._linearizer, self._parameters = linearizer, RealForms(parameters)
        self._given = None if given is None else given.to(state.device)
        count = sum(map(real_numbers, parameters.values()))
        self._scratch = ReusableBuffer(count * state.numel() * state.element_size())  # the influence's size

    @property
    def n_bytes(self) -> int:
        """Bytes held between blocks."""
        return self._scratch.n_bytes + self._linearizer.n_bytes

    def close(self, steps: Sequence[RecordedStep], reached: Tensor, carried: Carried) -> Result:
        """Linearise steps and sweep them. On a device, the host reads all checks by one transfer.

        Args:
            steps: of the block, in order.
            reached: (B, n, ...), the state after the last of them.
            carried: what is carried to the block's start.

        Raises:
            CellError: run again, the cell does something else than it did.
            SparsityError: a slice or row was used that was not declared.
            NonFiniteError: NaN or infinity in a Jacobian or gradient.
        """
        if deferred.on_host(reached):
            return self._checked(steps, reached, carried)
        found, block = deferred.Deferred(), None
        with suppress(Exception), deferred.deferring(found):
            block = self._checked(steps, reached, carried)
        if block is not None and found.passed():
            return block
        is_new = self._linearizer.found_new_kind
        result = self._checked(steps, reached, carried)  # each check by itself: it says what is wrong, if something is
        self._linearizer.found_new_kind |= is_new
        return result

    def _checked(self, steps: Sequence[RecordedStep], reached: Tensor, carried: Carried) -> Result:
        if not deferred.on_host(reached):
            checks.check_recorded(steps, reached)
        structured = self._linearizer.structured
        try:
            return (
                self._by_slot(steps, reached, carried)
                or self._by_rows(steps, reached, carried)
                or self._whole(steps, reached, carried)
            )
        except BaseException:
            self._linearizer.structured = structured
            raise

    def _by_slot(self, steps: Sequence[RecordedStep], reached: Tensor, carried: Carried) -> SlotBlockResult | None:
        """Close a block of a cell whose slots are independent, each slot by itself; None if it cannot be done so."""
        if not isinstance(carried, CarriedSlots):
            return None
        with torch.enable_grad():
            result = self._linearizer.by_slot(steps, reached, carried.sliced, carried.held)
        if result is None:
            return None
        span, block = span_of(steps), result.block
        _check_finite([block.transition.jacobian], [block.transition.adjoint], block.gradient, span)
        overflown = overflowing(block, by_slot(reached), self._parameters, result.sliced)
        if overflown is not None:
            raise NonFiniteError(f"NaN or infinity in the immediate influence of parameter {overflown!r} in {span}")
        return result

    def _by_rows(self, steps: Sequence[RecordedStep], reached: Tensor, carried: Carried) -> RowBlockResult | None:
        """Close a block with the structure of the cell; None if it has none."""
        if not self._linearizer.structured:
            return None
        known = carried.structure if isinstance(carried, CarriedRows) else None if carried.begun else self._given
        with torch.enable_grad():
            result = self._linearizer.with_structure(steps, reached, known, carried.dense)
        if result is not None:
            transition = result.transition
            products = [*transition.own, *transition.cross.values()]
            _check_finite(products, transition.adjoint, result.gradient, span_of(steps))
        return result

    def _whole(self, steps: Sequence[RecordedStep], reached: Tensor, carried: Carried) -> BlockResult:
        """Close a block without structure."""
        span, sliced = span_of(steps), carried.sliced if isinstance(carried, CarriedInfluence) else ()
        with torch.enable_grad():
            groups = self._linearizer(steps, reached)
        try:
            result = close_block(groups, reached, self._parameters, sliced, self._scratch)
        except SparsityError as error:
            raise SparsityError(f"{span}: {error}") from error
        del groups  # and with it the graph
        _check_finite([result.transition.jacobian], [result.transition.adjoint], result.gradient, span)
        overflown = overflowing(result, reached, self._parameters, sliced)
        if overflown is not None:
            raise NonFiniteError(f"NaN or infinity in the immediate influence of parameter {overflown!r} in {span}")
        return result


def span_of(steps: Sequence[RecordedStep]) -> str:
    """Return the steps of a block, for messages."""
    return f"steps {steps[0].number} … {steps[-1].number}"


def _check_finite(
    products: Sequence[Tensor], adjoints: Sequence[Tensor], gradients: Mapping[str, Tensor], span: str
) -> None:
    for what, values in (("Jacobian product", products), ("adjoint", adjoints)):
        if not checks.all_finite(values):
            raise NonFiniteError(f"NaN or infinity in the {what} of {span}: the state's dynamics overflow")
    for name, gradient in gradients.items():
        if not checks.finite(gradient):
            raise NonFiniteError(f"NaN or infinity in the gradient of parameter {name!r} inside {span}")
