"""Exact RTRL in blocks of steps, with dormant slices brought up to date lazily."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.block import BlockResult, close_block, overflowing
from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.input_gradient import delivered_to_inputs
from rtrl._engine.linearizer import Linearizer
from rtrl._engine.recorded import RecordedStep
from rtrl._influence.catch_up import catch_up
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._utils import pytrees, validation
from rtrl.cells.protocol import Sparsity
from rtrl.errors import AuditError, ConfigError, NonFiniteError, SparsityError
from rtrl.learners.audit import AuditMode, Auditor, Audits, BlockAudit
from rtrl.learners.base import Learner
from rtrl.learners.block_choice import chosen_block
from rtrl.learners.state import LearnerState
from rtrl.learners.witness import YOURS_IS_RIGHT, DormantWitness, ResetCheck, StoreCheck


class BlockRTRL(Learner):
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

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.
        ShapeError: the first state has the wrong shape, dtype or device.

    Cost:
        A block of m steps, for a dense cell: ``H·P·(H + m)`` multiply-adds for the influence and ``m·H³`` for the
        products. Bytes held: see ``retained_bytes``, mainly the ``B·H·P_active`` numbers of the influence. A ``sync``
        adds, for each group of slices last active in the same block, O(log window) row-vector products and one product
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
    ) -> None:
        validation.choice("input_grad", input_grad, [None, "block"])
        super().__init__(cell, batch_size, state=state)
        self._keeps_x = input_grad is not None
        self._auditor = Auditor(audit, self.cell, self._parameters)
        self._witness: DormantWitness | None = None
        if block == "auto":
            block = chosen_block(cell, batch_size, state)
        self.block, self.window = validation.integer("block", block), validation.integer("window", window)
        self.lazy = bool(lazy)
        self._prepare()
        self._processed = 0  # how many steps have been
        self._accumulated_until = 0  # the gradients of dormant slices are accumulated for the blocks before this one
        self._influences: dict[str, ParameterInfluence] = {}  # filled at the first step, when the sparsity is known
        self._history: History | None = None

    def _prepare(self) -> None:
        """Make what depends on which parameters are trainable, and on the state's dtype."""
        self._linearizer = Linearizer(self.cell, self._parameters)
        self._auditor.attach(self._parameters, self._linearizer)
        count = sum(p.numel() for p in self._parameters.values())
        self._scratch = ReusableBuffer(count * self._state.numel() * self._state.element_size())  # the influence's size

    # ------------------------------------------------------------------ inspection

    @property
    def audits(self) -> Audits:
        """The audits made so far; see the argument ``audit``."""
        return self._auditor.audits

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
        self._take_first_influence()
        first = self._first_influence_of(name)
        if name not in self._influences:
            return first
        influence = self._influences[name]
        with self._refusing_after_failure(f"the influence of parameter {name!r} could not be brought up to date"):
            rows = influence.active_rows()
            if self._history is not None:
                self._advance({name: rows})
            if self._witness is not None:
                self._witness.check_rows(name, influence, rows)
        value = influence.to_dense() + first
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
        influence = self._influences.get(name)
        if influence is None:
            return torch.full((self.batch_size, 1), -1, device="cpu")
        updates = torch.full((self.batch_size, influence.slices), -1, device="cpu")
        rows = influence.active_rows()
        device_rows = rows.to(influence.values.device)
        updates[influence.sample[device_rows].cpu(), influence.slice[device_rows].cpu()] = influence.last_block[rows]
        return updates

    def _held_bytes(self) -> dict[str, int]:
        """Bytes of the influence, the tree, the open block, and memory that large dense blocks use again."""
        steps, leaves = self._open_steps, [leaf for step in self._open_steps for leaf in step.outputs]
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        x = [step.sources for step in steps]
        return {
            "influence": sum(influence.n_bytes for influence in self._influences.values()),
            "tree": 0 if self._history is None else self._history.n_bytes,
            "block": pytrees.n_bytes([leaves, grads, x, [(step.x, step.h, tuple(step.sparsity)) for step in steps]]),
            "scratch": self._scratch.n_bytes,
        }

    # ------------------------------------------------------------------ blocks

    def _begin_block(self, step: RecordedStep) -> None:
        super()._begin_block(step)
        if self._history is None:
            self._allocate(step.sparsity)
        self._take_first_influence()

    def _allocate(self, sparsity: Sparsity) -> None:
        """Make the stores, now that the first step has shown which parameters come in slices and how much of the state
        a step touches."""
        n = self._state.shape[1]
        sliced = {name for name in sparsity.active if name in self._parameters}
        writes = n if sparsity.writes is None else sparsity.writes.shape[1]
        reads = n if sparsity.reads is None else sparsity.reads.shape[1]
        sliced |= {name for name, influence in self._influences.items() if influence.sliced}
        written, touched = min(n, self.block * writes), min(n, self.block * (reads + writes))
        known = self._influences  # up to date, if parameters were frozen or unfrozen
        self._influences = {
            name: known[name] if name in known else self._empty_influence(name, name in sliced)
            for name in self._parameters
        }
        self._history = History(self.window if self.lazy and sliced else 1, written, touched, self._state)

    def _take_first_influence(self) -> None:
        """Move the influence of learned first states to the stores."""
        if self._first_influence and self._history is not None:
            for name, influence in self._first_influence.items():
                self._influences[name].add_first(influence, self._history.now)
            self._first_influence = {}

    def _empty_influence(self, name: str, sliced: bool) -> ParameterInfluence:
        shape = self._parameters[name].shape
        return ParameterInfluence(shape, sliced, self.batch_size, self._state[0].numel(), self._state)

    def _close(self) -> None:
        if not any(step.sources for step in self._open_steps):
            super()._close()
            return
        self._check_parameters()
        with delivered_to_inputs(self.cell, self._open_steps, self._takes_replay):
            super()._close()

    def _process(self) -> None:
        assert self._history is not None
        first, newest = self._open_steps[0].number, self._open_steps[-1].number
        self._check_none_is_lost(first)
        span = f"steps {first} … {newest}"
        result, audit = self._linearized(span), None
        if self._auditor.is_due(self._linearizer.found_new_kind, bool(result.gradient)):
            result, audit = self._auditor.examine(
                result,
                self._linearizer,
                lambda: self._linearized(span),
                self._open_steps,
                self._state,
                self._sliced(),
            )
        with self._refusing_after_failure(f"the block of {span} could not be added"):
            self._apply(result, audit)
        self._processed = newest + 1

    def _check_none_is_lost(self, step: int) -> None:
        """Refuse to go on with a step if those before it have not all been processed."""
        if step != self._processed:
            raise AuditError(f"the learner lost the steps {self._processed} … {step - 1}. {YOURS_IS_RIGHT}")

    def _apply(self, result: BlockResult, audit: BlockAudit | None) -> None:
        """Add a block to what is carried."""
        assert self._history is not None
        sliced, check = self._sliced(), None
        oldest, now = self._history.next_overwritten, self._history.now
        if oldest is not None:
            held = {name: self._influences[name].active_rows() for name in sliced}
            self._advance(
                {name: rows[self._influences[name].last_block[rows] <= oldest] for name, rows in held.items()}
            )
        self._history.append(result.transition)
        if self._witness is not None:
            self._witness.append(result.transition)
        known = {name: influence.values.shape[0] for name, influence in self._influences.items()}
        active = {name: influence.allocate(result.keys[name], now) for name, influence in self._influences.items()}
        self._advance({name: active[name] if self.lazy else self._influences[name].active_rows() for name in sliced})
        if audit is not None:
            check = StoreCheck(self._influences, result.transition, audit.cotangent, self._auditor.draw)
        before = {} if check is None else {name: self._grad_buffer(name).clone() for name in self._influences}
        for name, influence in self._influences.items():
            if not influence.sliced:  # it is never dormant
                if known[name]:
                    influence.advance(result.transition, self._grad_buffer(name))
                influence.last_block[active[name]] = self._history.now
        if check is not None:
            check.check_advanced({name: (value, self._grad_buffer(name)) for name, value in before.items()}, active)
        result.add_immediate(self._influences, active)
        for name, gradient in result.gradient.items():
            self._grad_buffer(name).add_(gradient)
        if check is not None and audit is not None:
            check.check_added(audit.immediate, active)
            if sliced:
                self._witness = self._witness or DormantWitness(self._state, self._auditor.draw)
                self._witness.follow(self._influences, {name: active[name] for name in sliced})
        elif self._witness is not None and self._witness.age > self.window:
            self._witness = None  # what was dormant has left the window meanwhile, and was brought up to date
        elif self._witness is not None:
            for name in sliced:
                self._witness.forget(name, active[name])

    @contextmanager
    def _refusing_after_failure(self, what: str) -> Iterator[None]:
        """Refuse all that follows if an error leaves what is carried half changed."""
        try:
            yield
        except BaseException as error:
            self._damage = (
                f"{what} ({type(error).__name__}: {error}), and what the learner carries was left half changed. Load "
                "a saved learner, or start again by reset(discard=True)"
            )
            raise

    def _linearized(self, span: str) -> BlockResult:
        """Linearise the open steps; nothing is changed."""
        with torch.enable_grad():
            groups = self._linearizer(self._open_steps, self._state)
        try:
            result = close_block(groups, self._state, self._parameters, self._sliced(), self._scratch)
        except SparsityError as error:
            raise SparsityError(f"{span}: {error}") from error
        del groups  # and with it the graph
        self._check_result(result, span)
        return result

    def _sliced(self) -> list[str]:
        return [name for name, influence in self._influences.items() if influence.sliced]

    def _check_result(self, result: BlockResult, span: str) -> None:
        for what, value in (("Jacobian product", result.transition.jacobian), ("adjoint", result.transition.adjoint)):
            if not checks.finite(value):
                raise NonFiniteError(f"NaN or infinity in the {what} of {span}: the state's dynamics overflow")
        for name, gradient in result.gradient.items():
            if not checks.finite(gradient):
                raise NonFiniteError(f"NaN or infinity in the gradient of parameter {name!r} inside {span}")
        overflown = overflowing(result, self._state, self._parameters, self._sliced())
        if overflown is not None:
            raise NonFiniteError(f"NaN or infinity in the immediate influence of parameter {overflown!r} in {span}")

    # ------------------------------------------------------------------ dormant slices

    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        """Bring rows of influences, by parameter, up to date together, and accumulate their pending gradients."""
        assert self._history is not None
        if not rows:
            return
        self._accumulate(rows)
        catch_up(self._history, [(self._influences[n], r) for n, r in rows.items() if self._influences[n].sliced])
        for name, own in rows.items():
            self._influences[name].last_block[own] = self._history.now
            if self._witness is not None:
                self._witness.check_rows(name, self._influences[name], own)

    def _accumulate(self, rows: Mapping[str, Tensor]) -> None:
        """Accumulate the pending gradients of rows of influences, by parameter; where a witness follows them, check
        what was added."""
        witness = self._witness
        if witness is None or self._history is None:
            self._accumulate_pending(rows)
            return
        checked = {}
        for name, own in rows.items():
            slices = witness.slices_of(name, self._influences[name], own, self._history.now)
            if slices.numel():
                checked[name] = slices, witness.along(name, self._grad_buffer(name), slices)
        self._accumulate_pending(rows)
        for name, (slices, before) in checked.items():
            gradient = self._grad_buffer(name)
            witness.check_gradient(name, self._influences[name], rows[name], slices, before, gradient)
        for name, own in rows.items():
            witness.settle(name, own)

    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        """Accumulate the gradients of rows of influences, by parameter, for all blocks since their last update that
        have not been accounted for."""
        assert self._history is not None
        now = self._history.now
        if self._accumulated_until >= now:
            return
        outdated = {name: own[self._influences[name].last_block[own] < now] for name, own in rows.items()}
        outdated = {name: own for name, own in outdated.items() if own.numel()}
        if not outdated:
            return
        times = torch.cat([self._influences[name].last_block[own] for name, own in outdated.items()]).unique()
        pending = self._history.pending_adjoints(times.tolist(), self._accumulated_until)
        adjoints = torch.stack([pending[time] for time in times.tolist()])
        for name, own in outdated.items():
            influence = self._influences[name]
            index = torch.searchsorted(times, influence.last_block[own]).to(adjoints.device)
            sample = influence.sample[own.to(adjoints.device)]
            influence.accumulate_grad(own, adjoints[index, sample], self._grad_buffer(name))

    def _grad_buffer(self, name: str) -> Tensor:
        if name not in self._pending_grads:
            self._pending_grads[name] = torch.zeros_like(self._parameters[name])
        return self._pending_grads[name]

    def _flush(self, dormant: bool) -> None:
        self._check_none_is_lost(self._steps_taken)
        if dormant and self._history is not None:
            with self._refusing_after_failure("the gradients of dormant slices could not be accumulated"):
                self._accumulate({name: self._influences[name].active_rows() for name in self._sliced()})
                self._accumulated_until = self._history.now

    def _clear(self, samples: Tensor, discard: bool) -> None:
        samples = samples.cpu()
        rows = {}
        for name, influence in self._influences.items():
            held = influence.active_rows()
            rows[name] = held[samples[influence.sample[held.to(influence.sample.device)].cpu()]]
        with self._refusing_after_failure("the influence of samples that restart could not be cleared"):
            if self._history is not None and not discard:
                self._accumulate(rows)
            check = None
            if self._influences and self._auditor.is_reset_due(not bool(samples.all())):
                check = ResetCheck(self._influences, samples, self._auditor.draw)
            for name, influence in self._influences.items():
                if self._witness is not None:
                    self._witness.forget(name, rows[name])
                influence.clear_samples(samples)
            if check is not None:
                check.check(self._influences)
        self._processed = self._steps_taken

    def _bring_up_to_date(self) -> None:
        """Bring all dormant slices up to date, and forget the history; the next step begins another one."""
        if self._history is not None:
            self._advance({name: self._influences[name].active_rows() for name in self._sliced()})
            for influence in self._influences.values():
                influence.last_block.zero_()
            self._accumulated_until, self._history, self._witness = 0, None, None

    def _adapt(self) -> None:
        self._bring_up_to_date()

    def _adopt(self, before: Mapping[str, int]) -> None:
        self._influences = {n: influence for n, influence in self._influences.items() if n in self._parameters}
        self._bring_up_to_date()
        self._prepare()

    # ------------------------------------------------------------------ saving

    _adaptable = ("block", "window", "lazy")
    _rebuilt = (*Learner._rebuilt, "_linearizer", "_scratch", "_influences", "_history", "_witness")

    def _arguments(self) -> dict[str, Any]:
        return {"block": self.block, "window": self.window, "lazy": self.lazy}

    def _buffers(self) -> dict[str, Any]:
        return {
            "accumulated_until": self._accumulated_until,
            "influences": {name: influence.state_dict() for name, influence in self._influences.items()},
            "history": None if self._history is None else self._history.state_dict(),
        }

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        saved, accumulated_until = loaded.buffers["influences"], loaded.buffers["accumulated_until"]
        unknown = saved.keys() ^ self._parameters.keys()
        if saved and loaded.buffers["history"] is None:  # influences that have not begun
            unknown -= self._parameters.keys()
        if saved and unknown:
            raise ConfigError("the saved influences are not those of this learner's parameters")
        influences = {name: self._empty_influence(name, held["sliced"]) for name, held in saved.items()}
        for name, influence in influences.items():
            influence.load_state_dict(saved[name])
        history = loaded.buffers["history"]
        if history is not None:
            history = History.from_state_dict(history, self._state)
            sliced = any(influence.sliced for influence in influences.values())
            _check_times(influences, history, loaded.layout["window"] if sliced else 1)
        begun, closed = loaded.steps_taken > 0, 0 if history is None else history.now
        between = begun and history is None and not loaded.open_steps  # see _bring_up_to_date
        fits = between or len({begun, bool(influences), history is not None}) == 1
        if not fits or type(accumulated_until) is not int or not 0 <= accumulated_until <= closed:
            raise ConfigError("the parts of the saved learner do not fit together")
        return {
            "_accumulated_until": accumulated_until,
            "_influences": influences,
            "_history": history,
            "_witness": None,
            "_processed": loaded.steps_taken - len(loaded.open_steps),
        }


def _check_times(influences: Mapping[str, ParameterInfluence], history: History, window: int) -> None:
    """Refuse influences that the blocks of a history cannot bring up to date."""
    if history.capacity not in (1, window):
        raise ConfigError(f"the saved history holds {history.capacity} blocks, not the window of {window}")
    for name, influence in influences.items():
        times = influence.last_block[influence.active_rows()]
        if times.numel() and (int(times.max()) > history.now or int(times.min()) < history.oldest):
            raise ConfigError(f"the saved influence of {name!r} is of a time that the saved history does not reach")
