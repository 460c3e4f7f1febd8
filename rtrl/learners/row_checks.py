"""What audited blocks, resets and conversions do to influences on independent rows, checked from other numbers."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rtrl._engine.row_block import RowBlockResult
from rtrl._influence.rows import RowInfluence
from rtrl.errors import AuditError
from rtrl.learners.witness import YOURS_IS_RIGHT, Draw, check


def check_rows(
    influences: Mapping[str, RowInfluence],
    result: RowBlockResult,
    cotangent: Tensor,
    immediate: Mapping[str, Tensor],
    draw: Draw,
) -> None:
    """Check what an audited block is about to do to influences on independent rows.

    Args:
        influences: name → influence, with what the block makes of it staged.
        result: the block.
        cotangent: (B, H), the cotangent of its last state.
        immediate: name → the contraction of its immediate influence with the cotangent, of the parameter's shape.
        draw: draws normal numbers of a shape, like a tensor.

    Raises:
        AuditError: an influence, or the gradient that it contributes, is not what it must be.
    """
    groups = result.structure.split(cotangent)
    pulled = result.transition.pull_back(groups)
    for name, influence in influences.items():
        before = influence.contract(pulled).sum(dim=0)
        after = influence.contract(groups, staged=True).sum(dim=0)
        right = before + immediate[name]
        scale = max(float(value.abs().max()) if value.numel() else 0.0 for value in (before, after))
        check(f"the influence of parameter {name!r} after the block", after.reshape(1, -1), right.reshape(1, -1), scale)
        if not influence.parts:
            continue
        direction = draw(tuple(influence.reach.shape), cotangent)
        along = [(w * s).sum() for w, s in zip(pulled, influence.project(direction), strict=True)]
        found, expected = (before * direction).sum().reshape(1, 1), torch.stack(along).sum().reshape(1, 1)
        size = (before.abs() * direction.abs()).sum().reshape(1, 1)
        check(f"the gradient that the influence of parameter {name!r} contributes", found, expected, size)


def added_dense(name: str, influence: RowInfluence, added: Tensor) -> None:
    """Add an influence (B, H, P) to one on rows, and check that it arrived where it belongs.

    Raises:
        AuditError: it did not.
    """
    before = influence.to_dense() if influence.parts else torch.zeros_like(added)
    influence.add_dense(added)
    after = influence.to_dense() if influence.parts else torch.zeros_like(added)
    if not torch.equal(before + added, after):
        raise AuditError(f"an influence of parameter {name!r} did not fit the rows that it reaches. {YOURS_IS_RIGHT}")


def checked_dense(name: str, influence: RowInfluence) -> Tensor:
    """Return an influence on rows as (B, H, P), checked along one direction.

    Raises:
        AuditError: it is not that on the rows.
    """
    dense = influence.to_dense()
    direction = torch.linspace(1.0, 2.0, dense.shape[2], dtype=dense.dtype, device=dense.device)
    right = influence.structure.join(influence.project(direction.view(influence.reach.shape)))
    scale = float(dense.abs().max()) if dense.numel() else 0.0
    check(f"the influence of parameter {name!r} on the whole state", dense @ direction, right, scale)
    return dense


class DeliveryCheck:
    """Checks what a block adds to the gradients, from the influence projected on a direction before it.

    Args:
        influences: name → influence, before the block.
        result: the block.
        gradient: gives the buffer that collects the gradient of a parameter.
    """

    def __init__(
        self, influences: Mapping[str, RowInfluence], result: RowBlockResult, gradient: Callable[[str], Tensor]
    ) -> None:
        self._gradient = gradient
        self._expected: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, influence in influences.items():
            buffer = gradient(name)
            direction = torch.linspace(1.0, 2.0, buffer.numel(), dtype=buffer.dtype, device=buffer.device)
            along = (result.gradient[name].flatten() @ direction) if name in result.gradient else buffer.new_zeros(())
            if influence.parts:
                projected = influence.project(direction.view(buffer.shape))
                along = along + sum((v * s).sum() for v, s in zip(result.transition.adjoint, projected, strict=True))
            self._expected[name] = direction, buffer.flatten() @ direction, along

    def check(self) -> None:
        """Check the gradients after the block.

        Raises:
            AuditError: one is not what it must be.
        """
        for name, (direction, before, along) in self._expected.items():
            after = self._gradient(name).flatten()
            size = (after.abs() @ direction).reshape(1, 1) + before.abs() + along.abs()
            change = (after @ direction - before).reshape(1, 1)
            check(f"the gradient of parameter {name!r} after the block", change, along.reshape(1, 1), size)


class RowResetCheck:
    """Checks what a reset does to influences on rows.

    Args:
        influences: name → influence, before the reset.
        samples: Boolean (B,), the samples that restart.
        draw: draws normal numbers of a shape, like a tensor.
    """

    def __init__(self, influences: Mapping[str, RowInfluence], samples: Tensor, draw: Draw) -> None:
        self._influences, self._samples = influences, samples
        self._directions = {
            name: draw(tuple(each.reach.shape), next(iter(each.parts.values())))
            for name, each in influences.items()
            if each.parts
        }
        self._before = {name: influences[name].project(along) for name, along in self._directions.items()}

    def check(self) -> None:
        """Check the influences after the reset.

        Raises:
            AuditError: an influence of a sample that restarts is left, or one of another sample has changed.
        """
        for name, direction in self._directions.items():
            for before, after in zip(self._before[name], self._influences[name].project(direction), strict=True):
                samples = self._samples.to(after.device)
                if bool(after[samples].any()) or not torch.equal(before[~samples], after[~samples]):
                    raise AuditError(
                        f"a reset left influence of parameter {name!r} on a sample that restarted, or changed that of "
                        f"another sample. {YOURS_IS_RIGHT}"
                    )
