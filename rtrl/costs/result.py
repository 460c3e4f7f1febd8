"""What a plan predicts: one ``Choice`` for each way to learn, and the ``Plan`` that compares them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rtrl._utils.formatting import show_bytes, show_count, show_seconds

if TYPE_CHECKING:  # rich is for those who look at a plan; others need not wait for its import
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


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
    computed: bool = False
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


@dataclass(frozen=True)
class Plan:
    """Predictions of what each way to learn costs, for one cell, batch and number of steps. Made by ``rtrl.plan``.

    Attributes:
        cell: what the cell is called. steps: T. batch_size: B. state_size: H. parameter_size: P. dtype: of the state.
        memory_bytes: the budget, for ``peak_bytes``; None if there is none.
        rows: one ``Choice`` for each way to learn.
        devices: device → multiply-adds a second at most.
        notes: what the predictions rest on.
    """

    cell: str
    steps: int
    batch_size: int
    state_size: int
    parameter_size: int
    dtype: str
    memory_bytes: int | None
    rows: tuple[Choice, ...]
    devices: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def fits(self, choice: Choice) -> bool:
        """Whether a choice keeps within the budget."""
        return self.memory_bytes is None or choice.peak_bytes <= self.memory_bytes

    @property
    def best(self) -> Choice | None:
        """The choice with the fewest multiply-adds among those that are exact and fit, the smaller one of two that are
        alike; None if none fits."""
        return self._cheapest(lambda choice: choice.exact and self.fits(choice))

    @property
    def best_block(self) -> Choice | None:
        """The same among those of ``BlockRTRL``; the smallest of them if none fits."""
        mine = [choice for choice in self.rows if choice.method == "BlockRTRL"]
        fitting = self._cheapest(lambda choice: choice in mine and self.fits(choice))
        return fitting or min(mine, key=lambda choice: choice.peak_bytes, default=None)

    def _cheapest(self, wanted: Callable[[Choice], bool]) -> Choice | None:
        chosen = filter(wanted, self.rows)
        return min(chosen, key=lambda choice: (choice.macs, choice.peak_bytes), default=None)

    @property
    def crossover_steps(self) -> int | None:
        """T*: on runs of more steps, BPTT holds more bytes than ``best_block``; None if there is no such choice. Each
        choice's own T* is its ``crossover_steps``, and ``crossover_peak_steps`` compares what is needed at once."""
        return None if self.best_block is None else self.best_block.crossover_steps

    def seconds_per_step(self, choice: Choice) -> dict[str, float]:
        """Device → seconds a step at least: multiply-adds over the device's rate. What memory traffic, launches and
        Python cost comes on top, and on small cells that is most of it."""
        return {name: choice.macs_per_step / rate for name, rate in self.devices.items()}

    # ------------------------------------------------------------------ showing it

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""

        def record(choice: Choice) -> dict[str, Any]:
            return {
                **choice.to_dict(),
                "fits": self.fits(choice),
                "seconds_per_step_at_least": self.seconds_per_step(choice),
            }

        best, block = self.best, self.best_block
        return {
            "cell": self.cell,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "state_size": self.state_size,
            "parameter_size": self.parameter_size,
            "dtype": self.dtype,
            "memory_bytes": self.memory_bytes,
            "best": None if best is None else best.name,
            "best_block": None if block is None else block.name,
            "crossover_steps": self.crossover_steps,
            "devices_macs_per_s": dict(self.devices),
            "rows": [record(choice) for choice in self.rows],
            "notes": list(self.notes),
        }

    def render(self) -> "RenderableType":
        """For ``rich``: the choices, the verdict, the devices, and what the predictions rest on."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [self._heading(), self._table(), self._verdict()]
        if self.devices and (self.best or self.best_block):
            parts += [Text(), self._device_table()]
        parts += [Text(), *(Text(f"· {note}", style="dim") for note in self.notes)]
        return Group(*parts)

    def __rich__(self) -> "RenderableType":
        return self.render()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=150, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self.render())
        return captured.get()

    def _heading(self) -> "Text":
        from rich.text import Text

        budget = "" if self.memory_bytes is None else f", at most {show_bytes(self.memory_bytes)}"
        return Text(
            f"{self.cell}: H = {self.state_size}, P = {self.parameter_size:,}, {self.dtype}; {self.steps:,} steps, "
            f"batch size {self.batch_size}{budget}",
            style="bold",
        )

    def _table(self) -> "Table":
        from rich.table import Table

        table = Table("", "method", "gradient")
        for title in ("multiply-adds a step", "held", "at its peak", "T*: BPTT holds more beyond"):
            table.add_column(title, justify="right")
        best = self.best
        for choice in self.rows:
            fits = self.fits(choice)
            table.add_row(
                "→" if choice is best else "",
                choice.name,
                "exact" if choice.exact else "truncated",
                ("≈ " if choice.estimated else "") + show_count(choice.macs_per_step),
                show_bytes(choice.held_bytes),
                show_bytes(choice.peak_bytes) + ("" if fits else " too much"),
                "" if choice.crossover_steps is None else f"{choice.crossover_steps:,} steps",
                style="bold green" if choice is best else "" if fits else "dim",
            )
        return table

    def _verdict(self) -> "Text":
        from rich.text import Text

        best, block = self.best, self.best_block
        if best is None:
            least = min((c for c in self.rows if c.exact), key=lambda choice: choice.peak_bytes, default=None)
            words = "nothing exact fits"
            if least is not None:
                words += f"; {least.name} needs least, {show_bytes(least.peak_bytes)}"
        else:
            words = f"best: {best.name}"
        if block is not None and self.crossover_steps is not None:
            words += f". Beyond T* = {self.crossover_steps:,} steps, BPTT holds more than {block.name}"
            words += f"; beyond {block.crossover_peak_steps:,}, it needs more at its peak"
        return Text(words + ".")

    def _device_table(self) -> "Table":
        from rich.table import Table

        chosen = self.best or self.best_block
        assert chosen is not None
        table = Table("device", title=f"{chosen.name}: time at least, multiply-adds alone", title_justify="left")
        for title in ("multiply-adds/s", "a step", "the run"):
            table.add_column(title, justify="right")
        for name, seconds in self.seconds_per_step(chosen).items():
            run = show_seconds(seconds * self.steps)
            table.add_row(name, show_count(self.devices[name]), show_seconds(seconds), run)
        return table
