"""The base class of all learners: everything that does not depend on how a gradient is computed."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, losses
from rtrl._engine import step as forward_step
from rtrl._engine.first_influence import check_constant, first_influence, replace_samples
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._engine.parameter_hooks import Delivery
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.sequence import count_steps, take_sequence
from rtrl._engine.surroundings import linearizing
from rtrl._utils import pytrees, validation
from rtrl._utils.real_pairs import as_real
from rtrl.cells.complex_state import RealState
from rtrl.cells.protocol import Cell, Sparsity, first_state, takes_replay
from rtrl.cells.supported import check_supported, original
from rtrl.errors import ConfigError, NonFiniteError, ShapeError
from rtrl.learners.exclusive import exclusive
from rtrl.learners.newest_step import NewestStepQueries
from rtrl.learners.portable import PortableLearner


class Learner(NewestStepQueries, PortableLearner):
    """Take a stream step by step, collect the losses, and deliver gradients to the ``.grad`` of the parameters.

    A learning rule is a subclass. It implements ``_process`` (process the open steps, which take no more losses), and
    as needed ``_flush`` (accumulate gradients before a delivery), ``_clear`` (forget samples that restart),
    ``_buffers`` with ``_load_buffers`` (what a saved learner contains beside the common part) and ``_held_bytes``.

    Args:
        cell: a ``torch.nn.Module`` with ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``; see
            ``rtrl.cells.protocol``.
        batch_size: B, the number of samples; each sample is a stream of its own.
        state: (B, n, ...), the first state, a constant. By default ``cell.init_state(batch_size)``, which may depend on
            parameters: they get its gradient.

    Attributes:
        cell: the cell; the original of a module that ``torch.compile`` made, which takes the steps itself. A cell with
            a complex state is wrapped in ``rtrl.cells.RealState``, and its own parameters are used.
        batch_size: B.
        block: the number of steps that are processed together; 1 unless the learner says otherwise.

    Raises:
        ConfigError: ``batch_size`` is not a positive integer, or the cell has no trainable parameter or no first state,
            or cannot be linearised (a lazy parameter, a scripted part, a sparse embedding).
        ShapeError: the first state has the wrong shape, dtype or device.
    """

    def __init__(self, cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> None:
        validation.integer("batch_size", batch_size)
        if not isinstance(cell, nn.Module):
            raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
        check_supported(cell)
        self._stepping = cell  # takes the steps, compiled as it may be; all else is done with the module as written
        self.cell, self.batch_size = original(cell), batch_size
        cell = self.cell
        self._guard = ParameterGuard(cell, self._guards_values)
        self._parameters = self._guard.parameters
        self._takes_replay = takes_replay(cell)
        self._state, self._first_influence = self._start(state)
        self._steps_taken = 0
        self._open_steps, self._seen_losses, self._restarting = [], [], None
        self._pending_grads, self._damage = {}, None

    # ------------------------------------------------------------------ steps and losses

    @property
    def state(self) -> Tensor:
        """The present state (B, n, ...), a copy without a graph."""
        copy = self._state.clone()
        return torch.view_as_complex(copy) if isinstance(self.cell, RealState) else copy

    @property
    def steps_taken(self) -> int:
        """The number of steps since the learner was made."""
        return self._steps_taken

    @property
    def room(self) -> int:
        """The most steps that ``unroll`` takes now: those left of the open block, or all of the next one."""
        return self.block - len(self._open_steps) % self.block

    @property
    def at_block_end(self) -> bool:
        """Whether the open block is full: the natural moment to ``sync``."""
        return len(self._open_steps) >= self.block

    @exclusive
    def step(self, x: Any, *, replay: Sparsity | None = None) -> Any:
        """Take one step and return ``y`` without a graph: its real and complex tensors are leaves that require grad.

        Args:
            x: the input, a tensor (B, ...) or a pytree of such tensors.
            replay: choices that a routing cell must make instead of its own.

        Returns:
            y as the cell returns it. A loss on it may be added by ``backward``, or by its own ``loss.backward()``,
            until the block closes.

        Raises:
            ConfigError: x requires grad, where gradients are enabled, and the learner has no ``input_grad``.
            ShapeError: x has the wrong batch, dtype or device, or the cell does not take it.
            CellError: the cell breaks its contract.
            SparsityError: what the cell declares is malformed, or it writes more than it declares.
            NonFiniteError: NaN or infinity in x, y or the next state.
            ParameterChangedError: the cell has other trainable parameters than before, or, in a learner that works in
                blocks, a parameter changed inside the open block; call ``sync()`` before changing parameters. Nothing
                has changed when one of these errors is raised.

        Cost:
            One forward pass without a graph; at the first step of a new block, the processing of the last block.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self.step(x, replay=replay)
        return self._take_step(x, replay) if self.on_nonfinite == "raise" else self._step_or_skip(x, replay)

    def _step_or_skip(self, x: Any, replay: Sparsity | None) -> Any:
        """Take a step; one with NaN or infinity is skipped, by learners that do that."""
        return self._take_step(x, replay)

    def _take_step(self, x: Any, replay: Sparsity | None) -> Any:
        if self._damage is not None:
            self._check_intact()
        self._check_parameters()
        named, number = self._guard.named, self._steps_taken
        if replay is not None:
            forward_step.check_replay(replay, self._takes_replay, self._state, named)
        first = number == 0
        taken, y, h_next = forward_step.take(
            self._stepping, x, self._state, replay, number, first, named, self._keeps_x
        )
        self._record([taken], h_next)
        return y

    @exclusive
    def unroll(self, xs: Any) -> Any:
        """Take m steps at once and return their y, stacked: what m calls of ``step`` do, at fewer launches.

        Equation:
            States, y, gradients and all that is recorded are those of ``step``, bit for bit. With a cell that has an
            ``unroll`` of its own (``rtrl.cells.HasUnroll``; ``from_torch`` of ``nn.RNNCell`` and ``nn.GRUCell`` has),
            they are equal up to rounding.

        Args:
            xs: the inputs, a tensor (m, B, ...) or a pytree of such tensors. m is at most what is left of the open
                block; where that is full, it closes first, and m is at most ``block``.

        Returns:
            y as the cell returns it, each tensor (m, B, ...), its real and complex ones leaves that require grad. A
            loss on any of them may be added until the block closes.

        Raises:
            ConfigError: m is larger than that; or x requires grad, and the learner has no ``input_grad``.
            ShapeError: the tensors of xs do not have one m; or as for ``step``.
            CellError: the cell breaks its contract, or y has not the same form at every step.
            RTRLError: as for ``step``. Nothing has changed then.

        Cost:
            The forward passes of m steps without a graph; one check of all values, one copy of xs.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self.unroll(xs)
        return self._take_steps(xs) if self.on_nonfinite == "raise" else self._steps_or_skip(xs)

    def _steps_or_skip(self, xs: Any) -> Any:
        """See ``_step_or_skip``."""
        return self._take_steps(xs)

    def _take_steps(self, xs: Any) -> Any:
        self._check_intact()
        self._check_parameters()
        steps = count_steps(xs)
        room = self.block - len(self._open_steps) or self.block
        if steps > room:
            raise ConfigError(
                f"unroll was given {steps} steps, but the open block takes {room} more of block={self.block}; pass at "
                "most these, or make a learner with larger blocks"
            )
        taken, ys, h_next = take_sequence(
            self._stepping, xs, self._state, self._steps_taken, self._guard.named, self._keeps_x
        )
        self._record(taken, h_next)
        return ys

    def _record(self, taken: list[RecordedStep], h_next: Tensor) -> None:
        """Add steps to the open block; a full one closes first."""
        if taken[0].sources:
            losses.check_no_feedback([s for step in taken for s in step.sources], self._open_steps, taken[0].number)
        if len(self._open_steps) >= self.block:
            self._close()
            if self._pending_grads:
                self._guard.optimizers.check_idle()
        if not self._open_steps:
            if self._guard.toggled:
                self._adopt_parameters()
            self._begin_block(taken[0])
        self._damage = "a step was not recorded as a whole"
        if self._restarting is not None:
            taken[0].restarted, self._restarting = self._restarting, None
        self._open_steps += taken
        self._state = h_next
        self._steps_taken += len(taken)
        self._seen_losses = []
        self._damage = None

    @exclusive
    def backward(self, loss: Tensor) -> None:
        """Add a loss of the newest step; several losses of a step are summed.

        Equation:
            Adds ∂loss/∂y to what the step carries back through time. Everything else that the loss depends on gets its
            gradient at once, as by ``loss.backward()``; a hook on a parameter fires then, and once more at ``sync``.

        Args:
            loss: a scalar tensor computed from what the last ``step`` returned.

        Raises:
            LossError: the loss is not a scalar that depends on this step's y, or was added before.
            NonFiniteError: NaN or infinity in the loss or its gradient. No ``.grad`` has changed.

        Cost:
            The loss's own backward pass.
        """
        if self.on_nonfinite == "raise":
            self._add_loss(loss)
        else:
            self._add_or_skip(loss)

    def _add_or_skip(self, loss: Tensor) -> None:
        """See ``_step_or_skip``."""
        self._add_loss(loss)

    def _add_loss(self, loss: Tensor) -> None:
        self._check_intact()
        newest = self._open_steps[-1] if self._open_steps else None
        losses.add_loss(loss, newest, self._seen_losses, self._steps_taken - 1)

    # ------------------------------------------------------------------ delivery and reset

    @exclusive
    def sync(self, dormant: bool = True) -> None:
        """Process the open steps, and add the gradient of all losses not yet delivered to every ``.grad``.

        Equation:
            ``θ.grad += Σ_t dℓ_t/dθ`` over the losses added since the last delivery, as far as the learning rule follows
            them. It accumulates, as autograd does. Hooks on a parameter (``register_hook``,
            ``register_post_accumulate_grad_hook``) fire now, once, on this gradient.

        Args:
            dormant: False leaves the pending gradients of dormant slices in the tree of ``BlockRTRL``, for a later
                ``sync``; other learners have no dormant slices and ignore it.

        Raises:
            ParameterChangedError: a parameter was replaced, or changed inside an open block of ``BlockRTRL``.
            CellError: run again, the cell does something else than it did.
            NonFiniteError: NaN or infinity in a Jacobian or gradient. Nothing has been delivered.
            Exception: an error that a hook raises. No ``.grad`` has changed, and the gradient is still to be delivered.

        Cost:
            The processing of the open steps; the learner says what it adds.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self.sync(dormant)
        self._guard.optimizers.idle = 0
        self._close()
        self._flush(dormant)
        pending = {} if self._pending_grads is self._finite_grads else self._pending_grads
        for name, gradient in {} if checks.all_finite([*pending.values()]) else pending.items():
            if not checks.finite(gradient):
                raise NonFiniteError(
                    f"NaN or infinity in the gradient of parameter {name!r} up to step {self._steps_taken - 1}"
                )
        delivery = Delivery(self._parameters, self._pending_grads)
        self._damage = "the gradients were not delivered as a whole"
        try:
            delivery.run()
        except BaseException:
            if not delivery.touched:
                self._damage = None
            raise
        self._pending_grads = {}
        self._damage = None
        self._guard.optimizers.delivered()
        return None

    @exclusive
    @torch.inference_mode(False)
    def reset(
        self,
        samples: Tensor | None = None,
        *,
        state: Tensor | None = None,
        discard: bool = False,
        rows: Tensor | None = None,
    ) -> None:
        """Restart samples: give them a first state, and clear their influence. Accumulated gradients are kept.

        An open block stays open, and its steps accept losses as before: inside it, ``J = 0`` for these samples at the
        next step. Only a first state that depends on parameters closes the block.

        Args:
            samples: Boolean (B,), the samples to restart; None for all.
            state: (B, n, ...), the first states to take, constants. By default ``cell.init_state(batch_size)``, whose
                influence ``∂h₀/∂θ`` is taken at the present parameters.
            discard: give up the open steps and every gradient not yet delivered. This is the way out of a block that
                cannot be processed, because its Jacobian is infinite, for example. For all samples only.
            rows: the former name of ``samples``; deprecated.

        Raises:
            ConfigError: ``discard`` together with some of the samples; or ``state`` requires grad.
            ShapeError: ``samples`` or ``state`` has the wrong shape, dtype or device.
            RTRLError: the open steps cannot be processed, where the block closes; see ``sync``.

        Cost:
            Two copies of the state; where the block closes, the processing of the open steps.
        """
        if rows is not None:
            if samples is not None:
                raise ConfigError("rows is the former name of samples; pass samples alone")
            text = "reset(rows=...) is called reset(samples=...) now; the old name works in this release only"
            warnings.warn(text, DeprecationWarning, stacklevel=4)
            samples = rows
        everyone = torch.ones(self.batch_size, dtype=torch.bool, device=self._state.device)
        samples = everyone if samples is None else samples
        if not isinstance(samples, Tensor) or samples.dtype != torch.bool or samples.shape != everyone.shape:
            kind = f"{samples.dtype} {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
            raise ShapeError(f"samples must be a Boolean tensor of shape ({self.batch_size},), got {kind}")
        if samples.device != self._state.device:
            raise ShapeError(f"samples is on {samples.device}, the state on {self._state.device}; move one of them")
        if discard and not bool(samples.all()):
            raise ConfigError("discard gives up the gradients of all samples; call reset(discard=True) without samples")
        first, influence = self._start(state, samples)
        if discard:
            self._discard(first, influence)
            return
        self._check_intact()
        following = torch.where(samples.reshape(-1, *[1] * (first.ndim - 1)), first, self._state)
        if influence or not self._open_steps:
            self._close()
            combined = replace_samples(self._first_influence, influence, samples)
            self._damage = "samples were not restarted as a whole"
            self._clear(samples, False)
            self._first_influence = combined
        else:
            self._check_parameters()
            newest = self._open_steps[-1]
            restarting = samples.clone() if self._restarting is None else self._restarting | samples
            self._damage = "samples were not restarted as a whole"
            newest.reached = self._state if newest.reached is None else newest.reached
            self._restarting = restarting
        self._state = following
        self._damage = None

    def _discard(self, first: Tensor, influence: dict[str, Tensor]) -> None:
        """Begin again at a first state and its influence by parameter; what was left half changed is dropped."""
        self._guard.check([])
        self._damage = "a reset that discards was not finished"
        self._give_up_block()
        if self._guard.toggled:
            self._guard.adopt()
            self._prepare()
        self._start_clean()
        self._pending_grads, self._finite_grads, self._first_influence = {}, None, influence
        self._state = first
        self._damage = None

    def _start(self, state: Tensor | None, samples: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the first state, checked and copied, and its influence by parameter, if the cell's own depends on any.

        Args:
            state: the state to take; that of the cell by default.
            samples: Boolean (B,), those that restart; None for a new learner.
        """
        check_constant(state)
        like = None if samples is None else self._state
        beside = next(iter(self._parameters.values())) if like is None else like
        with torch.inference_mode(False), torch.enable_grad(), linearizing(self._parameters.values()):
            if state is not None:
                state = self._in_pairs(state)
                if like is None and isinstance(self.cell, Cell):
                    own = self._in_pairs(first_state(self.cell, self.batch_size))
                    like = checks.checked_state(own, self.batch_size, beside)
                return checks.checked_state(state, self.batch_size, beside, like), {}
            first = self._in_pairs(first_state(self.cell, self.batch_size))
            checked = checks.checked_state(first, self.batch_size, beside, like)
            return checked, first_influence(first, self._guard.trainable(), samples) if first.requires_grad else {}

    def _in_pairs(self, state: Any) -> Any:
        """Return a complex first state as pairs of real numbers, and let the cell take such pairs from now on; any
        other state itself."""
        if not isinstance(state, Tensor) or not state.is_complex():
            return state
        if not isinstance(self.cell, RealState):
            if hasattr(self, "_state"):  # a real one: the check of its form refuses this one
                return state
            compiled = self._stepping is not self.cell
            self.cell = RealState(self.cell)
            self._stepping = RealState(self._stepping) if compiled else self.cell
        return as_real(state)

    def retained_bytes(self) -> dict[str, int]:
        """Return the bytes held between steps, by part: gradients not yet delivered, state, and those of the rule."""
        gradient, state = pytrees.n_bytes(self._pending_grads), pytrees.n_bytes((self._state, self._first_influence))
        return {**self._held_bytes(), "gradient": gradient, "state": state}
