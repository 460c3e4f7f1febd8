"""Exact RTRL in blocks of steps, with sleeping slices caught up lazily."""

import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from rtrl._engine import checks, losses
from rtrl._engine import step as forward_step
from rtrl._engine.block import BlockResult, close_block, overflowing
from rtrl._engine.buffers import ReusableBuffer
from rtrl._engine.linearizer import Linearizer
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._engine.recorded import RecordedStep
from rtrl._influence.catch_up import catch_up
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl._utils import pytrees, validation
from rtrl.cells.protocol import Cell, Sparsity, first_state, takes_replay
from rtrl.errors import ConfigError, NonFiniteError, ShapeError, SparsityError
from rtrl.learners import state as saved_state


class BlockRTRL:
    """Exact gradients of a recurrent cell, carried forward in memory that does not grow with the number of steps.

    Equation, over blocks of steps: ``S ← Φ S + Σ_τ C_τ B_τ`` and
    ``dL/dθ = Σ_blocks ( v S + what the block earns inside )``, where S is the influence ``∂h/∂θ`` at the block's start,
    ``Φ`` the product of its dynamics Jacobians, ``C_τ`` its suffix products and v its adjoint. ``block=1`` is textbook
    RTRL, ``block ≥ T`` is BPTT, everything between is exact too. A slice of a parameter that sleeps is left alone; the
    ``(Φ, v)`` of the blocks it sleeps through are kept in a segment tree until it wakes, a gradient is asked for, or
    the window passes.

    Args:
        cell: a ``torch.nn.Module`` with ``forward(x, h) -> (y, h_next)`` or ``(y, h_next, Sparsity)``; see
            ``rtrl.cells.protocol``.
        batch_size: B, the number of samples, each a stream of its own.
        block: how many steps are worked off together; about H is cheapest for a dense cell. ``"auto"`` has
            ``rtrl.costs.choose_block`` choose; ``learner.block`` is the number.
        window: how many blocks the tree holds. It bounds memory, never exactness.
        lazy: False advances every slice at every block and keeps no tree.
        state: (B, n, ...), the first state; ``cell.init_state(batch_size)`` by default.

    Raises:
        ConfigError: a size is not a positive integer, or the cell has no trainable parameter or no first state.

    Cost: a block of m steps, for a dense cell, ``H·P·(H + m)`` multiply-adds for the influence and ``m·H³`` for the
        products; bytes held: see ``retained_bytes``, in the main ``B·H·P_active`` numbers of influence.

    Source: Williams and Zipser (1989), Neural Computation 1(2), for RTRL; Schmidhuber (1992), Neural Computation 4(2),
    for blocks.

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
        state: Tensor | None = None,
    ) -> None:
        sizes = [("batch_size", batch_size), ("block", 1 if block == "auto" else block), ("window", window)]
        for name, size in sizes:
            validation.integer(name, size)
        if not isinstance(cell, nn.Module):
            raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
        if block == "auto":
            from rtrl.costs import choose_block  # it needs what this module is made of

            block = choose_block(cell, batch_size, state=state)
        self.cell, self.batch_size, self.window, self.lazy = cell, batch_size, window, bool(lazy)
        self.block: int = block
        self._guard = ParameterGuard(cell)
        self._parameters = self._guard.parameters
        self._linearizer = Linearizer(cell, self._parameters)
        self._replays = takes_replay(cell)
        parameter = next(iter(self._parameters.values()))
        first = first_state(cell, batch_size) if state is None or isinstance(cell, Cell) else None
        if first is not None:
            first = checks.checked_state(first, batch_size, parameter)
        self._state = checks.checked_state(first if state is None else state, batch_size, parameter, first)
        self._steps: list[RecordedStep] = []
        self._taken = 0  # steps since the beginning
        self._given: list[weakref.ref[Tensor]] = []  # the losses given at the newest step
        self._paid = 0  # sleeping slices have been paid for the blocks before this one
        self._influences: dict[str, ParameterInfluence] = {}  # filled at the first step, when the sparsity is known
        self._history: History | None = None
        count = sum(p.numel() for p in self._parameters.values())
        self._scratch = ReusableBuffer(count * self._state.numel() * self._state.element_size())  # the influence's size
        self._earned: dict[str, Tensor] = {}  # not yet delivered to .grad

    # ------------------------------------------------------------------ going forward

    @property
    def state(self) -> Tensor:
        """The present state (B, n, ...), a copy without a graph."""
        return self._state.clone()

    @property
    def steps_taken(self) -> int:
        """How many steps have been taken since the beginning."""
        return self._taken

    @property
    def at_block_end(self) -> bool:
        """Whether the open block is full: the natural moment to ``sync``."""
        return len(self._steps) >= self.block

    def step(self, x: Any, *, replay: Sparsity | None = None) -> Any:
        """Take one step and return ``y``, cut off from any graph: its floating-point tensors are leaves that require
        grad.

        Args:
            x: the input, a tensor (B, ...) or any tree of such.
            replay: choices that a routing cell is to make instead of its own.

        Returns:
            y as the cell returns it. A loss on it may be given by ``backward``, or by its own ``loss.backward()``,
            until the block closes.

        Raises:
            ShapeError: x has the wrong batch, dtype or device, or the cell does not take it.
            CellError: the cell breaks its contract. SparsityError: what it declares is malformed, or it writes more.
            NonFiniteError: NaN or infinity in x, y or the next state.
            ParameterChangedError: a parameter changed inside the open block; ``sync()`` before changing any.
            Nothing has changed when one of them is raised.

        Cost: one forward pass without a graph; at the first step of a new block, the closing of the last one.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.step(x, replay=replay)
        if not self._guard.unchanged():
            self._guard.check([step.number for step in self._steps])
        if replay is not None:
            forward_step.check_replay(replay, self._replays, self._state, self._guard.named)
        first, named = not self._influences, self._guard.named
        taken, y, h_next = forward_step.take(self.cell, x, self._state, replay, self._taken, first, named)
        if first:
            self._prepare(taken.sparsity)
        if self.at_block_end:
            self._close()
        if not self._steps:
            self._guard.begin()
        self._steps.append(taken)
        self._state = h_next
        self._taken += 1
        self._given = []
        return y

    def backward(self, loss: Tensor) -> None:
        """Give a loss of the newest step; several are summed.

        Equation: adds ∂loss/∂y to what step t will carry back through time; whatever else the loss depends on gets its
        gradient at once, as by ``loss.backward()``.

        Args:
            loss: a scalar tensor computed from what the last ``step`` returned.

        Raises:
            LossError: not a scalar of this step's y, or already given. NonFiniteError: NaN or infinity in the loss or
            its gradient.

        Cost: the loss's own backward pass.
        """
        outputs = self._steps[-1].outputs if self._steps else []
        losses.add_loss(loss, outputs, self._given, self._taken - 1)

    # ------------------------------------------------------------------ looking back

    @torch.inference_mode(False)
    def sync(self, dormant: bool = True) -> None:
        """Close the open block, early if need be, and add to every ``.grad`` what all losses not yet delivered have
        earned.

        Equation: ``θ.grad += Σ_t dℓ_t/dθ`` over the losses given since the last delivery, exactly what BPTT would
        give. It accumulates, as autograd does.

        Args:
            dormant: False leaves what sleeping slices are owed in the tree, for a later ``sync``.

        Raises:
            ParameterChangedError, CellError, SparsityError, NonFiniteError: the open block cannot be linearised;
            nothing has changed.

        Cost: the closing of a block; for each group of slices that fell asleep together, O(log window) row-vector
            products and one product (1 × H) @ (H × p) a slice. Sleeping influences are not moved.
        """
        self._close()
        if self._history is None:
            return
        if dormant:
            self._pay(
                {name: influence.active_rows() for name, influence in self._influences.items() if influence.sliced}
            )
            self._paid = self._history.now
        for name, gradient in self._earned.items():
            if not checks.finite(gradient):
                raise NonFiniteError(
                    f"NaN or infinity in the gradient of parameter {name!r} up to step {self._taken - 1}"
                )
        for name, gradient in self._earned.items():
            parameter = self._parameters[name]
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        self._earned = {}

    @torch.inference_mode(False)
    def influence(self, name: str) -> Tensor:
        """The influence ``∂h/∂θ`` on the present state of one parameter, brought up to date: (B, H, P), P in the
        parameter's own order.

        Closes the open block, as ``sync`` does.

        Raises:
            ConfigError: no trainable parameter has this name. And whatever closing the block raises.

        Cost: catches up every sleeping slice of the parameter; writes out B·H·P numbers.
        """
        if name not in self._parameters:
            raise ConfigError(f"no trainable parameter is called {name!r}; there are {', '.join(self._parameters)}")
        self._close()
        if name not in self._influences:
            return self._state.new_zeros(self.batch_size, self._state[0].numel(), self._parameters[name].numel())
        influence = self._influences[name]
        self._advance({name: influence.active_rows()})
        value = influence.to_dense()
        if not checks.finite(value):
            raise NonFiniteError(
                f"NaN or infinity in the influence of parameter {name!r} on the state after step {self._taken - 1}"
            )
        return value

    @torch.inference_mode(False)
    def reset(self, rows: Tensor | None = None, *, state: Tensor | None = None, discard: bool = False) -> None:
        """Start samples anew in mid-stream: their state, and no influence of what was before. What their losses earned
        so far is kept.

        Args:
            rows: Boolean (B,), the samples to start anew; None for all.
            state: (B, n, ...), where to take their first states from; ``cell.init_state(batch_size)`` by default.
            discard: give up the open block and every gradient not yet delivered: the way out of a block that cannot be
                closed, because its Jacobian is infinite, say. For all samples only.

        Raises:
            ConfigError: ``discard`` together with ``rows``. ShapeError: ``rows`` or ``state`` has the wrong shape,
                dtype or device. And whatever closing the block raises.

        Cost: closes the open block early; pays the sleeping slices of these samples, as ``sync`` does.
        """
        if rows is None:
            rows = torch.ones(self.batch_size, dtype=torch.bool, device=self._state.device)
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or tuple(rows.shape) != (self.batch_size,):
            kind = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ShapeError(f"rows must be a Boolean tensor of shape ({self.batch_size},), got {kind}")
        if rows.device != self._state.device:
            raise ShapeError(f"rows is on {rows.device}, the state on {self._state.device}; move one of them")
        if discard and not bool(rows.all()):
            raise ConfigError("discard gives up the block of all samples; it takes no rows")
        if state is None:
            state = first_state(self.cell, self.batch_size)
        first = checks.checked_state(state, self.batch_size, self._state, self._state)
        if discard:
            self._give_up_block()
        self._close()
        samples = rows.cpu()
        if discard:
            self._earned = {}
        elif self._history is not None:
            held = {name: influence.active_rows() for name, influence in self._influences.items()}
            for name, own in held.items():
                held[name] = own[samples[self._influences[name].sample[own.to(self._state.device)].cpu()]]
            self._pay(held)
        for influence in self._influences.values():
            influence.clear_samples(samples)
        shape = (-1, *[1] * (self._state.ndim - 1))
        self._state = torch.where(rows.reshape(shape), first, self._state)

    def retained_bytes(self) -> dict[str, int]:
        """Bytes held between steps, by part: influence, tree, open block, gradient not yet delivered, state, and
        memory that large dense blocks use again."""
        open_block = [step.x for step in self._steps], [tuple(step.sparsity) for step in self._steps]
        leaves = [leaf for step in self._steps for leaf in step.outputs]
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        states = [step.h for step in self._steps]
        return {
            "influence": sum(i.n_bytes for i in self._influences.values()),
            "tree": 0 if self._history is None else self._history.n_bytes,
            "block": pytrees.n_bytes([open_block, leaves, grads, states]),
            "gradient": pytrees.n_bytes(self._earned),
            "state": pytrees.n_bytes(self._state),
            "scratch": self._scratch.n_bytes,
        }

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit, as tensors, numbers and containers of such; save the cell's
        parameters beside it.

        Losses of a step must be given before it is saved: the ``y`` of steps taken before the save takes no more
        losses after a load.
        """
        return saved_state.save(self)

    @torch.inference_mode(False)
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken, with the same cell, parameters and arguments.

        Raises:
            ConfigError: it was taken of a learner with other arguments or another cell. Nothing has changed then.
        """
        loaded = saved_state.load(self, saved)
        self._give_up_block()
        self._state, self._taken, self._paid, self._steps = loaded.state, loaded.taken, loaded.paid, loaded.steps
        self._influences, self._history, self._earned = loaded.influences, loaded.history, loaded.earned
        self._guard.begin()

    # ------------------------------------------------------------------ the machinery

    def _prepare(self, sparsity: Sparsity) -> None:
        """Lay out the stores, now that the first step has shown which parameters come in slices and how much a step
        touches."""
        n = self._state.shape[1]
        sliced = {name for name in sparsity.active if name in self._parameters}
        writes = n if sparsity.writes is None else sparsity.writes.shape[1]
        reads = n if sparsity.reads is None else sparsity.reads.shape[1]
        rows, cols = min(n, self.block * writes), min(n, self.block * (reads + writes))
        self._influences = {name: self._empty_influence(name, name in sliced) for name in self._parameters}
        self._history = History(self.window if self.lazy and sliced else 1, rows, cols, self._state)

    def _empty_influence(self, name: str, sliced: bool) -> ParameterInfluence:
        shape = self._parameters[name].shape
        return ParameterInfluence(shape, sliced, self.batch_size, self._state[0].numel(), self._state)

    def _give_up_block(self) -> None:
        left = [(TensorWeakRef(leaf), step.number) for step in self._steps for leaf in step.outputs]
        self._steps, self._given = [], []
        losses.close_leaves(left)

    def _close(self) -> None:
        """Work off the open block. Everything that can fail comes before the first change."""
        with torch.no_grad():
            self._close_block()

    def _close_block(self) -> None:
        self._guard.check([step.number for step in self._steps])
        if not self._steps or self._history is None:
            return
        span = f"steps {self._steps[0].number} … {self._steps[-1].number}"
        with torch.enable_grad():
            groups = self._linearizer(self._steps, self._state)
        sliced = [name for name, influence in self._influences.items() if influence.sliced]
        try:
            result = close_block(groups, self._state, self._parameters, sliced, self._scratch)
        except SparsityError as error:
            raise SparsityError(f"{span}: {error}") from error
        del groups  # and with it the graph
        self._check_result(result, span)

        next_overwritten, now = self._history.next_overwritten, self._history.now
        if next_overwritten is not None:
            held = {name: self._influences[name].active_rows() for name in sliced}
            self._advance(
                {name: own[self._influences[name].last_block[own] <= next_overwritten] for name, own in held.items()}
            )
        self._history.append(result.transition)
        known = {name: influence.values.shape[0] for name, influence in self._influences.items()}
        rows = {name: influence.allocate(result.keys[name], now) for name, influence in self._influences.items()}
        self._advance({name: rows[name] if self.lazy else self._influences[name].active_rows() for name in sliced})
        for name, influence in self._influences.items():
            if not influence.sliced:  # it has never slept
                if known[name]:
                    influence.advance(result.transition, self._gradient(name))
                influence.last_block[rows[name]] = self._history.now
        result.add_immediate(self._influences, rows)
        for name, gradient in result.gradient.items():
            self._gradient(name).add_(gradient)
        self._give_up_block()

    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        """Bring rows of influences, by parameter, up to date together, and pay them what they are owed. Parameters kept
        whole never sleep."""
        assert self._history is not None
        if not rows:
            return
        self._pay(rows)
        behind = [(self._influences[name], own) for name, own in rows.items()]
        catch_up(self._history, [(influence, own) for influence, own in behind if influence.sliced])
        for influence, own in behind:
            influence.last_block[own] = self._history.now

    def _pay(self, rows: Mapping[str, Tensor]) -> None:
        """Add to the gradient what rows of influences, by parameter, are owed for the blocks since their clock, as far
        as it is not paid yet."""
        assert self._history is not None
        now = self._history.now
        if self._paid >= now:
            return
        late = {name: own[self._influences[name].last_block[own] < now] for name, own in rows.items()}
        late = {name: own for name, own in late.items() if own.numel()}
        if not late:
            return
        times = torch.cat([self._influences[name].last_block[own] for name, own in late.items()]).unique()
        pending = self._history.pending_adjoints(times.tolist(), self._paid)
        functionals = torch.stack([pending[time] for time in times.tolist()])
        for name, own in late.items():
            influence = self._influences[name]
            place = torch.searchsorted(times, influence.last_block[own]).to(functionals.device)
            sample = influence.sample[own.to(functionals.device)]
            influence.accumulate_grad(own, functionals[place, sample], self._gradient(name))

    def _gradient(self, name: str) -> Tensor:
        if name not in self._earned:
            self._earned[name] = torch.zeros_like(self._parameters[name])
        return self._earned[name]

    def _check_result(self, result: BlockResult, span: str) -> None:
        for what, value in (("Jacobian product", result.transition.jacobian), ("adjoint", result.transition.adjoint)):
            if not checks.finite(value):
                raise NonFiniteError(f"NaN or infinity in the {what} of {span}: the state's dynamics overflow")
        for name, gradient in result.gradient.items():
            if not checks.finite(gradient):
                raise NonFiniteError(f"NaN or infinity in the gradient of parameter {name!r} earned in {span}")
        sliced = [name for name, influence in self._influences.items() if influence.sliced]
        stray = overflowing(result, self._state, self._parameters, sliced)
        if stray is not None:
            raise NonFiniteError(f"NaN or infinity in the influence of parameter {stray!r} born in {span}")
