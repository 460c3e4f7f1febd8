"""What a plan predicts: one ``Choice`` for each learning method, and the ``Plan`` that compares them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rtrl._utils.formatting import show_bytes, show_count, show_seconds

if TYPE_CHECKING:  # rich is for those who look at a plan; others need not wait for its import
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class Choice:
    """One learning method, with what it is predicted to cost over a run.

    The run has a loss at every step and one ``sync`` at the end.

    Attributes:
        method: the class, as in ``rtrl.BlockRTRL`` or ``rtrl.learners``.
        exact: whether its gradient is that of the whole run, for all losses.
        macs: multiply-adds of the run, as ``rtrl.profiling.macs.MacCounter`` counts them.
        steps: of the run.
        held: bytes held between two steps, at most, by part, as the learner's ``retained_bytes`` counts them.
        peak_bytes: bytes allocated at once, at most, besides the cell, its ``.grad`` and what the user holds.
        block: its argument, where it takes one.
        window: its argument, where it takes one.
        horizon: its argument, where it takes one.
        sliding: of a TBPTT, whether its window slides.
        estimated: whether ``macs`` is an estimate, because the choices of a routing cell had to be guessed or went on
            beyond the stream that was given.
        extrapolated: whether its block or horizon, or the run of BPTT, is longer than what was measured. If not, the
            run is one whose first blocks were measured, and whose others cost what the last of these did.
        crossover_steps: of a choice that does not grow with the run, T*: on runs of more steps BPTT holds more bytes
            between two steps.
        crossover_peak_steps: of the same, the number of steps beyond which BPTT needs more at its peak.
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
    extrapolated: bool = False
    crossover_steps: int | None = None
    crossover_peak_steps: int | None = None

    @property
    def macs_per_step(self) -> float:
        """Multiply-adds per step, on the average of the run."""
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
        """Return the choice as plain data, for JSON."""
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
            "extrapolated": self.extrapolated,
            "held_bytes": self.held_bytes,
            "held": dict(self.held),
            "peak_bytes": self.peak_bytes,
            "crossover_steps": self.crossover_steps,
            "crossover_peak_steps": self.crossover_peak_steps,
        }


@dataclass(frozen=True)
class Plan:
    """Predictions of what each learning method costs, for one cell, batch and number of steps. Made by ``rtrl.plan``.

    Attributes:
        cell: what the cell is called.
        steps: T.
        batch_size: B.
        state_size: H.
        parameter_size: P.
        dtype: of the state.
        memory_bytes: the budget, for ``peak_bytes``; None if there is none.
        rows: one ``Choice`` for each learning method.
        devices: device → multiply-adds per second at most.
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
        """Return whether a ``choice`` keeps within the budget."""
        return self.memory_bytes is None or choice.peak_bytes <= self.memory_bytes

    @property
    def best(self) -> Choice | None:
        """The exact choice that fits with the fewest multiply-adds; of two that are alike, the smaller; or None."""
        return _cheapest([choice for choice in self.rows if choice.exact and self.fits(choice)])

    @property
    def best_block(self) -> Choice | None:
        """The cheapest choice of ``BlockRTRL`` that fits; the smallest of them if none fits."""
        blocks = [choice for choice in self.rows if choice.method == "BlockRTRL"]
        fitting = _cheapest([choice for choice in blocks if self.fits(choice)])
        return fitting or min(blocks, key=lambda choice: choice.peak_bytes, default=None)

    @property
    def crossover_steps(self) -> int | None:
        """T*: on runs of more steps, BPTT holds more bytes than ``best_block``; None if there is no such choice. Each
        choice's own T* is its ``crossover_steps``, and ``crossover_peak_steps`` compares what is needed at once."""
        return None if self.best_block is None else self.best_block.crossover_steps

    def seconds_per_step(self, choice: Choice) -> dict[str, float]:
        """Return, for each device, the seconds per step of a ``choice`` at least: multiply-adds over the device's rate.

        Memory traffic, launches and Python come on top, and on small cells they are most of the time.
        """
        return {name: choice.macs_per_step / rate for name, rate in self.devices.items()}

    # ------------------------------------------------------------------ showing it

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for JSON."""

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
        """Return what ``rich`` shows: the choices, the verdict, the devices, and what the predictions rest on."""
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
        try:
            from rich.console import Console
        except ImportError:
            return self._lines()
        console = Console(width=150, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self.render())
        return captured.get()

    def _lines(self) -> str:
        """The choices in plain lines, for where the extra ``cli`` is not installed."""
        lines = [f"{self.cell}, {self.steps:,} steps, batch size {self.batch_size}"]
        for row in self.rows:
            held, peak = show_bytes(row.held_bytes), show_bytes(row.peak_bytes)
            best = "  <- best" if row == self.best else ""
            lines.append(
                f"  {row.name}: {row.macs_per_step:,.0f} multiply-adds per step, {held} held, peak {peak}{best}"
            )
        return "\n".join([*lines, *self.notes])

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
        for title in ("multiply-adds per step", "held", "at its peak", "T*: BPTT holds more beyond"):
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
                ("~ " if choice.extrapolated else "") + show_bytes(choice.peak_bytes) + ("" if fits else " too much"),
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
            if block.crossover_peak_steps is not None:
                words += f"; beyond {block.crossover_peak_steps:,}, it needs more at its peak"
        return Text(words + ".")

    def _device_table(self) -> "Table":
        from rich.table import Table

        chosen = self.best or self.best_block
        assert chosen is not None
        table = Table("device", title=f"{chosen.name}: time at least, multiply-adds alone", title_justify="left")
        for title in ("multiply-adds/s", "per step", "the run"):
            table.add_column(title, justify="right")
        for name, seconds in self.seconds_per_step(chosen).items():
            run = show_seconds(seconds * self.steps)
            table.add_row(name, show_count(self.devices[name]), show_seconds(seconds), run)
        return table


def _cheapest(choices: list[Choice]) -> Choice | None:
    return min(choices, key=lambda choice: (choice.macs, choice.peak_bytes), default=None)
