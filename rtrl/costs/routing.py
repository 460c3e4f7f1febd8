"""What each step of a run touches: the stream that was profiled, over and over, or, of a single step, choices drawn
evenly at random."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl.cells.protocol import Sparsity
from rtrl.costs.profile import Profile


@dataclass(frozen=True)
class Group:
    """Parameters whose slices are active together.

    Attributes:
        names: of the parameters. slices: of each. sizes: of a slice of each. places: of each among all parameters kept
            slice by slice.
    """

    names: tuple[str, ...]
    slices: int
    sizes: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def width(self) -> int:
        """The size of a slice of all of them together."""
        return sum(self.sizes)


class Routing:
    """Index sets of the steps of a run, (B, m, k) for any m of them in a row.

    Attributes:
        groups: the parameters kept slice by slice. given: whether the run is covered by a stream of the user's own.
    """

    def __init__(self, profile: Profile, steps: int) -> None:
        self._profile = profile
        self._stream = list(profile.choices)
        self.given = steps <= len(self._stream)
        first = self._stream[0]
        sliced = [name for name in profile.shapes if name in first.active]
        found: dict[tuple[int, ...], list[str]] = {}
        for name in sliced:
            together = (profile.shapes[name][0], *(id(choice.active.get(name)) for choice in self._stream))
            found.setdefault(together, []).append(name)
        self.groups = [
            Group(
                tuple(names),
                slices,
                tuple(profile.shapes[name].numel() // max(slices, 1) for name in names),
                tuple(sliced.index(name) for name in names),
            )
            for (slices, *_), names in found.items()
        ]
        self._drawn = len(self._stream) == 1 and steps > 1
        self._generator = torch.Generator().manual_seed(0)
        self._cache: list[Sparsity] = []

    def block(self, start: int, stop: int) -> Sparsity:
        """The steps start … stop − 1: reads and writes (B, m, k), and active by the name of each group's first
        parameter; all slices where a step does not name it."""
        choices = [self._choice(t) for t in range(start, stop)]

        def stacked(parts: list[Tensor | None]) -> Tensor | None:
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            most = max(part.shape[1] for part in known)
            return torch.stack([torch.cat([p, p[:, :1].expand(-1, most - p.shape[1])], 1) for p in known], dim=1)

        every = {g.names[0]: torch.arange(g.slices).expand(self._profile.batch_size, -1) for g in self.groups}
        active: Mapping[str, Tensor] = {
            name: stacked([choice.active.get(name, every[name]) for choice in choices])  # type: ignore[misc]
            for name in every
        }
        reads, writes = stacked([c.reads for c in choices]), stacked([c.writes for c in choices])
        return Sparsity(reads, writes, active)

    def _choice(self, step: int) -> Sparsity:
        if not self._drawn or step == 0:
            return self._stream[step % len(self._stream)]
        while len(self._cache) < step:
            self._cache.append(self._draw())
        return self._cache[step - 1]

    def _draw(self) -> Sparsity:
        """A step with sets as large as the first one's: those that were one tensor stay one, and what was written stays
        among what was read."""
        first, size = self._stream[0], self._profile.batch_size
        drawn: dict[int, Tensor] = {}

        def draw(index: Tensor | None, of: int) -> Tensor | None:
            if index is None:
                return None
            if id(index) not in drawn:
                scores = torch.rand(size, of, generator=self._generator, device="cpu")
                drawn[id(index)] = scores.argsort(dim=1)[:, : index.shape[1]]
            return drawn[id(index)]

        reads = draw(first.reads, self._profile.rows)
        if reads is not None and first.writes is not None and first.writes.shape[1] <= reads.shape[1]:
            drawn.setdefault(id(first.writes), reads[:, : first.writes.shape[1]])
        writes = draw(first.writes, self._profile.rows)
        active = {
            name: draw(index, self._profile.shapes[name][0])
            for name, index in first.active.items()
            if name in self._profile.shapes
        }
        return Sparsity(reads, writes, active)  # type: ignore[arg-type]
