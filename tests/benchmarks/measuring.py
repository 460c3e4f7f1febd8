"""Where measured numbers go: beside their bars into the results, and then against them."""

from typing import Any

import torch
from bars import BARS, SIZES, Sizes


class Measurement:
    """The size of a run, what of it is judged, and the way of its numbers into ``benchmark.extra_info``.

    Attributes:
        size: ``"small"`` or ``"full"``. clock: whether times and the memory of the process are taken.
    """

    def __init__(self, benchmark: Any, size: str, clock: bool) -> None:
        self.benchmark, self.size, self.clock = benchmark, size, clock

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.size]

    def settle(self, measured: dict[str, float], **details: Any) -> None:
        """Store the numbers with their bars, then hold them to these.

        What was measured is in the results also where it does not reach its bar.
        """
        self.benchmark.extra_info.update(size=self.size, threads=torch.get_num_threads(), details=details)
        self.benchmark.extra_info["measured"] = {
            name: {"value": float(value), "bound": BARS[name].bound(self.size), "holds": self._holds(name, value)}
            for name, value in measured.items()
        }
        missed = [
            f"{name}: {value:.4g}{BARS[name].unit} {BARS[name].text}; the bar is {BARS[name].relation} "
            f"{BARS[name].bound(self.size)}"
            for name, value in measured.items()
            if self._holds(name, value) is False
        ]
        assert not missed, "\n".join(missed)

    def _holds(self, name: str, value: float) -> bool | None:
        gated = BARS[name].kind == "count" or (self.clock and self.size == "full")
        return BARS[name].holds(value, self.size) if gated else None
