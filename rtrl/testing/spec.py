"""The declarations of a user about a learner or a cell to be checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.testing.compare import FLOAT32, FLOAT64, Tolerance
from rtrl.testing.laws import Exact, Law
from rtrl.testing.streams import Loss, Stream

MakeLearner = Callable[[nn.Module, int], Any]
GradientFunction = Callable[[nn.Module, Tensor, Loss], Mapping[str, Tensor | None]]


@dataclass(frozen=True)
class ErrorInput:
    """A bad input that a learner must refuse without a change of its state.

    Args:
        name: in words.
        call: applies it to a learner in mid-stream; it may use the ``.cell`` of the learner if there is one.
        raises: the type of the exception.
        match: words that the message must contain.
    """

    name: str
    call: Callable[[Any], object]
    raises: type[Exception]
    match: str = ""


@dataclass(frozen=True, eq=False)
class LearnerSpec:
    """A learner and its promises.

    Args:
        make_learner: ``make_learner(cell, batch_size)`` returns a learner with ``step(x) -> y``, ``backward(loss)`` and
            ``sync()``, which adds to the ``.grad`` of the cell's parameters. ``reset(samples)``, ``influence(name)``
            and ``state_dict()``/``load_state_dict(...)`` are checked if it has them.
        gradients: instead of it, one function ``gradients(cell, xs, loss_fn)`` as the oracles are, which returns
            gradients by parameter name.
        law: what the gradients must be; ``Exact()`` by default.
        name: in reports; that of the function or class by default.
        streams: sample inputs that replace those of the checks, for a learner of some cells only.
        errors: bad inputs that the learner must refuse.
        expected_failures: the reason why a check is expected to fail, by the name of the check. Other names, and
            checks that do not fail, are errors.
        sparse: False for a learner of cells that return ``(y, h_next)`` only.
        constant_memory: whether the bytes that it holds must not grow with the number of steps.
        plain_backward: whether ``loss.backward()`` may replace ``learner.backward(loss)``.
        copies_inputs: whether x may be overwritten after the losses of its step.
        dtype: of the cells that the learner is for. In float32 it is held to the float64 gradient at the size of
            float32's rounding.
        losses: "own" for a learner that takes the losses of its streams only, one per step that has one; checks that
            change the losses are not judged then.
        batch: the batch size of a learner of one batch size; of any by default.

    Raises:
        ConfigError: an argument is of the wrong kind, or both or neither of the two forms is given. The names in
            ``expected_failures`` are checked when the checks run.

    Example:
        >>> import rtrl
        >>> LearnerSpec(rtrl.BlockRTRL, constant_memory=True).name
        'BlockRTRL'
    """

    make_learner: MakeLearner | None = None
    gradients: GradientFunction | None = None
    law: Law = field(default_factory=Exact)
    name: str = ""
    streams: Sequence[Stream] = ()
    errors: Sequence[ErrorInput] = ()
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    sparse: bool = True
    constant_memory: bool = False
    plain_backward: bool = False
    copies_inputs: bool = False
    dtype: torch.dtype = torch.float64
    losses: Literal["any", "own"] = "any"
    batch: int | None = None

    @property
    def tolerance(self) -> Tolerance:
        """What counts as rounding in the learner's dtype."""
        return FLOAT32 if self.dtype == torch.float32 else FLOAT64

    def __post_init__(self) -> None:
        made = self.make_learner if self.gradients is None else self.gradients
        if (self.make_learner is None) == (self.gradients is None):
            raise ConfigError(
                "a LearnerSpec takes either make_learner(cell, batch_size) or gradients(cell, xs, loss_fn)"
            )
        if not callable(made):
            raise ConfigError(f"make_learner and gradients must be functions, got {type(made).__name__}")
        if not isinstance(self.law, Law):
            raise ConfigError(f"law must be one of rtrl.testing's laws, such as Exact(), got {self.law!r}")
        for what, items, kind in (("streams", self.streams, Stream), ("errors", self.errors, ErrorInput)):
            if not isinstance(items, Sequence):
                raise ConfigError(f"{what} must be a list of {kind.__name__}s, got {type(items).__name__}")
            wrong = [item for item in items if not isinstance(item, kind)]
            if wrong:
                raise ConfigError(f"{what} must hold {kind.__name__}s, got {type(wrong[0]).__name__}")
        for what, flag in (
            ("sparse", self.sparse),
            ("constant_memory", self.constant_memory),
            ("plain_backward", self.plain_backward),
            ("copies_inputs", self.copies_inputs),
        ):
            if not isinstance(flag, bool):
                raise ConfigError(f"{what} must be True or False, got {flag!r}")
        if self.dtype not in (torch.float64, torch.float32):
            raise ConfigError(f"dtype must be torch.float64 or torch.float32, got {self.dtype!r}")
        if self.losses not in ("any", "own"):
            raise ConfigError(f'losses must be "any" or "own", got {self.losses!r}')
        if self.batch is not None:
            validation.integer("batch", self.batch)
            other = [stream for stream in self.streams if stream.batch_size != self.batch]
            if other:
                raise ConfigError(
                    f"the learner is for batch={self.batch}, but the stream {other[0].name!r} has a batch of "
                    f"{other[0].batch_size}; change one of them"
                )
        if not isinstance(self.name, str):
            raise ConfigError(f"name must be a text, got {type(self.name).__name__}")
        if not self.name:
            inner = getattr(made, "func", made)  # of a partial
            object.__setattr__(self, "name", getattr(inner, "__name__", type(inner).__name__))


@dataclass(frozen=True, eq=False)
class CellSpec:
    """A cell, and inputs to check it with.

    Args:
        make_cell: returns the cell.
        inputs: the x of some steps, as ``check_cell`` takes them, or a function of the cell that returns them.
        state: the first state; that of ``init_state`` by default.
        name: in reports; the name of ``make_cell`` by default.
        expected_failures: as in ``LearnerSpec``.

    Raises:
        ConfigError: an argument is of the wrong kind.
    """

    make_cell: Callable[[], nn.Module]
    inputs: Sequence[Any] | Callable[[nn.Module], Sequence[Any]]
    state: Tensor | None = None
    name: str = ""
    expected_failures: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.make_cell, nn.Module) or not callable(self.make_cell):
            raise ConfigError(f"make_cell must be a function that gives a cell, got {type(self.make_cell).__name__}")
        if not self.name:
            object.__setattr__(self, "name", getattr(self.make_cell, "__name__", type(self.make_cell).__name__))
