"""Watching a cell's parameters: those of an open block must still be what they were when its steps were taken."""

from torch import Tensor, nn

from rtrl.errors import ConfigError, ParameterChangedError


class ParameterWatch:
    """Remembers a cell's trainable parameters, and from ``begin`` on the versions of all that it computes with.

    Attributes:
        parameters: name → parameter, those that require a gradient.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, cell: nn.Module) -> None:
        self._cell = cell
        self.parameters = {name: p for name, p in cell.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("the cell has no parameter that requires a gradient")
        self._versions: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """Take the present values for those that an open block is computed with."""
        self._versions = {name: (value.data_ptr(), value._version) for name, value in self._held()}

    def check(self, open_steps: list[int]) -> None:
        """Refuse parameters that were replaced, or that changed while the steps of a block are open.

        A change through ``.data`` leaves no trace here; it is found when the block is run again.

        Raises:
            ParameterChangedError: naming them.
        """
        now = {name: p for name, p in self._cell.named_parameters() if p.requires_grad}
        if now.keys() != self.parameters.keys() or any(now[name] is not p for name, p in self.parameters.items()):
            raise ParameterChangedError(
                "the cell's trainable parameters are no longer those that the learner was made for: one was replaced, "
                "added, frozen or unfrozen; make a new learner"
            )
        if not open_steps:
            return
        changed = [
            name for name, value in self._held() if self._versions.get(name) != (value.data_ptr(), value._version)
        ]
        if changed:
            raise ParameterChangedError(
                f"{', '.join(map(repr, changed[:3]))} changed inside the open block of steps {open_steps[0]} … "
                f"{open_steps[-1]}, which must be linearised at the old value; call sync() before changing parameters. "
                "Put the old value back, or give the block up by reset(discard=True)"
            )

    def _held(self) -> list[tuple[str, Tensor]]:
        return [*self._cell.named_parameters(), *self._cell.named_buffers()]
