"""Exact RTRL in blocks of steps, with dormant slices brought up to date lazily."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtrl._engine import checks, losses
from rtrl._engine.block import BlockResult
from rtrl._engine.input_gradient import InputDelivery
from rtrl._engine.linearizer import Linearizer
from rtrl._engine.newest_step import pull_back
from rtrl._engine.one_step import Trial
from rtrl._engine.recorded import RecordedStep, reached_states
from rtrl._engine.row_step import RowTrial
from rtrl._engine.slot_block import SlotBlockResult
from rtrl._engine.surroundings import check_surroundings
from rtrl._influence.structure import Structure
from rtrl._utils import pytrees, validation
from rtrl._utils.formatting import first_line
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import RealForms, as_real
from rtrl._utils.stack_level import users_level
from rtrl.cells.protocol import Sparsity
from rtrl.errors import AuditError, ConfigError, NonFiniteError, PerformanceWarning
from rtrl.learners.audit import AuditMode, Auditor, Audits, Result
from rtrl.learners.base import Learner
from rtrl.learners.block_choice import chosen_block
from rtrl.learners.carried import CarriedInfluence
from rtrl.learners.carried_rows import CarriedRows
from rtrl.learners.carried_slots import CarriedSlots, by_slot
from rtrl.learners.closing import BlockCloser, Carried, span_of
from rtrl.learners.exclusive import exclusive
from rtrl.learners.single_steps import SingleSteps
from rtrl.learners.skipping import OnNonFinite, SkippingLearner
from rtrl.learners.state import LearnerState
from rtrl.learners.witness import YOURS_IS_RIGHT


class BlockRTRL(SkippingLearner):
    """Carry exact gradients of a recurrent cell forward in memory that does not grow with the number of steps.

    A dormant slice of a parameter is left as it is. The ``(Φ, v)`` of the blocks since its last update are kept in a
    segment tree until it is active again, a gradient is requested, or the window passes.

    Equation:
        Over blocks of steps, ``S ← Φ S + Σ_τ C_τ B_τ`` and ``dL/dθ = Σ_blocks ( v S + gradient inside the block )``,
        where S is the influence ``∂h/∂θ`` at the block's start, ``Φ`` the product of its dynamics Jacobians, ``C_τ``
        its suffix products and v its adjoint. ``block=1`` is textbook RTRL, ``block ≥ T`` is BPTT.

    Law:
        Exact for every stream, block and window and any losses, resets and deliveries.

    Args:
        cell: a ``torch.nn.Module`` with ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``; see
            ``rtrl.cells.protocol``.
        batch_size: B, the number of samples; each sample is a stream of its own.
        block: the number of steps that are processed together; about H is cheapest for a dense cell. With ``"auto"``,
            ``rtrl.costs.choose_block`` chooses; ``learner.block`` is the number.
        window: the number of blocks that the tree holds. It bounds memory, never exactness.
        lazy: False updates every slice at every block and keeps no tree.
        input_grad: None refuses an x that requires grad. ``"block"`` takes it, and adds to its gradient, when the block
            closes, what the losses inside the block give: exact for these, with nothing of later blocks, as if the next
            block began with a constant. What computes x learns by it, truncated at the block.
        state: (B, n, ...), the first state, a constant. By default ``cell.init_state(batch_size)``, which may depend on
            parameters: their influence then begins as ``∂h₀/∂θ``.
        audit: which blocks are checked against plain autograd of the cell, unrolled step by step: "first" the first one
            of each kind; a number n every n-th one as well; "off" none.
        structure: "find" looks at the first block which entries of the state depend on which. Where they form
            independent rows, the influence is kept on the rows that each parameter reaches; every later block is held
            against what was found. "off" keeps it on the whole state. What ``find_structure`` of another learner of
            this cell returned is taken without looking, and held against every block.
        on_nonfinite: "raise" raises a ``NonFiniteError`` at NaN and infinity. "skip" goes on as if the step had not
            been taken: with NaN or infinity in x, y, the next state or a loss given to ``backward``, this one step
            (all of an ``unroll``); in what is found when a block closes, all of its steps, since nothing says
            which of them it was. ``skipped_steps`` counts them. What their losses gave at once to tensors other than y
            stays.

    Attributes:
        block: the number of steps that are processed together.
        window: the number of blocks that the tree holds.
        lazy: whether dormant slices are left as they are.
        structure: the structure of the cell that is used; None before the first block, and if there is none.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state;
            or ``structure`` is that of another cell.
        ShapeError: the first state has the wrong shape, dtype or device.

    Cost:
        A block of m steps, for a dense cell: ``H·P·(H + m)`` multiply-adds for the influence and ``m·H³`` for the
        products. Bytes held: see ``retained_bytes``, mainly the ``B·H·P_active`` numbers of the influence. For
        independent rows of w entries: ``w + 2`` backward passes, ``m·w·P + w²·P`` multiply-adds, and twice ``B·w·P``
        numbers; in groups of rows that others feed, H in place of one w. A ``sync`` adds, for each group of slices
        last active in the same block, O(log window) row-vector products and one product
        (1 × H) @ (H × p) per slice; it does not move dormant influences.

    Source:
        Williams and Zipser (1989), Neural Computation 1(2), for RTRL; Schmidhuber (1992), Neural Computation 4(2), for
        blocks.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.RecurrentMoE(3, 1, d_model=4, n_slots=3, n_experts=4, topk=1)
        >>> learner = rtrl.BlockRTRL(cell, batch_size=2, block=4)
        >>> for _ in range(10):
        ...     y = learner.step(torch.ones(2, 3))
        ...     learner.backward(y.square().sum())
        >>> learner.sync()
        >>> cell.head.weight.grad.shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        cell: nn.Module,
        batch_size: int,
        *,
        block: int | Literal["auto"] = 1,
        window: int = 64,
        lazy: bool = True,
        input_grad: Literal["block"] | None = None,
        state: Tensor | None = None,
        audit: AuditMode = 1000,
        structure: Literal["find", "off"] | Structure = "find",
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        if not isinstance(structure, Structure):
            validation.choice("structure", structure, ["find", "off"])
        validation.choice("input_grad", input_grad, [None, "block"])
        validation.choice("on_nonfinite", on_nonfinite, ["raise", "skip"])
        super().__init__(cell, batch_size, state=state)
        self.on_nonfinite, self.skipped_steps = on_nonfinite, 0
        self._keeps_x = input_grad is not None
        self._auditor = Auditor(audit, self.cell, self._parameters)
        if block == "auto":
            block = chosen_block(cell, batch_size, state)
        self.block, self.window = validation.integer("block", block), validation.integer("window", window)
        self.lazy = bool(lazy)
        self._finds_structure = structure != "off"
        self._known_structure = self._own_structure(structure) if isinstance(structure, Structure) else None
        self._prepare()
        self._processed = 0  # how many steps have been
        by_slots = self._linearizer.goes_by_slot(self._state)
        self._carried: Carried = self._empty_slots(self._state) if by_slots else self._empty_carried(self._state)

    _carries: type[CarriedInfluence] = CarriedInfluence

    def _empty_carried(self, state: Tensor, now: int = 0) -> CarriedInfluence:
        """What is carried before the first step, or after ``now`` blocks."""
        learner = RealForms(self._parameters), state, self._gradient_of, self._auditor
        return self._carries(*learner, block=self.block, window=self.window, lazy=self.lazy, now=now)

    def _empty_slots(self, state: Tensor) -> CarriedSlots:
        """What is carried before the first step where each slot is carried by itself."""
        return CarriedSlots(self._empty_carried(by_slot(state)), self.batch_size)

    def _own_structure(self, structure: Structure) -> Structure:
        """A structure, checked to be one of this cell's state and parameters.

        Raises:
            ConfigError: it is not.
        """
        shapes = {name: p.shape for name, p in RealForms(self._parameters).items()}
        try:
            checked = Structure.from_state_dict(structure.state_dict(), self._state[0].numel(), shapes)
        except ConfigError as error:
            raise ConfigError(
                "structure is that of another cell; pass what find_structure() of a learner of this cell returned, or "
                '"find"'
            ) from error
        return checked.to(self._state.device)

    def _prepare(self) -> None:
        """Make what depends on which parameters are trainable, and on the state's dtype."""
        self._linearizer = Linearizer(self.cell, self._parameters, self._finds_structure)
        self._auditor.attach(self._parameters, self._linearizer)
        self._single = SingleSteps(self.cell, self._parameters)
        self._closer = BlockCloser(self._linearizer, self._parameters, self._state, self._known_structure)

    # ------------------------------------------------------------------ inspection

    @property
    def audits(self) -> Audits:
        """The audits made so far; see the argument ``audit``."""
        return self._auditor.audits

    @property
    def structure(self) -> Structure | None:
        """The structure of the cell that is used; None before the first block, and if there is none worth having."""
        return self._carried.structure if isinstance(self._carried, CarriedRows) else None

    @exclusive
    @torch.inference_mode(False)
    def find_structure(self) -> Structure | None:
        """Return the structure that the cell shows in the open steps, and change nothing.

        Returns:
            The structure; None if there is none worth having, if no step is open, and from a learner that does not
            look for any.

        Raises:
            CellError: see ``sync``.

        Cost:
            H backward passes, in a batch, over four samples, at one to sixteen points.
        """
        self._check_intact()
        if not self._open_steps:
            return None
        with torch.enable_grad():
            return self._linearizer.find_structure(self._open_steps, self._reached)

    @exclusive
    @torch.inference_mode(False)
    def influence(self, name: str) -> Tensor:
        """Return the influence ``∂h/∂θ`` of one parameter on the present state.

        Closes the open block, as ``sync`` does, and brings every slice of the parameter up to date.

        Args:
            name: a trainable parameter of the cell.

        Returns:
            (B, H, P), P in the parameter's own order.

        Raises:
            ConfigError: no trainable parameter has this name.
            RTRLError: the open block cannot be closed; see ``sync``.

        Cost:
            The update of every dormant slice of the parameter, and B·H·P numbers.
        """
        self._close_for(name)
        self._damage = f"the influence of parameter {name!r} could not be brought up to date"
        self._carried.catch_up(name)
        self._damage = None
        carried = self._carried.influence(name)
        value = self._first_influence_of(name)
        if carried is not None:
            value += carried
        if not checks.finite(value):
            raise NonFiniteError(
                f"NaN or infinity in the influence of parameter {name!r} on the state after step "
                f"{self._steps_taken - 1}"
            )
        return value

    def last_updates(self, name: str) -> Tensor:
        """Return the number of closed blocks at the last update of each slice's influence.

        A slice is dormant if that is less than the number of closed blocks so far.

        Args:
            name: a trainable parameter of the cell.

        Returns:
            LongTensor (B, slices) on the CPU, -1 for a slice that has never been active since the last reset of its
            sample; one slice if the cell declares none for the parameter.

        Raises:
            ConfigError: no trainable parameter has this name.
        """
        self._check_name(name)
        return self._carried.last_updates(name)

    def _held_bytes(self) -> dict[str, int]:
        """Bytes of the influence, the tree, the open block, and memory that large dense blocks use again."""
        steps, leaves = self._open_steps, [leaf for step in self._open_steps for leaf in step.outputs]
        grads = [grad for step in steps for grad in step.grads if grad is not None]
        x = [step.sources for step in steps]
        return {
            **self._carried.n_bytes(),
            "block": pytrees.n_bytes(
                [
                    leaves,
                    grads,
                    x,
                    [(step.x, step.h, tuple(step.sparsity), step.restarted, step.reached) for step in steps],
                ]
            ),
            "scratch": self._closer.n_bytes + self._single.n_bytes,
        }

    # ------------------------------------------------------------------ blocks

    def _begin_block(self, step: RecordedStep) -> None:
        super()._begin_block(step)
        if isinstance(self._carried, CarriedRows) and not self._carried.fits(self._first_influence):
            self._carried = self._dense_carried()
        if self._first_influence:
            self._damage = "the influence of first states was not added as a whole"
        self._carried.begin(step.sparsity, self._first_influence)
        self._first_influence = {}
        self._damage = None

    def _close(self) -> None:
        try:
            self._close_block()
        except NonFiniteError:
            if self.on_nonfinite == "raise" or self._damage is not None or not self._open_steps:
                raise
            self._skip_block()

    def _close_block(self) -> None:
        if not self._keeps_x or not any(step.sources for step in self._open_steps):
            super()._close()
            return
        self._check_intact()
        self._check_parameters()
        at_inputs = InputDelivery(self.cell, self._open_steps, self._takes_replay)
        try:
            at_inputs.run()
            super()._close()
        except BaseException:
            if self._open_steps or self._damage is not None:  # the block is not closed
                at_inputs.take_back()
            raise

    def _process_at_once(self) -> bool:
        step, carried = self._open_steps[0], self._carried
        if self.block > 1 or self._linearizer.way > 0 or not self._single.takes(step, carried):
            return False
        self._check_none_is_lost(step.number)
        if self._auditor.is_due(step.number, False, step.has_loss, False):
            return False
        check_surroundings()
        gradients = self._single.process(step, self._reached, carried)
        if gradients is None:
            return False
        self._damage = f"step {step.number} was not added as a whole"
        self._single.commit(carried)
        self._wait_for_delivery(gradients)
        self._processed = step.number + 1
        return True

    def _process(self) -> None:
        size, warned = len(self._open_steps), False
        while True:
            steps = self._open_steps[:size]
            try:
                self._add_block(steps, reached_states(self._open_steps, self._reached)[len(steps) - 1])
            except Exception as error:
                reason = self._too_large(error, size)
                if reason is None:
                    raise
            else:
                if len(steps) == len(self._open_steps):
                    return
                self._leave_open(self._open_steps[size:])
                continue
            # Out of the except clause, so that what the block took is free.
            if not warned:
                warned = True
                warnings.warn(
                    f"{span_of(self._open_steps)}: not enough memory to process them at once ({reason}); they are "
                    "processed in smaller pieces. A smaller block takes less memory",
                    PerformanceWarning,
                    stacklevel=users_level(),
                )
            size = (len(steps) + 1) // 2

    def _too_large(self, error: Exception, size: int) -> str | None:
        """Why steps are to be processed in smaller pieces, which gives the same; None if they are not."""
        if size == 1 or self._damage is not None or not is_out_of_memory(error):
            return None
        return None if any(step.sources for step in self._open_steps) else first_line(error)

    def _leave_open(self, steps: list[RecordedStep]) -> None:
        """Go on with these of the open steps, after those before them have been processed."""
        processed = self._open_steps[: -len(steps)]
        losses.close_leaves({id(leaf): (leaf, step.number) for step in processed for leaf in step.leaves}.values())
        restarted, steps[0].restarted = steps[0].restarted, None
        if restarted is not None:
            self._carried.clear(restarted, False)
        self._open_steps, self._damage = steps, None

    def _add_block(self, steps: list[RecordedStep], reached: Tensor) -> None:
        """Process steps, the first ones that are open.

        Args:
            steps: the steps.
            reached: (B, n, ...), the state after them.
        """
        first, newest = steps[0].number, steps[-1].number
        self._check_none_is_lost(first)
        span = span_of(steps)

        def close() -> Result:
            return self._closer.close(steps, reached, self._carried)

        result, audit = close(), None
        if self._auditor.is_due(
            newest, self._linearizer.found_new_kind, bool(result.gradient), result.restarted is not None
        ):
            result, audit = self._auditor.examine(
                result,
                self._linearizer,
                close,
                steps,
                reached,
                self._carried.sliced if isinstance(self._carried, CarriedInfluence) else (),
            )
        carried = self._fitting(result, steps[0])
        trial = self._tried_out(result, carried, audit is not None)
        before = {} if trial is None else {name: grad.clone() for name, grad in self._pending_grads.items()}
        carried.stage(result, audit, span)
        self._damage = f"the block of {span} could not be added"
        self._carried = carried
        carried.add(result, audit)
        if trial is not None:
            self._settle(trial, before, span)
        self._processed = newest + 1

    def _tried_out(self, result: Result, fitting: Carried, audited: bool) -> Trial | RowTrial | None:
        """Process a block of one step in the quicker way, too, before it is added to what is carried."""
        if self.block > 1 or self._linearizer.way > 0:
            return None
        step, skipped = self._open_steps[0], self._linearizer.skipped
        return self._single.try_out(step, self._reached, fitting, result, skipped, audited)

    def _settle(self, trial: Trial | RowTrial, before: dict[str, Tensor], span: str) -> None:
        """Go on with what a step gives in the quicker way, if that is what it gave in the other one.

        Args:
            trial: what was found in the quicker way.
            before: the gradients that were waiting before the step.
            span: the step, for messages.
        """
        gradients = self._single.settle(trial, self._carried)
        if gradients is None:
            warnings.warn(
                f"{span}: the quicker way to process a single step gives another result than the one for blocks. From "
                "now on the learner takes the slower way, which was audited",
                PerformanceWarning,
                stacklevel=users_level(),
            )
        else:
            self._pending_grads = before
            self._wait_for_delivery(gradients)

    def _wait_for_delivery(self, gradients: dict[str, Tensor]) -> None:
        """Add finite gradients, by name, to those that the next delivery takes."""
        if self._pending_grads:
            for name, gradient in gradients.items():
                self._gradient_of(name).add_(gradient)
        else:
            self._pending_grads = self._finite_grads = gradients

    def _check_none_is_lost(self, step: int) -> None:
        """Refuse to go on with a step if those before it have not all been processed."""
        if step != self._processed:
            raise AuditError(f"the learner lost the steps {self._processed} … {step - 1}. {YOURS_IS_RIGHT}")

    def _fitting(self, result: Result, first: RecordedStep) -> Any:
        """What is carried, in the form that a block needs; made beside what there is."""
        if isinstance(result, BlockResult):
            return self._carried if isinstance(self._carried, CarriedInfluence) else self._dense_carried()
        if isinstance(result, SlotBlockResult):
            return self._carried
        if isinstance(self._carried, CarriedRows) and self._carried.structure is result.structure:
            return self._carried
        rows = self._empty_rows(result.structure)
        rows.begin(first.sparsity, self._carried.dense())
        rows.now = self._carried.now
        return rows

    def _empty_rows(self, structure: Structure) -> CarriedRows:
        """What is carried with a structure before the first step."""
        return CarriedRows(structure, RealForms(self._parameters), self._state, self._gradient_of, self._auditor)

    def _dense_carried(self) -> CarriedInfluence:
        """What is carried, without structure."""
        self._damage = "dormant slices could not be brought up to date"
        for name in self._parameters:
            self._carried.catch_up(name)
        self._damage = None
        dense = self._empty_carried(self._state, self._carried.now)
        dense.begin(Sparsity(), self._carried.dense())
        return dense

    def _pull_losses(self, cotangents: Sequence[Tensor], per_sample: bool) -> dict[str, Tensor]:
        steps, parameters = self._open_steps, self._parameters
        pulled = pull_back(self.cell, parameters, steps, self._reached, cotangents, self._takes_replay)
        adjoints = pulled.state
        if per_sample:  # number l·B + b is zero but for sample b
            adjoints = adjoints.unflatten(0, (-1, self.batch_size)).diagonal(dim1=1, dim2=2).transpose(1, 2)
        through_state = self._carried.contract(adjoints, per_sample)
        return {name: value + through_state[name].flatten(0, 1) for name, value in pulled.parameters.items()}

    # ------------------------------------------------------------------ dormant slices

    def _gradient_of(self, name: str) -> Tensor:
        """The buffer that collects the gradient of a parameter, as pairs if that is complex."""
        self._finite_grads = None
        if name not in self._pending_grads:
            self._pending_grads[name] = torch.zeros_like(self._parameters[name])
        return as_real(self._pending_grads[name])

    def _flush(self, dormant: bool) -> None:
        self._check_none_is_lost(self._steps_taken)
        if dormant and self._carried.sliced:
            self._damage = "the gradients of dormant slices could not be accumulated"
            self._carried.accumulate_all()
            self._damage = None

    def _clear(self, samples: Tensor, discard: bool) -> None:
        self._carried.clear(samples, discard)
        self._processed = self._steps_taken

    def _start_clean(self) -> None:
        if isinstance(self._carried, CarriedRows):
            self._carried = self._empty_rows(self._carried.structure)
        elif self._linearizer.goes_by_slot(self._state):
            self._carried = self._empty_slots(self._state)
        else:
            self._carried = self._empty_carried(self._state)
        self._processed = self._steps_taken

    def _adapt(self) -> None:
        self._carried.bring_up_to_date()

    def _adopt(self, before: Mapping[str, int]) -> None:
        self._carried.adopt()
        self._prepare()

    # ------------------------------------------------------------------ saving

    _adaptable = ("block", "window", "lazy")
    _rebuilt = (*Learner._rebuilt, "_linearizer", "_single", "_closer", "_carried")

    def _arguments(self) -> dict[str, Any]:
        return {"block": self.block, "window": self.window, "lazy": self.lazy}

    def _buffers(self) -> dict[str, Any]:
        return {
            **self._carried.state_dict(),
            "structured": self._linearizer.structured,
            "one_step": self._single.state_dict(),
            "skipped_steps": self.skipped_steps,
        }

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        processed = loaded.steps_taken - len(loaded.open_steps)
        if type(loaded.buffers["structured"]) is not bool:
            raise ConfigError("the saved learner does not say whether it found a structure")
        structured = self._finds_structure and loaded.buffers["structured"]
        if "structure" in loaded.buffers:
            shapes = {name: p.shape for name, p in RealForms(self._guard.named).items()}  # frozen ones, too
            structure = Structure.from_state_dict(loaded.buffers["structure"], loaded.state[0].numel(), shapes)
            structure = structure.to(loaded.state.device)
            rows = self._empty_rows(structure)
            rows.load_state_dict(loaded.buffers)
            _check_blocks(rows.now, processed)
            self._linearizer.structured = structured
            return {"_carried": rows, "_processed": processed, "skipped_steps": _count_of(loaded.buffers)}
        slots = "slots" in loaded.buffers
        if slots and loaded.buffers["slots"] != loaded.state.shape[1]:
            raise ConfigError(f"the saved influence is that of {loaded.buffers['slots']!r} slots")
        inner = self._empty_carried(by_slot(loaded.state) if slots else loaded.state)
        inner.load_state_dict(loaded.buffers, loaded.layout["window"])
        _check_blocks(inner.now, processed)
        carried: Carried = CarriedSlots(inner, self.batch_size) if slots else inner
        has_influences, has_history = bool(inner.influences), inner.history is not None
        between = loaded.steps_taken > 0 and not has_history and not loaded.open_steps  # dormant slices up to date
        first_skipped = has_influences and has_history and not loaded.steps_taken
        if not (between or first_skipped) and len({loaded.steps_taken > 0, has_influences, has_history}) != 1:
            raise ConfigError("the parts of the saved learner do not fit together")
        self._linearizer.structured = structured
        single = SingleSteps(self.cell, self._parameters)
        single.load_state_dict(loaded.buffers.get("one_step", []))
        skipped = {"skipped_steps": _count_of(loaded.buffers)}
        return {"_carried": carried, "_single": single, "_processed": processed, **skipped}


def _count_of(buffers: Mapping[str, Any]) -> int:
    """The number of steps that a saved learner skipped."""
    return validation.integer("skipped_steps", buffers.get("skipped_steps", 0), least=0)


def _check_blocks(blocks: int, steps: int) -> None:
    """Refuse a saved learner that closed more blocks than it has processed steps."""
    if blocks > steps:
        raise ConfigError(f"the saved learner has closed {blocks} blocks, but processed {steps} steps")
