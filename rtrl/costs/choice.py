"""One way to learn, with what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One way to learn, with what it is predicted to cost over a run, a loss at every step and one ``sync`` at the end.

    Attributes:
        method: the class, as in ``rtrl.BlockRTRL`` or ``rtrl.learners``.
        exact: whether its gradient is that of the whole run, whatever the losses.
        macs: multiply-adds of the run, as ``rtrl.profiling.macs.MacCounter`` counts them.
        steps: of the run.
        held: bytes held between two steps, at most, by part, as the learner's ``retained_bytes`` counts them.
        peak_bytes: bytes allocated at once, at most, besides the cell, its ``.grad`` and what the user holds.
        block, window, horizon: its arguments, where it takes them.
        crossover_steps: of a choice that does not grow with the run, T*: on runs of more steps BPTT holds more bytes
            between two steps; crossover_peak_steps: beyond which it needs more at its peak.
        sliding: of a TBPTT, whether its window slides.
        estimated: whether ``macs`` is an estimate, because the choices of a routing cell had to be guessed or went on
            beyond the stream that was given; else it is what will be counted.
    """

    method: str
    exact: bool
    macs: int
    steps: int
    held: Mapping[str, int]
    peak_bytes: int
    block: int | None = None
    window: int | None = None
    horizon: int | None = None
    sliding: bool | None = None
    estimated: bool = False
    crossover_steps: int | None = None
    crossover_peak_steps: int | None = None

    @property
    def macs_per_step(self) -> float:
        """Multiply-adds a step, on the average of the run."""
        return self.macs / self.steps

    @property
    def held_bytes(self) -> int:
        """Bytes held between two steps, at most."""
        return sum(self.held.values())

    @property
    def name(self) -> str:
        """As one would write it: ``BlockRTRL(block=16, window=64)``."""
        options = {"horizon": self.horizon, "block": self.block, "window": self.window}
        words = [f"{name}={value}" for name, value in options.items() if value is not None]
        if self.sliding is False:
            words.append("sliding=False")
        return f"{self.method}({', '.join(words)})" if words else self.method

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "method": self.method,
            "block": self.block,
            "window": self.window,
            "horizon": self.horizon,
            "sliding": self.sliding,
            "exact": self.exact,
            "macs": self.macs,
            "macs_per_step": self.macs_per_step,
            "estimated": self.estimated,
            "held_bytes": self.held_bytes,
            "held": dict(self.held),
            "peak_bytes": self.peak_bytes,
            "crossover_steps": self.crossover_steps,
            "crossover_peak_steps": self.crossover_peak_steps,
        }
