"""What a user says about a learner or a cell, so that it can be checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rtrl.errors import ConfigError
from rtrl.testing.laws import Exact, Law
from rtrl.testing.streams import Loss, Stream

MakeLearner = Callable[[nn.Module, int], Any]
GradientFunction = Callable[[nn.Module, Tensor, Loss], Mapping[str, Tensor | None]]


@dataclass(frozen=True)
class ErrorInput:
    """Bad input that a learner must refuse without losing anything.

    Args:
        name: in words. call: does it to a learner in mid-stream; its ``.cell`` may be used if it has one.
        raises: the exception. match: words that its message must contain.
    """

    name: str
    call: Callable[[Any], object]
    raises: type[Exception]
    match: str = ""


@dataclass(frozen=True, eq=False)
class LearnerSpec:
    """A learner, and what it promises.

    Args:
        make_learner: ``make_learner(cell, batch_size)`` gives a learner with ``step(x) -> y``, ``backward(loss)`` and
            ``sync()``, which adds to the ``.grad`` of the cell's parameters. ``reset(samples)``, ``influence(name)``
            and ``state_dict()``/``load_state_dict(...)`` are checked if it has them.
        gradients: in place of it, one function ``gradients(cell, xs, loss_fn)`` as the oracles have it, which returns
            gradients by parameter name.
        law: what its gradients must be; ``Exact()`` by default.
        name: in reports; that of the function or class by default.
        streams: its own sample inputs, in place of those of the checks, for a learner of some cells only.
        errors: bad input that it must refuse.
        expected_failures: name of a check → why it must be expected to fail. Names of no check, and checks that do not
            fail, are errors.
        sparse: False for a learner of cells that return ``(y, h_next)`` alone.
        constant_memory: whether the bytes it holds must not grow with the number of steps.
        plain_backward: whether a loss may be given by its own ``backward()`` in place of the learner's.
        copies_inputs: whether x may be overwritten once the losses of its step are given.

    Raises:
        ConfigError: something is of the wrong kind, or both or neither of the two forms is given. What
            ``expected_failures`` names is looked at when the checks are run.

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
        if not isinstance(self.name, str):
            raise ConfigError(f"name must be a text, got {type(self.name).__name__}")
        if not self.name:
            inner = getattr(made, "func", made)  # of a partial
            object.__setattr__(self, "name", getattr(inner, "__name__", type(inner).__name__))


@dataclass(frozen=True, eq=False)
class CellSpec:
    """A cell, and inputs to check it with.

    Args:
        make_cell: gives the cell. inputs: the x of some steps, as ``check_cell`` takes them; or a function of the cell
            that gives them.
        state: the first state; the cell's own by default.
        name: in reports; the cell's class by default. expected_failures: as in ``LearnerSpec``.

    Raises:
        ConfigError: something is of the wrong kind.
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
