"""Steps that are run once more under a graph, with the parameters they were taken with, and learners that do so."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks, deferred
from rtrl._engine.recorded import RecordedStep
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import is_continuous
from rtrl._utils.undo import undone
from rtrl.cells.protocol import Sparsity, call_cell
from rtrl.errors import CellError, ConfigError, NonFiniteError
from rtrl.learners.base import Learner
from rtrl.learners.state import (
    LearnerState,
    check_numbers,
    copy_like,
    first_from_plain,
    step_from_plain,
    step_to_plain,
)


class ParameterSnapshot:
    """A copy of a cell's parameters and buffers at one moment.

    Args:
        cell: the cell.
        values: its parameters and buffers by name, if not those that the cell has now.
        trainable: names of the parameters that were trainable; all that require a gradient now, by default.

    Attributes:
        trainable: name → parameter of the cell itself, in the cell's own order: what a step that is run again depends
            on.

    Raises:
        ConfigError: ``values`` are not those of such a cell.
    """

    def __init__(
        self, cell: nn.Module, values: Mapping[str, Tensor] | None = None, trainable: Collection[str] | None = None
    ) -> None:
        now = _values_of(cell)
        values = now if values is None else values
        form = {name: (value.shape, value.dtype) for name, value in values.items()}
        if form != {name: (value.shape, value.dtype) for name, value in now.items()}:
            raise ConfigError("the saved parameters are not those of this cell")
        self._cell = cell
        self._values = {name: values[name].detach().to(value.device, copy=True) for name, value in now.items()}
        self.trainable = {
            name: p
            for name, p in cell.named_parameters()
            if p.requires_grad and (trainable is None or name in trainable)
        }

    def freeze(self, kept: Collection[str]) -> None:
        """Hold all parameters fixed but those named."""
        self.trainable = {name: p for name, p in self.trainable.items() if name in kept}

    def copies(self) -> dict[str, Tensor]:
        """Return name → a copy of the value."""
        return {name: value.clone() for name, value in self._values.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """The cell's own parameters and buffers."""
        return list(_values_of(self._cell).values())

    def matches(self, cell: nn.Module) -> bool:
        """Return whether the cell still has these values."""
        now = _values_of(cell)
        return now.keys() == self._values.keys() and all(torch.equal(now[n], v) for n, v in self._values.items())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the cell these values for as long as the context lasts, in place, so that every use of a parameter is
        reached. Backward passes belong inside.

        No version counter moves, and the present values are put back in any case.
        """
        changed = []
        for name, tensor in _values_of(self._cell).items():
            if not torch.equal(tensor, self._values[name]):
                changed.append((tensor.data, tensor.detach().clone(), self._values[name]))

        def put_back() -> None:
            for present, kept, _ in changed:
                present.copy_(kept)

        with undone(put_back):
            for present, _, value in changed:
                present.copy_(value)
            yield

    def __call__(self, x: Any, h: Tensor, **replay: Sparsity) -> Any:
        """Take one step of the cell, which must have these values: see ``applied``."""
        return self._cell(x, h, **replay)


def _values_of(cell: nn.Module) -> dict[str, Tensor]:
    return {**dict(cell.named_parameters()), **dict(cell.named_buffers())}


@dataclass(eq=False, slots=True)
class ReplayedStep(RecordedStep):
    """A step that accepts no more losses, with all that is needed to run it once more.

    Attributes:
        h_next: (B, n, ...), the state it reached.
        snapshot: the parameters it was taken with.
        constant_state: Boolean (B,), the samples whose ``h`` does not depend on the step before.
        replays: whether the cell takes the choices of ``sparsity`` as ``replay``; if not, ``sparsity`` is empty.
        adjoints: the gradients of its losses at ``outputs``.
        first_influence: name → ``∂h/∂θ`` (B, H, P) of the samples that restart here, of the parameters that their first
            state depends on.
    """

    h_next: Tensor
    snapshot: ParameterSnapshot
    constant_state: Tensor
    replays: bool
    adjoints: list[Tensor | None] = field(default_factory=list)
    first_influence: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        step: RecordedStep,
        h_next: Tensor,
        snapshot: ParameterSnapshot,
        constant_state: Tensor,
        replays: bool,
        adjoints: Sequence[Tensor | None] = (),
        first_influence: Mapping[str, Tensor] | None = None,
    ) -> "ReplayedStep":
        """Add what a step needs to be run once more; see the attributes."""
        sparsity = step.sparsity if replays else Sparsity()
        recorded = step.x, step.h, sparsity, step.outputs, step.number
        made = cls(*recorded, h_next, snapshot, constant_state, replays, list(adjoints), first_influence or {})
        made.sequence, made.index = step.sequence, step.index
        return made

    @property
    def n_bytes(self) -> int:
        """Bytes held by this step alone."""
        adjoints = [adjoint for adjoint in self.adjoints if adjoint is not None]
        held = [self.x, self.h, self.outputs, adjoints, tuple(self.sparsity), dict(self.first_influence)]
        return pytrees.n_bytes(held)

    @property
    def has_pending_loss(self) -> bool:
        """Whether the gradient of a loss of this step is still to be accumulated."""
        return any(adjoint is not None for adjoint in self.adjoints)

    def take_adjoints(self) -> None:
        """Copy the gradients of the losses from the leaves to ``adjoints``.

        Raises:
            NonFiniteError: NaN or infinity in one of them.
        """
        grads = self.grads
        for grad in grads:
            if grad is not None:
                checks.check_finite("the gradient of the loss at y", grad, self.number)
        self.adjoints = [None if grad is None else grad.detach().clone() for grad in grads]

    def drop_adjoints(self) -> None:
        """Forget the losses, whose gradient has been accumulated."""
        self.adjoints = [None] * len(self.adjoints)

    def rerun(self, h: Tensor, sample: int | None = None) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Run the step once more with a graph, inside ``snapshot.applied()``.

        Args:
            h: the state to begin at, (B, n, ...), or (1, n, ...) if one sample alone is run.
            sample: that sample; None for the batch.

        Returns:
            The pairs (y, its adjoint) that have a loss, and the next state.

        Raises:
            CellError: the cell gives another y or next state than it did.
        """

        def select(value: Tensor) -> Tensor:
            return value if sample is None else value[sample : sample + 1]

        replay = pytrees.map_tensors(select, self.sparsity) if self.replays else None
        with torch.enable_grad():
            y, h_next, _ = call_cell(self.snapshot, pytrees.map_tensors(select, self.x), h, replay)
        ys = [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]
        same = len(ys) == len(self.outputs) and checks.nearly_equal(h_next.detach(), select(self.h_next))
        if not same or not all(
            map(checks.nearly_equal, [y.detach() for y in ys], [select(y.detach()) for y in self.outputs])
        ):
            alone = "" if sample is None else f" with sample {sample} alone"
            raise CellError(
                f"step {self.number}: run again{alone}, the cell gives another y or next state; it must be a pure "
                "function of (x, h, parameters) in which samples do not interact"
            )
        pairs = [(y, select(a)) for y, a in zip(ys, self.adjoints, strict=True) if a is not None and y.requires_grad]
        return pairs, h_next


class ReplayingLearner(Learner):
    """A learner that runs each step once more, with a copy of the parameters that the step was taken with.

    A step accepts losses until the next ``step`` or ``sync``. Parameters may change at any moment.
    """

    _guards_values = False
    _rebuilt = (*Learner._rebuilt, "_snapshot", "_kept_steps")

    def __init__(self, cell: nn.Module, batch_size: int, *, state: Tensor | None = None) -> None:
        super().__init__(cell, batch_size, state=state)
        self._constant_state = torch.ones(batch_size, dtype=torch.bool, device=self._state.device)
        self._snapshot: ParameterSnapshot | None = None
        self._kept_steps: list[ReplayedStep] = []

    @abstractmethod
    def _process_step(self, step: ReplayedStep) -> None:
        """Process a step that accepts no more losses; what can fail comes before ``_change``, changes after it."""

    def _check_dtype_may_change(self) -> None:
        if self._kept_steps:
            raise ConfigError(
                f"the {len(self._kept_steps)} steps that are held were taken in {self._state.dtype}, and run again in "
                "another dtype they would differ; call sync(), then reset(state=learner.state, discard=True), which "
                "makes the present state a constant"
            )

    def _adopt(self, before: Mapping[str, int]) -> None:
        for step in self._kept_steps:
            step.snapshot.freeze(self._parameters)
            step.first_influence = {n: value for n, value in step.first_influence.items() if n in self._parameters}
        self._snapshot = None  # the next step takes one of the present leaves

    def _begin_block(self, step: RecordedStep) -> None:
        if self._snapshot is None or not self._snapshot.matches(self.cell):
            self._snapshot = ParameterSnapshot(self.cell)

    def _process(self) -> None:
        step = self._replayed(self._open_steps[0])
        step.take_adjoints()
        if not deferred.on_host(self._state):
            checks.check_recorded(self._open_steps, self._reached)
        self._process_step(step)
        self._constant_state, self._first_influence = torch.zeros_like(self._constant_state), {}

    def _replayed(self, step: RecordedStep) -> ReplayedStep:
        """Return the open step, the newest one, as a step that can be run again."""
        assert self._snapshot is not None
        start, first = self._constant_state, self._first_influence
        return ReplayedStep.of(step, self._reached, self._snapshot, start, self._takes_replay, first_influence=first)

    def _change(self) -> None:
        """Mark that what the learner carries begins to change."""
        self._damage = f"step {self._steps_taken - 1} was not processed as a whole"

    def _with_pending(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients added to those that are not yet delivered."""
        for name, gradient in gradients.items():
            if not checks.finite(gradient):
                raise NonFiniteError(
                    f"NaN or infinity in the gradient of parameter {name!r} at step {self._steps_taken - 1}"
                )
        pending = self._pending_grads
        return pending | {name: pending[name] + g if name in pending else g for name, g in gradients.items()}

    def _clear(self, samples: Tensor, discard: bool) -> None:
        self._constant_state = self._constant_state | samples

    def _start_clean(self) -> None:
        self._constant_state = torch.ones_like(self._constant_state)
        self._snapshot, self._kept_steps = None, []

    def _held_bytes(self) -> dict[str, int]:
        """Bytes of the influence, and of the kept steps; the copies of the parameters are not counted."""
        steps = [*self._kept_steps, *map(self._replayed, self._open_steps)]
        return {"influence": 0, "steps": sum(step.n_bytes for step in steps)}

    def _most_kept(self) -> int | None:
        """How many processed steps are held at most; None for no limit."""
        return 0

    def _buffers(self) -> dict[str, Any]:
        snapshots = {id(step.snapshot): step.snapshot for step in self._kept_steps}
        if self._snapshot is not None:
            snapshots[id(self._snapshot)] = self._snapshot
        indices = {key: index for index, key in enumerate(snapshots)}
        steps = [
            {
                **step_to_plain(step),
                "h_next": step.h_next.clone(),
                "constant_state": step.constant_state.clone(),
                "first_influence": {name: value.clone() for name, value in step.first_influence.items()},
                "adjoints": [None if adjoint is None else adjoint.clone() for adjoint in step.adjoints],
                "snapshot": indices[id(step.snapshot)],
            }
            for step in self._kept_steps
        ]
        return {
            "constant_state": self._constant_state.clone(),
            "snapshots": [snapshot.copies() for snapshot in snapshots.values()],
            "trainable": [list(snapshot.trainable) for snapshot in snapshots.values()],
            "snapshot": None if self._snapshot is None else indices[id(self._snapshot)],
            "kept_steps": steps,
        }

    def _load_buffers(self, loaded: LearnerState) -> dict[str, Any]:
        saved, mask = loaded.buffers, self._constant_state
        trainable = saved.get("trainable", [None] * len(saved["snapshots"]))
        for names in trainable:
            known = dict(self.cell.named_parameters())
            if names is not None and (
                type(names) is not list or len({*names}) != len(names) or not {*names} <= known.keys()
            ):
                raise ConfigError("the parameters that were trainable in the saved learner are not those of this cell")
        pairs = zip(saved["snapshots"], trainable, strict=True)
        snapshots = [ParameterSnapshot(self.cell, values, names) for values, names in pairs]
        if loaded.open_steps and saved["snapshot"] is None:
            raise ConfigError("the saved learner has an open step without the parameters that it was taken with")
        for index in (saved["snapshot"], *(plain["snapshot"] for plain in saved["kept_steps"])):
            if index is not None and (type(index) is not int or not 0 <= index < len(snapshots)):
                raise ConfigError(f"the saved learner has no parameters number {index!r}")
        most = self._most_kept()
        if most is not None and len(saved["kept_steps"]) > most:
            raise ConfigError(f"the saved learner holds {len(saved['kept_steps'])} steps, this one at most {most}")
        kept = []
        for plain in saved["kept_steps"]:
            step = step_from_plain(plain, self._state, self._guard.named)
            adjoints = [
                None if adjoint is None else copy_like("adjoint of a step", adjoint, leaf)
                for adjoint, leaf in zip(plain["adjoints"], step.outputs, strict=True)
            ]
            h_next = copy_like("next state of a step", plain["h_next"], self._state)
            constant_state = copy_like("constant_state of a step", plain["constant_state"], mask)
            snapshot = snapshots[plain["snapshot"]]
            first = first_from_plain(plain.get("first_influence", {}), self._state, self._guard.named)
            kept.append(ReplayedStep.of(step, h_next, snapshot, constant_state, self._takes_replay, adjoints, first))
        check_numbers(kept, loaded.steps_taken - len(loaded.open_steps))
        return {
            "_constant_state": copy_like("constant_state", saved["constant_state"], mask),
            "_snapshot": None if saved["snapshot"] is None else snapshots[saved["snapshot"]],
            "_kept_steps": kept,
        }
