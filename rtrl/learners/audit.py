"""The audit of a learner: blocks are checked, now and then, against plain autograd of the user's own module."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rtrl._engine.block import BlockResult
from rtrl._engine.linearizer import WAYS, Linearizer
from rtrl._engine.projected import pull_back_result
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.row_block import RowBlockResult
from rtrl._engine.slot_block import SlotBlockResult
from rtrl._engine.unrolled import PulledBlock, pull_back_unrolled
from rtrl._utils import validation
from rtrl._utils.real_pairs import RealForms
from rtrl._utils.stack_level import users_level
from rtrl.errors import AuditError, ConfigError, PerformanceWarning, RTRLError

AuditMode = Literal["first", "off"] | int
"""When blocks are audited."""

Result = BlockResult | RowBlockResult | SlotBlockResult
WITHOUT_STRUCTURE = "without the structure of the state"

_FLOOR = 100  # rounding errors of the largest number of a block: below them, a difference says nothing
_SHAKES = 2
_SPREAD = 100  # how many times the differences that rounding errors make are accepted


@dataclass(frozen=True, slots=True)
class Audits:
    """The audits that a learner has made of itself.

    Attributes:
        count: the number of blocks that were audited.
        worst_error: the largest relative error that was accepted, of the state's or any parameter's gradient.
        fallback: the way in which the cell is linearised since an audit found that a faster one does not fit it; None
            if none did.
    """

    count: int = 0
    worst_error: float = 0.0
    fallback: str | None = None

    def __str__(self) -> str:
        text = f"{self.count} blocks audited, worst relative error {self.worst_error:.1e}"
        return text if self.fallback is None else f"{text}; linearised in a slower way: {self.fallback}"

    def with_one_more(self, error: float, fallback: str | None) -> "Audits":
        """Return what was found, and one more audit with its ``error`` and the ``fallback`` taken since."""
        return Audits(self.count + 1, max(self.worst_error, error), fallback)


_in_this_process = Audits()


def audits_in_this_process() -> Audits:
    """Return the audits of all learners since the process began."""
    return _in_this_process


def _note(error: float) -> None:
    global _in_this_process
    _in_this_process = _in_this_process.with_one_more(error, None)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A difference that rounding errors do not explain.

    Attributes:
        name: the parameter, or "" for the state.
        error: the largest difference, relative to the largest number of the right gradient.
    """

    name: str
    error: float

    def __str__(self) -> str:
        what = f"the gradient of parameter {self.name!r}" if self.name else "the gradient of the block's first state"
        return f"{what} differs by {self.error:.1e} relative to its largest entry"


@dataclass(frozen=True, slots=True)
class BlockAudit:
    """A block that was found to be right, for the checks of what is then done with it.

    Attributes:
        cotangent: (B, H), drawn for its last state.
        immediate: parameter name → ``w Σ_τ C_τ B_τ``.
    """

    cotangent: Tensor
    immediate: dict[str, Tensor]


class Auditor:
    """Decides which blocks are audited, and compares their derivatives with plain autograd of the cell.

    Args:
        mode: "first" audits the first block of each kind; a number n every n-th block as well; "off" none.
        cell: the cell.
        parameters: its trainable parameters.

    Attributes:
        audits: what was found so far.

    Raises:
        ConfigError: the mode is something else.
    """

    def __init__(self, mode: AuditMode, cell: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        if isinstance(mode, str) and mode not in ("first", "off"):
            raise ConfigError(f"audit must be 'first', 'off' or a number of blocks, got {mode!r}")
        self.mode: AuditMode = mode if isinstance(mode, str) else validation.integer("audit", mode)
        self.audits = Audits()
        self._cell, self._parameters = cell, parameters
        self._draws = 0
        self._blocks = self._resets = 0
        self._asked = -1  # the last step of the block that was asked for last
        self._unfinished = False  # a block that is due stays due until it was found to be right
        self._seen_losses = self._seen_restarts = self._seen_reset_of_some = False

    def attach(self, parameters: Mapping[str, nn.Parameter], linearizer: Linearizer) -> None:
        """Go on with other trainable parameters, or those of a copied cell, and in the way found before."""
        self._parameters = parameters
        if self.audits.fallback is not None:
            linearizer.structured = False
            linearizer.way = WAYS.index(self.audits.fallback) if self.audits.fallback in WAYS else 0

    def is_due(self, number: int, new_kind: bool, has_losses: bool, has_restarts: bool) -> bool:
        """Return whether the block that is being closed is to be audited.

        Args:
            number: of the block's last step; a block that is asked for again is not counted again.
            new_kind: whether no block like it was met before.
            has_losses: whether a loss was added inside it.
            has_restarts: whether samples restarted inside it.
        """
        if self.mode == "off":
            return False
        first_losses = has_losses and not self._seen_losses
        first_restarts = has_restarts and not self._seen_restarts
        self._seen_losses |= has_losses
        self._seen_restarts |= has_restarts
        new, self._asked = number != self._asked, number
        self._blocks += new
        every = new and isinstance(self.mode, int) and self._blocks % self.mode == 0
        self._unfinished = self._unfinished or new_kind or first_losses or first_restarts or every
        return self._unfinished

    def is_reset_due(self, some: bool) -> bool:
        """Return whether a reset, of some of the samples or of all, is to be checked; to be asked once per reset."""
        if self.mode == "off":
            return False
        self._resets += 1
        first_of_some = some and not self._seen_reset_of_some
        self._seen_reset_of_some |= some
        return self._resets == 1 or first_of_some or (isinstance(self.mode, int) and self._resets % self.mode == 0)

    def draw(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Draw normal numbers of a shape, with the dtype and device of ``like``."""
        return torch.randn(tuple(shape), generator=self._fresh_generator(), dtype=torch.float64, device="cpu").to(like)

    def _fresh_generator(self) -> torch.Generator:
        """A generator for each use: not the user's, whose random numbers stay as they are, and nothing to save."""
        self._draws += 1
        return torch.Generator().manual_seed(self._draws)

    def examine(
        self,
        result: Result,
        linearizer: Linearizer,
        linearize: Callable[[], Result],
        steps: Sequence[RecordedStep],
        last: Tensor,
        sliced: Sequence[str],
    ) -> tuple[Result, BlockAudit]:
        """Compare a block's derivatives with plain autograd of the cell. If they differ, linearise it in the next way,
        until one agrees.

        Args:
            result: the block.
            linearizer: whose way is changed.
            linearize: linearises the block again.
            steps: its steps.
            last: (B, n, ...), the state that they reached.
            sliced: the parameters whose influence is kept slice by slice.

        Returns:
            The block, linearised in a way that agrees.

        Raises:
            AuditError: no way agrees. The linearizer goes its former way then.

        Cost:
            One forward and one backward pass over the steps, and their graph.
        """
        span = f"steps {steps[0].number} … {steps[-1].number}"
        cotangent = self.draw((last.shape[0], last[0].numel()), last)
        right = pull_back_unrolled(self._cell, self._parameters, steps, last, cotangent)
        former, first_mismatch = (linearizer.structured, linearizer.way), None
        try:
            while True:
                found, immediate = _pulled_back(result, cotangent, RealForms(self._parameters), sliced)
                mismatch, worst = self._compare(found, right, steps, last, cotangent)
                if mismatch is None:
                    break
                first_mismatch = first_mismatch or mismatch
                result = _in_the_next_way(linearizer, linearize, _explanation(first_mismatch, span))
        except BaseException:
            linearizer.structured, linearizer.way = former
            raise
        self._unfinished = False
        fallback = self.audits.fallback
        if first_mismatch is not None:
            fallback = WAYS[linearizer.way] if linearizer.way else WITHOUT_STRUCTURE
        if first_mismatch is not None:
            warnings.warn(
                f"{span}: {first_mismatch}, compared with plain autograd of the cell. From now on the cell is "
                f"linearised in a slower way, which agrees: {fallback}",
                PerformanceWarning,
                stacklevel=users_level(),
            )
        self.audits = self.audits.with_one_more(worst, fallback)
        _note(worst)
        return result, BlockAudit(cotangent, immediate)

    def _compare(
        self,
        found: PulledBlock,
        right: PulledBlock,
        steps: Sequence[RecordedStep],
        last: Tensor,
        cotangent: Tensor,
    ) -> tuple[Mismatch | None, float]:
        """The worst difference that counts, None if there is none; and the largest relative error.

        A difference counts if it is larger than the square root of the dtype's rounding error, and than a hundred
        times what rounding errors of the inputs change.
        """
        eps = torch.finfo(last.dtype).eps
        errors = _errors(found, right)
        scales = {name: _largest(value) for name, value in right.items()}
        floor = _FLOOR * eps * max(scales.values())
        doubts = {name for name, error in errors.items() if not error <= eps**0.5 * scales[name] + floor}
        spread = dict.fromkeys(doubts, 0.0)
        for _ in range(_SHAKES if doubts else 0):
            shaken = pull_back_unrolled(self._cell, self._parameters, steps, last, cotangent, self._fresh_generator())
            changes = _errors(shaken, right)
            spread = {name: max(spread[name], changes[name]) for name in doubts}
        relative = {name: error / max(scales[name], floor, 1e-300) for name, error in errors.items()}
        bad = [name for name in doubts if not errors[name] <= _SPREAD * spread[name]]
        if bad:
            name = max(bad, key=lambda each: (relative[each] != relative[each], relative[each]))
            return Mismatch(name, relative[name]), relative[name]
        return None, max(relative.values())


def _pulled_back(
    result: Result, cotangent: Tensor, parameters: Mapping[str, Tensor], sliced: Sequence[str]
) -> tuple[PulledBlock, dict[str, Tensor]]:
    if not isinstance(result, BlockResult):
        return result.pull_back(cotangent, parameters)
    return pull_back_result(result, cotangent, parameters, sliced)


def _in_the_next_way(linearizer: Linearizer, linearize: Callable[[], Result], message: str) -> Result:
    """Linearise a block in the next way that does not fail.

    Raises:
        AuditError: with this message, if there is none.
    """
    while linearizer.structured or linearizer.way + 1 < len(WAYS):
        if linearizer.structured:
            linearizer.structured = False
        else:
            linearizer.way += 1
        with suppress(RTRLError):
            return linearize()
    raise AuditError(message)


def _errors(found: PulledBlock, right: PulledBlock) -> dict[str, float]:
    theirs = dict(right.items())
    return {name: _largest(value - theirs[name]) for name, value in found.items()}


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def _explanation(mismatch: Mismatch, span: str) -> str:
    """Return the message for a block that no way of linearising gets right."""
    return (
        f"{span}: {mismatch}, compared with plain autograd of the cell, called step by step. No way of linearising the "
        "block agrees, so nothing was delivered. Likely reasons: a backward pass that is not linear or is not the "
        "derivative of its forward (a clamped or hooked gradient, an autograd.Function of one's own); gradients that "
        "depend on the whole batch (Embedding(scale_grad_by_freq=True), batch normalisation); a state of the cell "
        "outside h; a parameter that changes while the block is open. Mend the cell, or give the block up by "
        "reset(discard=True)"
    )
