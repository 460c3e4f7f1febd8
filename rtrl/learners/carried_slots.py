"""What a learner carries from block to block where the slots of the state are independent."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from rtrl._engine.slot_block import SlotBlockResult
from rtrl._influence.store import ParameterInfluence
from rtrl.cells.protocol import Sparsity
from rtrl.learners.audit import BlockAudit
from rtrl.learners.carried import CarriedInfluence


class CarriedSlots:
    """The influence of every parameter on each slot by itself: slot i of sample b is carried as the sample ``b·n + i``.

    Args:
        carried: carries influences over a state (B·n, 1, d).
        batch_size: B.

    Attributes:
        carried: see above.
    """

    def __init__(self, carried: CarriedInfluence, batch_size: int) -> None:
        self.carried, self._size = carried, batch_size

    # ------------------------------------------------------------------ inspection

    @property
    def sliced(self) -> list[str]:
        """The parameters whose influence is kept slice by slice."""
        return self.carried.sliced

    @property
    def influences(self) -> dict[str, ParameterInfluence]:
        """Name → influence over the slots."""
        return self.carried.influences

    @property
    def held(self) -> set[str]:
        """The parameters that have an influence on some slot."""
        return {name for name, influence in self.influences.items() if influence.active_rows().numel()}

    @property
    def now(self) -> int:
        """The number of blocks added so far."""
        return self.carried.now

    @property
    def begun(self) -> bool:
        """Whether there is any influence."""
        return self.carried.begun

    def catch_up(self, name: str) -> None:
        """Bring every slice of a parameter up to date."""
        self.carried.catch_up(name)

    def influence(self, name: str) -> Tensor | None:
        """Return the influence (B, H, P) of a parameter whose slices are up to date; None if there is none yet."""
        influence = self.carried.influence(name)
        return None if influence is None else influence.reshape(self._size, -1, influence.shape[2])

    def last_updates(self, name: str) -> Tensor:
        """Return the number of closed blocks at the last update of each slice on any slot, LongTensor (B, slices)."""
        updates = self.carried.last_updates(name)
        return updates.view(self._size, -1, updates.shape[1]).amax(dim=1)

    def n_bytes(self) -> dict[str, int]:
        """Return the bytes held, by part."""
        return self.carried.n_bytes()

    # ------------------------------------------------------------------ blocks

    def begin(self, sparsity: Sparsity, first_influence: Mapping[str, Tensor]) -> None:
        """Prepare for a block: make the stores if there are none, and add the influence (B, H, P) of learned first
        states."""
        self.carried.begin(Sparsity(active=sparsity.active), {})
        for name, influence in first_influence.items():
            by_slot = influence.reshape(len(self.carried.state), -1, influence.shape[2])
            if bool(by_slot.count_nonzero()):
                self.carried.add_first({name: by_slot})

    def stage(self, result: SlotBlockResult, audit: BlockAudit | None, span: str) -> None:
        """Refuse a block that may make an influence overflow, before it is changed in place."""
        self.carried.stage(result.block, None, span)

    def add(self, result: SlotBlockResult, audit: BlockAudit | None) -> None:
        """Add a block; what its audit found, if it was audited, is checked against what is then carried."""
        if audit is not None:
            audit = replace(audit, cotangent=audit.cotangent.reshape(len(self.carried.state), -1))
        self.carried.add(result.block, audit)

    def count_block(self) -> None:
        """Take note of a block that all influences have been brought up to date with."""
        self.carried.count_block()

    def accumulate_all(self) -> None:
        """Accumulate the pending gradients of all dormant slices, up to the present."""
        self.carried.accumulate_all()

    def contract(self, adjoints: Tensor, per_sample: bool) -> dict[str, Tensor]:
        """Return name → ``Σ_b δ_b S_b`` for L adjoints (L, B, H) of the present state, and change nothing; (L, B,
        *shape) if ``per_sample``, else (L, 1, *shape)."""
        by_slot = adjoints.reshape(len(adjoints), len(self.carried.state), -1)
        contracted = self.carried.contract(by_slot, per_sample)
        if not per_sample:
            return contracted
        return {name: value.unflatten(1, (self._size, -1)).sum(dim=2) for name, value in contracted.items()}

    # ------------------------------------------------------------------ resets and changes

    def clear(self, samples: Tensor, discard: bool) -> None:
        """Clear the influence of samples, Boolean (B,); unless ``discard``, their pending gradients are accumulated
        first."""
        self.carried.clear(samples.repeat_interleave(len(self.carried.state) // self._size), discard)

    def adopt(self) -> None:
        """Go on with the present parameters: the influence of those that are gone is dropped."""
        self.carried.adopt()

    def bring_up_to_date(self) -> None:
        """Bring all dormant slices up to date, and forget the history; the next step begins another one."""
        self.carried.bring_up_to_date()

    def dense(self) -> dict[str, Tensor]:
        """Return the influence (B, H, P) of every parameter that has one; every slice must be up to date."""
        found = {name: self.influence(name) for name in self.held}
        return {name: influence for name, influence in found.items() if influence is not None}

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return all that is carried, as copied tensors, numbers and containers of these."""
        return {**self.carried.state_dict(), "slots": len(self.carried.state) // self._size}


def by_slot(state: Tensor) -> Tensor:
    """View a state (B, n, ...) as one of B·n samples of one row, (B·n, 1, d)."""
    return state.reshape(state.shape[0] * state.shape[1], 1, -1)
