"""Linearise blocks of steps with the structure of the cell: found at the first block, and held against every one."""

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from rtrl._engine.deferred import deferring
from rtrl._engine.recorded import RecordedStep, StepBatch, join_restarts, join_steps, reached_states
from rtrl._engine.row_block import RowBlockResult, close_rows
from rtrl._engine.row_linearization import CouplingFound, RowSeeds, linearize_rows
from rtrl._engine.structure_search import find_structure, look
from rtrl._influence.structure import Structure
from rtrl._utils.real_pairs import RealForms
from rtrl.cells.protocol import takes_replay
from rtrl.cells.row_groups import declared_groups
from rtrl.errors import PerformanceWarning

_MOST_CHANGES = 3  # a structure that was found to be another one more often than that is given up


class RowLinearizer:
    """Linearises recorded dense steps with structure.

    Args:
        cell: the cell.
        parameters: its trainable parameters.
        verify: checks what a kind of steps lets a cell do wrong, once; returns the parameters whose uses may not be
            recorded.
    """

    def __init__(
        self,
        cell: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        verify: Callable[[Sequence[StepBatch]], set[str]],
    ) -> None:
        self._cell, self._parameters, self._verify = cell, dict(parameters), verify
        self._takes_replay = takes_replay(cell)
        self._changes = 0
        self._seeds: tuple[Structure, RowSeeds] | None = None

    def __call__(
        self,
        steps: Sequence[RecordedStep],
        last: Tensor,
        known: Structure | None,
        first: Callable[[], Mapping[str, Tensor]],
    ) -> RowBlockResult | None:
        """Linearise the steps of a block, and sweep them.

        Args:
            steps: the steps in order.
            last: (B, n, ...), the state after the last of them.
            known: the structure so far; None at the first block.
            first: gives parameter → influence (B, H, P) that is there before a structure is looked for.

        Returns:
            The block, with its structure, which is wider than ``known`` if that no longer held; None if no structure
            is worth having.

        Raises:
            CellError: run as one batch, the cell computes something else than it did step by step, or mixes samples;
                or it declares rows that are not independent.
            NonFiniteError: NaN or infinity in a Jacobian or in a loss's gradient.
        """
        if not all(step.dense for step in steps):
            return None
        batches = self.batches(steps, last)
        with deferring(None):  # what is found holds from now on
            untapped = self._verify(batches)
        structure = known
        if structure is None or not self._parameters.keys() <= structure.parameters.keys():
            structure = self._find(batches, untapped, known, {} if known is not None else first())
            if structure is None:
                return None
        probed = True
        while True:
            try:
                return self._close(steps, batches, structure, untapped, probed)
            except CouplingFound:
                wider = self._wider(batches, untapped, structure) if probed else None
                if wider is None:
                    return None
                probed, structure = wider is not structure, wider

    @property
    def n_bytes(self) -> int:
        """Bytes held between blocks: the cotangents of the structure."""
        return 0 if self._seeds is None else self._seeds[1].n_bytes

    def find(self, steps: Sequence[RecordedStep], last: Tensor) -> Structure | None:
        """Return the structure that steps show; None if there is none worth having."""
        if not steps or not all(step.dense for step in steps):
            return None
        batches = self.batches(steps, last)
        return self._find(batches, self._verify(batches), None, {})

    def batches(self, steps: Sequence[RecordedStep], last: Tensor) -> list[StepBatch]:
        """The steps, those of one kind together."""
        kinds: dict[object, list[int]] = {}
        for time, step in enumerate(steps):
            kinds.setdefault(step.kind(), []).append(time)
        after = reached_states(steps, last)
        return [
            join_steps(times, [steps[t] for t in times], [after[t] for t in times], self._takes_replay)
            for times in kinds.values()
        ]

    def _find(
        self, batches: Sequence[StepBatch], untapped: set[str], known: Structure | None, first: Mapping[str, Tensor]
    ) -> Structure | None:
        """Look for a structure."""
        with deferring(None):
            found = find_structure(self._cell, self._parameters, batches, untapped, known, first, self._declared())
        return None if found is None else found.to(batches[0].h.device)

    def _declared(self) -> list[Tensor] | None:
        """The groups that the cell declares."""
        return declared_groups(self._cell)

    def _wider(self, batches: Sequence[StepBatch], untapped: set[str], structure: Structure) -> Structure | None:
        """The structure that these steps have; the same one if it was rounding that contradicted it."""
        if all(
            look(self._cell, self._parameters, batch, untapped | structure.untapped).within(structure)
            for batch in batches
        ):
            return structure
        self._changes += 1
        found = None if self._changes > _MOST_CHANGES else self._find(batches, untapped, structure, {})
        if found is None:
            warnings.warn(
                f"{batches[0].span}: rows of the state that were independent are no longer. From now on the influence "
                "is kept on the whole state, which takes longer",
                PerformanceWarning,
                stacklevel=10,
            )
        return found

    def _close(
        self,
        steps: Sequence[RecordedStep],
        batches: Sequence[StepBatch],
        structure: Structure,
        untapped: set[str],
        probed: bool,
    ) -> RowBlockResult:
        if self._seeds is None or self._seeds[0] is not structure:
            self._seeds = structure, RowSeeds(structure, batches[0].h)
        seeds, skipped = self._seeds[1], untapped | structure.untapped
        linearized = []
        for batch in batches:
            batch.h.requires_grad_()
            linearized.append(
                linearize_rows(self._cell, self._parameters, batch, structure, seeds, skipped, probed=probed)
            )
        restarted = join_restarts(steps)
        return close_rows(linearized, structure, RealForms(self._parameters), len(steps), restarted, probed=probed)
