"""The influences of all parameters in one tensor, so that one product brings all of them up to date."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rtrl._influence.store import ParameterInfluence


class JointInfluence:
    """Influences that are kept whole, as parts of one tensor (B, H, P), and a second tensor for the next values.

    The ``values`` of each influence become a view of the first tensor, and all share one ``last_block``. They may be
    read and written as before; an influence whose ``values`` are replaced has left, which ``holds`` notices.

    Args:
        influences: name → influence, with a row for each sample.

    Attributes:
        columns: name → its columns.
        present: which of the two tensors holds the influences now, 0 or 1.
    """

    def __init__(self, influences: Mapping[str, ParameterInfluence]) -> None:
        self.columns, stop = {}, 0
        for name, influence in influences.items():
            start, stop = stop, stop + influence.values.shape[2]
            self.columns[name] = slice(start, stop)
        like = next(iter(influences.values()))
        shape = *like.values.shape[:2], stop
        self._tensors = like.values.new_empty(shape), like.values.new_empty(shape)
        self._views = [{name: held[:, :, own] for name, own in self.columns.items()} for held in self._tensors]
        self._influences, self._last_block = dict(influences), like.last_block.clone()
        for name, influence in influences.items():
            self._views[0][name].copy_(influence.values)
            influence.last_block = self._last_block
            influence.values = self._views[0][name]
        self._flats = [held.flatten(0, 1) for held in self._tensors]
        self._samples = torch.arange(shape[0], device="cpu")
        self.present = 0

    @property
    def values(self) -> Tensor:
        """The influences, (B, H, P)."""
        return self._tensors[self.present]

    @property
    def next_values(self) -> Tensor:
        """Memory for the next values, (B, H, P)."""
        return self._tensors[1 - self.present]

    @property
    def flat(self) -> Tensor:
        """The influences, (B·H, P)."""
        return self._flats[self.present]

    @property
    def n_bytes(self) -> int:
        """Bytes of the memory for the next values, which no influence counts."""
        return self.next_values.numel() * self.next_values.element_size()

    def holds(self, influences: Mapping[str, ParameterInfluence]) -> bool:
        """Whether these are the influences."""
        views, known = self._views[self.present], self._influences
        return influences.keys() == known.keys() and all(
            influence is known[name] and influence.values is views[name] and influence.last_block is self._last_block
            for name, influence in influences.items()
        )

    def allocate(self, now: int) -> None:
        """Let the influence on samples that have restarted begin at zero, up to date with block ``now``."""
        for influence in self._influences.values():
            if not influence.is_full:
                influence.allocate(self._samples, now)

    def propagate(self, jacobian: Tensor) -> Tensor:
        """Write ``J S`` to the next values, for J (B, H, H); return them as (B·H, P)."""
        following = self._flats[1 - self.present]
        if len(jacobian) == 1:
            torch.mm(jacobian[0], self._flats[self.present], out=following)
        else:
            torch.bmm(jacobian, self.values, out=self.next_values)
        return following

    def swap(self, now: int) -> None:
        """Take the next values as the present ones, up to date with block ``now``."""
        self.present = 1 - self.present
        for name, view in self._views[self.present].items():
            self._influences[name].values = view
        self._last_block.fill_(now)

    def unit_blocks(self, name: str, parts: int, gates: int, units: int) -> tuple[Tensor, Tensor]:
        """Return, of both tensors, the entries of a parameter that act on their own unit, as views.

        Args:
            name: a weight (gates·units, I) or a bias (gates·units,), of which row ``g·units + i`` belongs to unit i.
            parts: S, so that the state has S·units entries.
            gates: G.
            units: U.

        Returns:
            Of each tensor, (B, S, G, U, p), p = I or 1; (S, G, U, p) for one sample.
        """
        start = self.columns[name].start
        width = (self.columns[name].stop - start) // (gates * units)
        views = []
        for held in self._tensors:
            size, entries, row = held.stride()
            strides = size, units * entries, units * width * row, entries + width * row, row
            shape, one = (held.shape[0], parts, gates, units, width), held.shape[0] == 1
            views.append(torch.as_strided(held, shape[one:], strides[one:], start * row))
        return views[0], views[1]
