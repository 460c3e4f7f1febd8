"""What an audited block and a reset do to the stored influences, checked from numbers taken before and after."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rtrl._engine.block import BlockResult
from rtrl._influence.store import ParameterInfluence
from rtrl.errors import AuditError
from rtrl.learners.witness import YOURS_IS_RIGHT, Draw, apply_block, check, contract, project


class StoreCheck:
    """Checks what an audited block does to the stored influences, from numbers taken before and after.

    Args:
        influences: name → influence.
        block: the block.
        cotangent: (B, H), the cotangent of its last state.
        draw: draws normal numbers of a shape, like a tensor.
    """

    def __init__(
        self, influences: Mapping[str, ParameterInfluence], block: BlockResult, cotangent: Tensor, draw: Draw
    ) -> None:
        self._influences, self._block, self._restarted = influences, block.transition, block.restarted
        self._cotangent = cotangent
        self._directions = {name: draw((i.values.shape[2],), i.values) for name, i in influences.items()}
        self._projected = {name: project(i, self._directions[name]) for name, i in influences.items() if not i.sliced}
        self._contracted: dict[str, Tensor] = {}

    def check_advanced(self, gradients: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, Tensor]) -> None:
        """Check the influences that are kept whole, after the block was applied to them and before anything was added.

        Args:
            gradients: name → the parameter's gradient before and after.
            rows: name → the rows that were active in the block, of all parameters.

        Raises:
            AuditError: an influence or gradient is not what it must be.
        """
        for name, influence in self._influences.items():
            self._contracted[name] = contract(influence, self._cotangent, rows[name])
            value = self._projected.get(name)
            if value is None or not value.shape[0]:
                continue
            before, after = gradients[name]
            witness = value.unsqueeze(1).clone()
            added = apply_block(self._block, witness).sum().reshape(1, 1)
            if self._restarted is not None:
                witness[self._restarted] = 0.0
            found = project(influence, self._directions[name])
            peak = value.abs().amax(dim=1, keepdim=True)
            check(f"the influence of parameter {name!r}", found, witness.squeeze(1), peak)
            direction = self._directions[name]
            change = ((after - before).flatten() @ direction).reshape(1, 1)
            adjoint = self._block.adjoint.abs().sum()
            size = (after.abs().flatten() @ direction.abs() + adjoint * peak.sum()).reshape(1, 1)
            check(f"the gradient that the influence of parameter {name!r} contributes", change, added, size)

    def check_added(self, immediate: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        """Check that the immediate influence was added.

        Args:
            immediate: name → its contraction with the cotangent, of the parameter's shape.
            rows: name → the rows that were active in the block.

        Raises:
            AuditError: it was not, or not where it belongs.
        """
        for name, influence in self._influences.items():
            before = self._contracted[name]
            after = contract(influence, self._cotangent, rows[name])
            right = before + immediate[name].reshape(before.shape)
            scale = max(float(value.abs().max()) if value.numel() else 0.0 for value in (before, after))
            check(f"the influence of parameter {name!r} after the block", after, right, scale)


class ResetCheck:
    """Checks what a reset does to the stored influences.

    Args:
        influences: name → influence, before the reset.
        samples: Boolean (B,), CPU, the samples that restart.
        draw: draws normal numbers of a shape, like a tensor.
    """

    def __init__(self, influences: Mapping[str, ParameterInfluence], samples: Tensor, draw: Draw) -> None:
        self._directions = {name: draw((i.values.shape[2],), i.values) for name, i in influences.items()}
        self._kept, self._before = {}, {}
        for name, influence in influences.items():
            rows = influence.active_rows()
            self._kept[name] = rows[~samples[influence.sample.cpu()[rows]]]
            self._before[name] = project(influence, self._directions[name])

    def check(self, influences: Mapping[str, ParameterInfluence]) -> None:
        """Check the influences after the reset.

        Raises:
            AuditError: an influence of a sample that restarts is left, or one of another sample has changed.
        """
        for name, influence in influences.items():
            rows, kept = influence.active_rows(), self._kept[name]
            here = kept.to(influence.values.device)
            after = project(influence, self._directions[name])
            if not torch.equal(rows, kept) or not torch.equal(after[here], self._before[name][here]):
                raise AuditError(
                    f"a reset left influence of parameter {name!r} on a sample that restarted, or changed that of "
                    f"another sample. {YOURS_IS_RIGHT}"
                )
