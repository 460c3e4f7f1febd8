"""What a learner carries from block to block: influences, and for dormant slices the history of the blocks."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from rtrl._engine.block import BlockResult
from rtrl._influence.catch_up import catch_up
from rtrl._influence.history import History
from rtrl._influence.store import ParameterInfluence
from rtrl.cells.protocol import Sparsity
from rtrl.errors import ConfigError
from rtrl.learners.audit import Auditor, BlockAudit
from rtrl.learners.explosion import ExplosionCheck
from rtrl.learners.store_checks import ResetCheck, StoreCheck
from rtrl.learners.witness import DormantWitness


class CarriedInfluence:
    """The influence of every parameter, over the whole state, and the blocks since dormant slices were last active.

    Args:
        parameters: name → trainable parameter; the learner's own mapping, which may change between blocks.
        state: (B, n, ...), any state, for shape, dtype and device.
        gradient: gives the buffer, by parameter, that collects the gradient not yet delivered.
        auditor: draws random numbers, and says which resets are checked.
        block, window, lazy: as in ``BlockRTRL``.
        now: the number of blocks added before.

    Attributes:
        influences: name → influence; empty until the first step has shown the sparsity.
        history: the blocks; None until then.
        accumulated_until: the gradients of dormant slices are accumulated for the blocks before this one.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        state: Tensor,
        gradient: Callable[[str], Tensor],
        auditor: Auditor,
        *,
        block: int,
        window: int,
        lazy: bool,
        now: int = 0,
    ) -> None:
        self._parameters, self._state, self._gradient, self._auditor = parameters, state, gradient, auditor
        self._block, self._window, self._lazy, self._start = block, window, lazy, now
        self.influences: dict[str, ParameterInfluence] = {}
        self.history: History | None = None
        self.accumulated_until = 0
        self._witness: DormantWitness | None = None
        self._explosion = ExplosionCheck()

    # ------------------------------------------------------------------ inspection

    @property
    def state(self) -> Tensor:
        """Any state, (B, n, ...), for shape, dtype and device."""
        return self._state

    @property
    def sliced(self) -> list[str]:
        """The parameters whose influence is kept slice by slice."""
        return [name for name, influence in self.influences.items() if influence.sliced]

    def catch_up(self, name: str) -> None:
        """Bring every slice of a parameter up to date."""
        if name not in self.influences:
            return
        influence = self.influences[name]
        rows = influence.active_rows()
        if self.history is not None:
            self._advance({name: rows})
        if self._witness is not None:
            self._witness.check_rows(name, influence, rows)

    def influence(self, name: str) -> Tensor | None:
        """Return the influence (B, H, P) of a parameter whose slices are up to date; None if there is none yet."""
        return self.influences[name].to_dense() if name in self.influences else None

    def last_updates(self, name: str) -> Tensor:
        """Return the number of closed blocks at the last update of each slice, LongTensor (B, slices), -1 for none."""
        influence = self.influences.get(name)
        size = self._state.shape[0]
        if influence is None:
            return torch.full((size, 1), -1, device="cpu")
        updates = torch.full((size, influence.slices), -1, device="cpu")
        rows = influence.active_rows()
        device_rows = rows.to(influence.values.device)
        updates[influence.sample[device_rows].cpu(), influence.slice[device_rows].cpu()] = influence.last_block[rows]
        return updates

    def n_bytes(self) -> dict[str, int]:
        """Return the bytes held, by part."""
        return {
            "influence": sum(influence.n_bytes for influence in self.influences.values()),
            "tree": 0 if self.history is None else self.history.n_bytes,
        }

    # ------------------------------------------------------------------ blocks

    def begin(self, sparsity: Sparsity, first_influence: Mapping[str, Tensor]) -> None:
        """Prepare for a block: make the stores if there are none, and add the influence of learned first states.

        Args:
            sparsity: of the block's first step.
            first_influence: by parameter, ``∂h₀/∂θ`` (B, H, P).
        """
        if self.history is None:
            self._allocate(sparsity)
        self.add_first(first_influence)

    def add_first(self, first_influence: Mapping[str, Tensor]) -> None:
        """Add the influence of learned first states."""
        for name, influence in first_influence.items():
            self.influences[name].add_first(influence, self.now)

    def _allocate(self, sparsity: Sparsity) -> None:
        """Make the stores, now that the first step has shown which parameters come in slices and how much of the state
        a step touches."""
        n = self._state.shape[1]
        sliced = {name for name in sparsity.active if name in self._parameters}
        writes = n if sparsity.writes is None else sparsity.writes.shape[1]
        reads = n if sparsity.reads is None else sparsity.reads.shape[1]
        sliced |= {name for name, influence in self.influences.items() if influence.sliced}
        written, touched = min(n, self._block * writes), min(n, self._block * (reads + writes))
        known = self.influences  # up to date, if parameters were frozen or unfrozen
        self.influences = {
            name: known[name] if name in known else self._empty(name, name in sliced) for name in self._parameters
        }
        self.history = History(self._window if self._lazy and sliced else 1, written, touched, self._state, self._start)

    def stage(self, result: BlockResult, audit: BlockAudit | None, span: str) -> None:
        """Refuse a block that may make an influence overflow, before it is changed in place.

        Raises:
            NonFiniteError: naming the parameter.

        Cost: see ``ExplosionCheck``.
        """
        self._explosion.check(self.influences, result.transition.jacobian, span)

    def add(self, result: BlockResult, audit: BlockAudit | None) -> None:
        """Add a block; what its audit found, if it was audited, is checked against what is then carried."""
        assert self.history is not None
        sliced, check = self.sliced, None
        oldest, now = self.history.next_overwritten, self.history.now
        if oldest is not None:
            held = {name: self.influences[name].active_rows() for name in sliced}
            self._advance({name: rows[self.influences[name].last_block[rows] <= oldest] for name, rows in held.items()})
        self.history.append(result.transition)
        if self._witness is not None:
            self._witness.append(result.transition)
        if result.restarted is not None and sliced:
            restarted = result.restarted.cpu()
            self._drop(restarted, self._rows_of(restarted, sliced), discard=False)
        known = {name: influence.values.shape[0] for name, influence in self.influences.items()}
        active = {name: influence.allocate(result.keys[name], now) for name, influence in self.influences.items()}
        self._advance({name: active[name] if self._lazy else self.influences[name].active_rows() for name in sliced})
        if audit is not None:
            check = StoreCheck(self.influences, result, audit.cotangent, self._auditor.draw)
        before = {} if check is None else {name: self._gradient(name).clone() for name in self.influences}
        for name, influence in self.influences.items():
            if not influence.sliced:  # it is never dormant
                if known[name]:
                    influence.advance(result.transition, self._gradient(name))
                if result.restarted is not None:
                    influence.values.masked_fill_(result.restarted[influence.sample][:, None, None], 0.0)
                influence.last_block[active[name]] = self.history.now
        if check is not None:
            check.check_advanced({name: (value, self._gradient(name)) for name, value in before.items()}, active)
        result.add_immediate(self.influences, active)
        for name, gradient in result.gradient.items():
            self._gradient(name).add_(gradient)
        if check is not None and audit is not None:
            check.check_added(audit.immediate, active)
            if sliced:
                self._witness = self._witness or DormantWitness(self._state, self._auditor.draw)
                self._witness.follow(self.influences, {name: active[name] for name in sliced})
        elif self._witness is not None and self._witness.age > self._window:
            self._witness = None  # what was dormant has left the window meanwhile, and was brought up to date
        elif self._witness is not None:
            for name in sliced:
                self._witness.forget(name, active[name])

    def count_block(self) -> None:
        """Take note of a block that all influences have been brought up to date with; none is kept slice by slice."""
        assert self.history is not None
        self.history.skip()

    def _advance(self, rows: Mapping[str, Tensor]) -> None:
        """Bring rows of influences, by parameter, up to date together, and accumulate their pending gradients."""
        assert self.history is not None
        if not rows:
            return
        self._accumulate(rows)
        catch_up(self.history, [(self.influences[n], r) for n, r in rows.items() if self.influences[n].sliced])
        for name, own in rows.items():
            self.influences[name].last_block[own] = self.history.now
            if self._witness is not None:
                self._witness.check_rows(name, self.influences[name], own)

    def _accumulate(self, rows: Mapping[str, Tensor]) -> None:
        """Accumulate the pending gradients of rows of influences, by parameter; where a witness follows them, check
        what was added."""
        witness = self._witness
        if witness is None or self.history is None:
            self._accumulate_pending(rows)
            return
        checked = {}
        for name, own in rows.items():
            slices = witness.slices_of(name, self.influences[name], own, self.history.now)
            if slices.numel():
                checked[name] = slices, witness.along(name, self._gradient(name), slices)
        self._accumulate_pending(rows)
        for name, (slices, before) in checked.items():
            gradient = self._gradient(name)
            witness.check_gradient(name, self.influences[name], rows[name], slices, before, gradient)
        for name, own in rows.items():
            witness.settle(name, own)

    def _accumulate_pending(self, rows: Mapping[str, Tensor]) -> None:
        """Accumulate the gradients of rows of influences, by parameter, for all blocks since their last update that
        have not been accounted for."""
        assert self.history is not None
        now = self.history.now
        if self.accumulated_until >= now:
            return
        outdated = {name: own[self.influences[name].last_block[own] < now] for name, own in rows.items()}
        outdated = {name: own for name, own in outdated.items() if own.numel()}
        if not outdated:
            return
        times = torch.cat([self.influences[name].last_block[own] for name, own in outdated.items()]).unique()
        pending = self.history.pending_adjoints(times.tolist(), self.accumulated_until)
        adjoints = torch.stack([pending[time] for time in times.tolist()])
        for name, own in outdated.items():
            influence = self.influences[name]
            index = torch.searchsorted(times, influence.last_block[own]).to(adjoints.device)
            sample = influence.sample[own.to(adjoints.device)]
            influence.accumulate_grad(own, adjoints[index, sample], self._gradient(name))

    def accumulate_all(self) -> None:
        """Accumulate the pending gradients of all dormant slices, up to the present."""
        if self.history is not None:
            self._accumulate({name: self.influences[name].active_rows() for name in self.sliced})
            self.accumulated_until = self.now

    def contract(self, adjoints: Tensor, per_sample: bool) -> dict[str, Tensor]:
        """Return name → ``Σ_b δ_b S_b`` for L adjoints of the present state, and change nothing.

        Args:
            adjoints: (L, B, H).
            per_sample: keep the samples apart.

        Returns:
            Name → (L, B, *shape) if ``per_sample``, else (L, 1, *shape).

        Cost:
            An (L × H) @ (H × P) product per sample; for dormant slices, a few row-vector products (see
            ``History.pull_back_to``).
        """
        now = self.now
        rows = {name: influence.active_rows() for name, influence in self.influences.items()}
        times = {name: self.influences[name].last_block[own] for name, own in rows.items()}
        dormant = {time for name in self.sliced for time in times[name].unique().tolist() if time < now}
        at = {now: adjoints}
        if self.history is not None and dormant:
            pulled = self.history.pull_back_to(dormant, adjoints.transpose(0, 1))
            at |= {time: cotangents.transpose(0, 1) for time, cotangents in pulled.items()}
        moments = torch.tensor(sorted(at), device="cpu")
        by_time = torch.stack([at[time] for time in moments.tolist()])
        contracted = {}
        for name, parameter in self._parameters.items():
            influence = self.influences.get(name)
            if influence is None:
                size = adjoints.shape[1] if per_sample else 1
                contracted[name] = adjoints.new_zeros(len(adjoints), size, *parameter.shape)
                continue
            of_rows = adjoints
            if influence.sliced or rows[name].numel() < adjoints.shape[1]:
                place = torch.searchsorted(moments, times[name]).to(adjoints.device)
                of_rows = by_time[place, :, influence.sample[rows[name].to(adjoints.device)]].transpose(0, 1)
            contracted[name] = influence.contract(rows[name], of_rows, per_sample)
        return contracted

    # ------------------------------------------------------------------ resets and changes

    def clear(self, samples: Tensor, discard: bool) -> None:
        """Clear the influence of samples, Boolean (B,); unless ``discard``, their pending gradients are accumulated
        first."""
        samples = samples.cpu()
        rows = self._rows_of(samples, list(self.influences))
        check = None
        if self.influences and self._auditor.is_reset_due(not bool(samples.all())):
            check = ResetCheck(self.influences, samples, self._auditor.draw)
        self._drop(samples, rows, discard)
        if check is not None:
            check.check(self.influences)

    def _drop(self, samples: Tensor, rows: Mapping[str, Tensor], discard: bool) -> None:
        """Clear the influence of samples, Boolean (B,) on the CPU, in these rows by parameter.

        Unless ``discard``, their pending gradients are accumulated first."""
        if self.history is not None and not discard:
            self._accumulate(rows)
        for name, own in rows.items():
            if self._witness is not None:
                self._witness.forget(name, own)
            self.influences[name].clear_samples(samples)

    def _rows_of(self, samples: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """The rows in use of samples, Boolean (B,) on the CPU, by parameter."""
        rows = {}
        for name in names:
            influence = self.influences[name]
            held = influence.active_rows()
            rows[name] = held[samples[influence.sample[held.to(influence.sample.device)].cpu()]]
        return rows

    def adopt(self) -> None:
        """Go on with the present parameters: the influence of those that are gone is dropped."""
        self.influences = {n: influence for n, influence in self.influences.items() if n in self._parameters}
        self.bring_up_to_date()

    def bring_up_to_date(self) -> None:
        """Bring all dormant slices up to date, and forget the history; the next step begins another one."""
        if self.history is not None:
            self._advance({name: self.influences[name].active_rows() for name in self.sliced})
            for influence in self.influences.values():
                influence.last_block.zero_()
            self.accumulated_until, self.history, self._witness = 0, None, None

    @property
    def begun(self) -> bool:
        """Whether there is any influence."""
        return any(influence.active_rows().numel() for influence in self.influences.values())

    def dense(self) -> dict[str, Tensor]:
        """Return the influence (B, H, P) of every parameter that has one; every slice must be up to date."""
        return {name: held.to_dense() for name, held in self.influences.items() if held.active_rows().numel()}

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return all that is carried, as copied tensors, numbers and containers of these."""
        return {
            "accumulated_until": self.accumulated_until,
            "influences": {name: influence.state_dict() for name, influence in self.influences.items()},
            "history": None if self.history is None else self.history.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], window: int) -> None:
        """Restore what ``state_dict`` returned, into an object that carries nothing yet.

        Args:
            saved: what was returned.
            window: of the learner that it was taken of; if it is another than here, the blocks are held to bring
                dormant slices up to date, and no more.

        Raises:
            ConfigError: it is damaged, or was taken of other parameters.
        """
        influences, accumulated_until, history = saved["influences"], saved["accumulated_until"], saved["history"]
        unknown = influences.keys() ^ self._parameters.keys()
        if influences and history is None:  # influences that have not begun
            unknown -= self._parameters.keys()
        if influences and unknown:
            raise ConfigError("the saved influences are not those of this learner's parameters")
        if not all(isinstance(held, Mapping) and type(held["sliced"]) is bool for held in influences.values()):
            raise ConfigError("a saved influence does not say whether it is kept slice by slice")
        self._explosion = ExplosionCheck()
        self.influences = {name: self._empty(name, held["sliced"]) for name, held in influences.items()}
        for name, influence in self.influences.items():
            influence.load_state_dict(influences[name])
        if history is not None:
            own = window if self.sliced else 1
            if history["capacity"] not in (1, own):
                raise ConfigError(f"the saved history holds {history['capacity']} blocks, not the window of {own}")
            self.history = History.from_state_dict(history, self._state, brief=window != self._window)
        _check_times(self.influences, self.history)
        if type(accumulated_until) is not int or not 0 <= accumulated_until <= self.now:
            raise ConfigError("the parts of the saved learner do not fit together")
        self.accumulated_until = accumulated_until

    # ------------------------------------------------------------------ helpers

    @property
    def now(self) -> int:
        """The number of blocks added so far."""
        return self._start if self.history is None else self.history.now

    def _empty(self, name: str, sliced: bool) -> ParameterInfluence:
        size, numbers = self._state.shape[0], self._state[0].numel()
        return ParameterInfluence(self._parameters[name].shape, sliced, size, numbers, self._state)


def _check_times(influences: Mapping[str, ParameterInfluence], history: History | None) -> None:
    """Refuse influences that the blocks of a history cannot bring up to date; without one, all are of block 0."""
    oldest, now = (0, 0) if history is None else (history.oldest, history.now)
    for name, influence in influences.items():
        times = influence.last_block[influence.active_rows()]
        if times.numel() and (int(times.max()) > now or int(times.min()) < oldest):
            raise ConfigError(f"the saved influence of {name!r} is of a time that the saved history does not reach")
