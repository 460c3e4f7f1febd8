"""Guard a cell's parameters: while a block is open, they must stay what they were when its steps were taken."""

from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from rtrl._engine.optimizer_watch import OptimizerWatch
from rtrl.errors import ConfigError, ParameterChangedError


class ParameterGuard:
    """Remembers a cell's trainable parameters, and from ``begin`` on the versions of its parameters and buffers.

    Args:
        cell: the cell.
        values: whether parameters must keep their values while steps are open.

    Attributes:
        parameters: name → parameter, those that require a gradient.
        named: name → parameter, all of them, as the last ``begin`` or ``check`` found them.
        toggled: whether the last ``check`` found parameters frozen or unfrozen, which ``adopt`` takes note of.
        optimizers: what optimizers did with the parameters.

    Raises:
        ConfigError: no parameter requires a gradient, or one was made in inference mode.
    """

    def __init__(self, cell: nn.Module, values: bool = True) -> None:
        self._cell, self._values = cell, values
        self.parameters = self.trainable()
        if not self.parameters:
            raise ConfigError("the cell has no parameter that requires a gradient")
        if any(parameter.is_inference() for parameter in self.named.values()):
            raise ConfigError(
                "the cell was made under torch.inference_mode(), and its parameters cannot be trained; make it outside"
            )
        self.toggled = False
        self.optimizers = OptimizerWatch(self.parameters)
        self._all = self.named
        self._fingerprint: _Fingerprint | None = None

    def begin(self) -> None:
        """Take the present values as those that the open block is computed with.

        Cost: a few comparisons per module and parameter; more where a tensor was added, removed, replaced or frozen.
        """
        if self._fingerprint is not None and self._fingerprint.same_tensors():
            self._fingerprint.take_values()
        else:
            same = self._same_parameters()
            self._fingerprint = _Fingerprint(self._cell) if same else None  # else ``check`` must refuse them
        self.optimizers.updated.clear()

    def check(self, open_steps: list[int]) -> None:
        """Refuse parameters that were replaced, or that changed while the steps of a block are open.

        A change through ``.data`` leaves no trace here; it is found when the block is run again.

        Args:
            open_steps: the numbers of the first and the last step of the open block; empty if no step is open.

        Raises:
            ParameterChangedError: naming them.

        Cost: a few comparisons per module and parameter.
        """
        self.toggled = False
        values_matter = bool(open_steps) and self._values
        known, updated = self._fingerprint, self.optimizers.updated
        if known is not None and known.same_tensors():
            if not values_matter or (not updated and known.same_values()):
                return
        elif not self._same_parameters():
            self._refuse_others(open_steps)
            self.toggled = True
        if self.toggled or not values_matter:
            return
        changed = [
            name for name, value in self._held() if known is None or name in updated or known.differs(name, value)
        ]
        if changed:
            raise ParameterChangedError(
                f"{', '.join(map(repr, changed[:3]))} changed inside the open block of steps {open_steps[0]} … "
                f"{open_steps[-1]}, which must be linearised at the old value; call sync() before changing parameters. "
                "Put the old value back, or discard the block by reset(discard=True)"
            )

    def adopt(self) -> list[str]:
        """Take the parameters that require a gradient now as the trainable ones; return the names of the frozen ones.

        ``parameters`` changes in place.
        """
        now = self.trainable()
        frozen = [name for name in self.parameters if name not in now]
        self.toggled = False
        self.parameters.clear()
        self.parameters.update(now)
        return frozen

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require a gradient now, by name."""
        self.named = dict(self._cell.named_parameters())
        return {name: p for name, p in self.named.items() if p.requires_grad}

    def find_toggled(self) -> bool:
        """Return, and keep as ``toggled``, whether parameters were frozen or unfrozen, and nothing else."""
        now = self.trainable()
        known = self.named.keys() == self._all.keys() and all(self.named[name] is p for name, p in self._all.items())
        self.toggled = known and bool(now) and now.keys() != self.parameters.keys()
        return self.toggled

    def _refuse_others(self, open_steps: list[int]) -> None:
        """Refuse trainable parameters that differ, unless some were frozen or unfrozen and no step is open."""
        toggled, self.toggled = self.find_toggled(), False
        if not toggled:
            raise ParameterChangedError(
                "the cell's parameters are no longer those that the learner was made for: one was replaced, added or "
                "removed, or none is left that requires a gradient; make a new learner"
            )
        if open_steps:
            raise ParameterChangedError(
                f"a parameter was frozen or unfrozen inside the open block of steps {open_steps[0]} … {open_steps[-1]};"
                " undo that, call sync(), and then do it"
            )

    def _same_parameters(self) -> bool:
        now = self.trainable()
        return now.keys() == self.parameters.keys() and all(now[name] is p for name, p in self.parameters.items())

    def _held(self) -> list[tuple[str, Tensor]]:
        return [*self.named.items(), *self._cell.named_buffers()]


_REQUIRES_GRAD, _VERSION = attrgetter("requires_grad"), attrgetter("_version")


class _Fingerprint:
    """A cell at one moment: its modules, parameters and buffers under their names, and their versions.

    The modules' own tables are kept and compared by identity, so that no full name is built.
    """

    def __init__(self, cell: nn.Module) -> None:
        tables = [
            table for module in cell.modules() for table in (module._parameters, module._buffers, module._modules)
        ]
        self._tables = [table for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._content = self._entries()
        held = {id(entry): entry for entry in self._content if isinstance(entry, Tensor)}
        self._tensors = list(held.values())
        self._trainable = [*map(_REQUIRES_GRAD, self._tensors)]
        self._named = {**dict(cell.named_parameters()), **dict(cell.named_buffers())}
        self.take_values()

    def take_values(self) -> None:
        """Take the present values of the tensors as the known ones."""
        self._values = self._present_values()

    def same_tensors(self) -> bool:
        """Whether the cell has the same tensors under the same names, frozen or not as before."""
        now = self._entries()
        return (
            not any(self._empty)
            and len(now) == len(self._content)
            and all(map(is_, now, self._content))
            and [*map(_REQUIRES_GRAD, self._tensors)] == self._trainable
        )

    def same_values(self) -> bool:
        """Whether the tensors have the known values, as far as their versions tell."""
        return self._present_values() == self._values

    def differs(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is not the known one of this name, or does not have its known value."""
        known = self._named.get(name)
        if known is None or (known is not tensor and not _alike(known, tensor)):
            return True
        count, place = len(self._tensors), [*map(id, self._tensors)].index(id(known))
        return self._values[place::count] != [tensor._version, tensor.data_ptr()]

    def _entries(self) -> list[Any]:
        entries: list[Any] = []
        for table in self._tables:
            entries += table  # the names, then their values: where a table ends is never in doubt
            entries += table.values()
        return entries

    def _present_values(self) -> list[int]:
        return [*map(_VERSION, self._tensors), *map(Tensor.data_ptr, self._tensors)]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that share their memory hold the same numbers."""
    forms = [(t.dtype, t.shape, t.stride(), t.requires_grad, type(t)) for t in (one, other)]
    return forms[0] == forms[1]
