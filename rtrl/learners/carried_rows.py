"""What a learner carries from block to block where the rows of the state are independent."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rtrl._engine import checks
from rtrl._engine.row_block import RowBlockResult
from rtrl._influence.rows import RowInfluence
from rtrl._influence.structure import Structure
from rtrl.cells.protocol import Sparsity
from rtrl.errors import ConfigError, NonFiniteError
from rtrl.learners.audit import Auditor, BlockAudit
from rtrl.learners.row_checks import DeliveryCheck, RowResetCheck, added_dense, check_rows, checked_dense


class CarriedRows:
    """The influence of every parameter, on the rows of the state that it reaches.

    Args:
        structure: the structure of the cell.
        parameters: name → trainable parameter; the learner's own mapping, which may change between blocks.
        state: (B, n, ...), any state, for shape, dtype and device.
        gradient: gives the buffer, by parameter, that collects the gradient not yet delivered.
        auditor: draws random numbers, and says which resets are checked.

    Attributes:
        influences: name → influence.
        now: the number of blocks added so far.
    """

    sliced: tuple[str, ...] = ()

    def __init__(
        self,
        structure: Structure,
        parameters: Mapping[str, Tensor],
        state: Tensor,
        gradient: Callable[[str], Tensor],
        auditor: Auditor,
    ) -> None:
        self.structure, self.now = structure, 0
        self._parameters, self._state, self._gradient, self._auditor = parameters, state, gradient, auditor
        self.influences: dict[str, RowInfluence] = {}
        self.adopt()

    # ------------------------------------------------------------------ inspection

    def catch_up(self, name: str) -> None:
        """Nothing is dormant."""

    def influence(self, name: str) -> Tensor | None:
        """Return the influence (B, H, P) of a parameter; None if it reaches no row."""
        influence = self.influences.get(name)
        return checked_dense(name, influence) if influence is not None and influence.parts else None

    def last_updates(self, name: str) -> Tensor:
        """Return the number of closed blocks, LongTensor (B, 1): nothing is dormant."""
        return torch.full((self._state.shape[0], 1), self.now if name in self.influences else -1, device="cpu")

    def n_bytes(self) -> dict[str, int]:
        """Return the bytes held, by part."""
        return {"influence": sum(influence.n_bytes for influence in self.influences.values()), "tree": 0}

    # ------------------------------------------------------------------ blocks

    def begin(self, sparsity: Sparsity, first_influence: Mapping[str, Tensor]) -> None:
        """Prepare for a block: add the influence of learned first states, which must fit.

        Raises:
            AuditError: it does not.
        """
        for name, influence in first_influence.items():
            added_dense(name, self.influences[name], influence)

    def fits(self, first_influence: Mapping[str, Tensor]) -> bool:
        """Whether the influence (B, H, P) of learned first states lies on the rows that the parameters reach."""
        return all(
            name in self.influences and self.influences[name].fits(influence)
            for name, influence in first_influence.items()
        )

    def stage(self, result: RowBlockResult, audit: BlockAudit | None, span: str) -> None:
        """Compute all that a block makes of what is carried; nothing has changed yet.

        Raises:
            NonFiniteError: NaN or infinity in an influence.
            AuditError: what the block's audit found does not agree.
        """
        for influence in self.influences.values():
            influence.stage(result.transition)
        result.add_immediate(self.influences)
        staged = {name: influence.staged() for name, influence in self.influences.items()}
        for name, parts in {} if checks.all_finite(list(chain(*staged.values()))) else staged.items():
            if not checks.all_finite(parts):
                raise NonFiniteError(f"NaN or infinity in the influence of parameter {name!r} after {span}")
        if audit is not None:
            check_rows(self.influences, result, audit.cotangent, audit.immediate, self._auditor.draw)

    def add(self, result: RowBlockResult, audit: BlockAudit | None) -> None:
        """Add a block that was staged.

        Raises:
            AuditError: of an audited block, a gradient is not what it must be.
        """
        check = None if audit is None else DeliveryCheck(self.influences, result, self._gradient)
        for name, influence in self.influences.items():
            if influence.parts:
                self._gradient(name).add_(influence.contract(result.transition.adjoint).sum(dim=0))
            influence.commit()
        for name, gradient in result.gradient.items():
            self._gradient(name).add_(gradient)
        if check is not None:
            check.check()
        self.now += 1

    def count_block(self) -> None:
        """Take note of a block that all influences have been brought up to date with."""
        self.now += 1

    def accumulate_all(self) -> None:
        """Nothing is dormant, so that no gradient is pending."""

    def contract(self, adjoints: Tensor, per_sample: bool) -> dict[str, Tensor]:
        """Return name → ``Σ_b δ_b S_b`` for L adjoints of the present state, and change nothing.

        Args:
            adjoints: (L, B, H).
            per_sample: keep the samples apart.

        Returns:
            Name → (L, B, *shape) if ``per_sample``, else (L, 1, *shape).

        Cost:
            A product (1 × w) @ (w × P) per sample and loss; in groups that others feed, (1 × H) @ (H × P).
        """
        by_loss = [self.structure.split(adjoint) for adjoint in adjoints]
        contracted = {}
        for name, parameter in self._parameters.items():
            influence = self.influences.get(name)
            if influence is None:
                contracted[name] = adjoints.new_zeros(*adjoints.shape[:2], *parameter.shape)
            else:
                contracted[name] = torch.stack([influence.contract(groups) for groups in by_loss])
            if not per_sample:
                contracted[name] = contracted[name].sum(dim=1, keepdim=True)
        return contracted

    # ------------------------------------------------------------------ resets and changes

    def clear(self, samples: Tensor, discard: bool) -> None:
        """Clear the influence of samples, Boolean (B,).

        Raises:
            AuditError: of a reset that is checked, influence of these samples is left, or that of others has changed.
        """
        due = bool(self.influences) and self._auditor.is_reset_due(not bool(samples.all()))
        check = RowResetCheck(self.influences, samples, self._auditor.draw) if due else None
        for influence in self.influences.values():
            influence.clear_samples(samples)
        if check is not None:
            check.check()

    def adopt(self) -> None:
        """Go on with the present parameters: the influence of those that are gone is dropped, that of new ones zero."""
        former, size = self.influences, self._state.shape[0]
        self.influences = {
            name: former[name] if name in former else RowInfluence(self.structure, reach, size, self._state)
            for name, reach in self.structure.parameters.items()
            if name in self._parameters
        }

    def bring_up_to_date(self) -> None:
        """Nothing is dormant."""

    def dense(self) -> dict[str, Tensor]:
        """Return the influence (B, H, P) of every parameter that reaches a row.

        Raises:
            AuditError: it is not that on the rows.
        """
        return {name: checked_dense(name, influence) for name, influence in self.influences.items() if influence.parts}

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return all that is carried, as copied tensors, numbers and containers of these."""
        rows = {name: influence.state_dict() for name, influence in self.influences.items()}
        return {"structure": self.structure.state_dict(), "rows": rows, "now": self.now}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, into an object of the same structure.

        Raises:
            ConfigError: it is damaged, or was taken of other parameters.
        """
        if saved["rows"].keys() != self.influences.keys() or type(saved["now"]) is not int or saved["now"] < 0:
            raise ConfigError("the saved influences are not those of this learner's parameters")
        for name, influence in self.influences.items():
            influence.load_state_dict(saved["rows"][name])
        self.now = saved["now"]
