"""Linearise recorded steps: their state Jacobians, adjoints and taps, all of one kind in one batch.

Going forward needs no graph. When a block closes, the cell is run again on all its steps as one batch of N = B·m
samples, with its choices replayed, and every derivative is taken in one batched backward pass.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from rtrl._engine.analytic import AnalyticLinearization, check_analytic_step
from rtrl._engine.autograd import AutogradLinearization
from rtrl._engine.deferred import deferring
from rtrl._engine.linearization import Linearization, cut_at_restarts
from rtrl._engine.mixing import run_perturbed, taps_mixing_samples
from rtrl._engine.recorded import RecordedStep, StepBatch, join_restarts, join_steps, reached_states
from rtrl._engine.row_block import RowBlockResult
from rtrl._engine.row_linearizer import RowLinearizer
from rtrl._engine.slot_block import SlotBlockResult, close_slots
from rtrl._engine.slot_linearization import NotBySlot, linearize_slots
from rtrl._engine.unitwise import UnitwisePattern, find_pattern
from rtrl._influence.structure import Structure
from rtrl._utils.real_pairs import RealForms
from rtrl._utils.stack_level import users_level
from rtrl.cells.analytic import HasAnalyticStep
from rtrl.cells.protocol import takes_replay
from rtrl.cells.row_groups import declares_independent_slots
from rtrl.cells.supported import runs_as_written
from rtrl.errors import CellError, PerformanceWarning

WAYS = (
    "all steps of a kind in one batch, linear uses of parameters recorded",
    "all steps of a kind in one batch, no use of a parameter recorded",
    "each step by itself, no use of a parameter recorded",
)
"""The ways to linearise a block, from the fastest to the one that assumes least of the cell."""


class Linearizer:
    """Linearises recorded steps of a cell for its trainable parameters; remembers only what it has verified.

    Attributes:
        way: the index in ``WAYS`` of the way that is taken.
        structured: whether blocks are linearised with the structure of the cell, as long as it has one.
        found_new_kind: whether the last call met steps of a kind, or a number of them, that it had not met before.
    """

    def __init__(self, cell: nn.Module, parameters: Mapping[str, nn.Parameter], structured: bool = False) -> None:
        self._cell, self._parameters = cell, dict(parameters)
        self._takes_replay = takes_replay(cell)
        self._untapped: set[str] = set()  # parameters with a tap that was found to mix samples
        self._verified: dict[tuple[Any, ...], UnitwisePattern | None] = {}
        self.way = 0
        self.found_new_kind = False
        self._has_analytic_step = isinstance(cell, HasAnalyticStep)
        self.structured = structured and not self._has_analytic_step  # a cell with an analytic step is dense
        self._rows = RowLinearizer(cell, parameters, self._verified_kinds)
        self._keeps_slots_apart = True  # until a use of a parameter was found that does not
        if not self._has_analytic_step and callable(getattr(cell, "linearize", None)):
            warnings.warn(
                f"{type(cell).__name__}.linearize is not used: the method is called analytic_step now",
                DeprecationWarning,
                stacklevel=4,
            )

    def __call__(self, steps: Sequence[RecordedStep], last: Tensor) -> list[Linearization]:
        """Linearise the steps of a block; steps that differ in shape or in the width of their sparsity form groups of
        their own.

        Args:
            steps: the steps in order.
            last: (B, n, ...), the present state.

        Raises:
            CellError: run as one batch, the cell computes something else than it did step by step, or mixes samples.
            SparsityError: the cell reads rows or uses slices that it did not declare.
            NonFiniteError: NaN or infinity in a Jacobian or in a loss's gradient.

        Cost: one forward pass and ``w·slot_size`` batched backward passes over the N samples of a group.
        """
        self.found_new_kind = False
        groups: dict[tuple[Any, ...], list[int]] = {}
        for time, step in enumerate(steps):
            groups.setdefault((step.kind(), time if self.way == 2 else None), []).append(time)
        next_states = reached_states(steps, last)
        with _checkpoints_explained():
            linearized = []
            for (kind, _), times in groups.items():
                of_kind = [steps[t] for t in times]
                batch = join_steps(times, of_kind, [next_states[t] for t in times], self._takes_replay)
                group = self._linearize((*kind, len(times), self.way), batch)
                linearized.append(cut_at_restarts(group, join_restarts(of_kind)))
            return linearized

    def with_structure(
        self,
        steps: Sequence[RecordedStep],
        last: Tensor,
        known: Structure | None,
        first: Callable[[], Mapping[str, Tensor]],
    ) -> RowBlockResult | None:
        """Linearise the steps of a block with the structure of the cell, and sweep them; see ``RowLinearizer``.

        Returns:
            The block; None if there is no structure that is worth having, so that ``structured`` is False from now on.
        """
        self.found_new_kind = False
        with _checkpoints_explained():
            result = self._rows(steps, last, known, first)
        self.structured = result is not None
        return result

    def goes_by_slot(self, state: Tensor) -> bool:
        """Whether blocks of steps that say what they write can be linearised slot by slot, as far as is known."""
        usable = self.structured and self._keeps_slots_apart and self.way == 0
        return usable and declares_independent_slots(self._cell, state)

    def by_slot(
        self, steps: Sequence[RecordedStep], last: Tensor, sliced: Sequence[str], held: set[str]
    ) -> SlotBlockResult | None:
        """Linearise and sweep the steps of a block whose slots are independent, each slot by itself.

        Args:
            steps: the steps in order.
            last: (B, n, ...), the present state.
            sliced: the parameters whose influence is kept slice by slice.
            held: other parameters that have an influence before the block.

        Returns:
            The block; None if the cell declares no independent slots, does not say what it writes, or uses a parameter
            in a way that does not keep the slots apart.

        Raises:
            CellError: a slot depends on another one; and see ``__call__``.
        """
        self.found_new_kind = False
        if not self.goes_by_slot(last):
            return None
        if any(step.sparsity.writes is None or not step.sparsity.writes.numel() for step in steps):
            return None
        with _checkpoints_explained():
            batches = self._rows.batches(steps, last)
            with deferring(None):  # what is found holds from now on
                untapped = self._verified_kinds(batches)
            groups = []
            try:
                for batch in batches:
                    batch.h.requires_grad_()
                    groups.append(linearize_slots(self._cell, self._parameters, batch, untapped, sliced))
            except NotBySlot as error:
                self._keeps_slots_apart = False
                warnings.warn(
                    f"{batches[0].span}: the slots are independent, but {error}. The influence is kept on the whole "
                    "state, which takes longer",
                    PerformanceWarning,
                    stacklevel=users_level(),
                )
                return None
        parameters = RealForms(self._parameters)
        return close_slots(groups, last, parameters, sliced, held, join_restarts(steps))

    @property
    def skipped(self) -> frozenset[str]:
        """Parameters whose uses may not be recorded."""
        return frozenset(self._untapped)

    @property
    def n_bytes(self) -> int:
        """Bytes held between blocks."""
        return self._rows.n_bytes

    def find_structure(self, steps: Sequence[RecordedStep], last: Tensor) -> Structure | None:
        """Return the structure that steps show; None if there is none worth having."""
        return self._rows.find(steps, last) if self.structured else None

    def _verified_kinds(self, batches: Sequence[StepBatch]) -> set[str]:
        """Verify steps that are linearised with structure; return the parameters whose uses may not be recorded."""
        for batch in batches:
            kind = (*batch.steps[0].kind(), len(batch.times), "structured")
            if kind not in self._verified:
                run = run_perturbed(self._cell, self._parameters, batch, self._untapped, elementwise=True)
                self._untapped |= taps_mixing_samples(self._cell, self._parameters, batch, run)
                self._verified[kind] = None
                self.found_new_kind = True
        return self._untapped

    def _linearize(self, kind: tuple[Any, ...], batch: StepBatch) -> Linearization:
        analytic = self._has_analytic_step and batch.steps[0].dense and runs_as_written(self._cell) and self.way == 0
        if kind not in self._verified:
            with deferring(None):  # what is found holds from now on
                self._verified[kind] = self._verify(batch, analytic)
            self.found_new_kind = True
        batch.h.requires_grad_()
        if analytic:
            by_cell = AnalyticLinearization(self._cell, self._parameters, batch, self._untapped)
            if by_cell.step is not None:
                return by_cell.linearize()
        untapped = self._untapped if self.way == 0 else self._parameters
        pattern = self._verified[kind]
        return AutogradLinearization(self._cell, self._parameters, batch, untapped, pattern).linearize()

    def _verify(self, batch: StepBatch, analytic: bool) -> UnitwisePattern | None:
        """Check what a block of this kind and length lets a cell do wrong, once; and look how its units interact."""
        run = run_perturbed(self._cell, self._parameters, batch, self._untapped)
        mixing = taps_mixing_samples(self._cell, self._parameters, batch, run)
        self._untapped |= mixing
        if analytic:
            check_analytic_step(self._cell, self._parameters, batch.x, batch.h, batch.steps[0].number)
        if mixing or self.way:
            return None
        return find_pattern(run.heads[0], run.h, run.recorder, run.theta)


@contextmanager
def _checkpoints_explained() -> Iterator[None]:
    """Say what is wrong with a cell that checkpoints activations."""
    try:
        yield
    except (CheckpointError, RuntimeError) as error:
        if "torch.utils.checkpoint" not in f"{type(error).__module__} {error}":
            raise
        raise CellError(
            "the cell checkpoints activations (torch.utils.checkpoint) around a parameter, and what it computes"
            " again there cannot be distinguished; remove the checkpoint: no graph outlives a block anyway"
        ) from error
