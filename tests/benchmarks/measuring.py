"""Where measured numbers go: beside their bars into the results, and then against them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from bars import BARS, SIZES, Sizes

from rtrl.report import Plot, Series


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

    def settle(self, measured: Mapping[str, float], *plots: Plot, **facts: str | float | Sequence[int]) -> None:
        """Store the numbers, then hold them to their bars.

        What was measured is in the results also where it does not reach its bar.

        Args:
            measured: name of a bar → number. plots: its curves. facts: what else one must know of the run.
        """
        values = {name: float(value) for name, value in measured.items()}
        self.benchmark.extra_info.update(
            size=self.size,
            threads=torch.get_num_threads(),
            measured=values,
            plots=[asdict(plot) for plot in plots],
            facts=facts,
        )
        missed = []
        for name, value in values.items():
            bar = BARS[name]
            gated = bar.kind == "count" or (self.size == "full" and (self.clock or bar.kind == "memory"))
            if gated and bar.reached(value, self.size) is False:
                missed.append(f"{name}: {value:.4g}{bar.unit} {bar.text}; the bar is {bar.asked(self.size)}")
        assert not missed, "\n".join(missed)


def curve(title: str, over: str, at: Sequence[float], unit: str, values: Mapping[str, Sequence[float]]) -> Plot:
    """A plot of several sides at several sizes, over logarithmic axes; steps are linear.

    Args:
        title, over, unit: of the plot, its x axis, its y axis. values: side → one number per size.
    """
    series = [Series(side, [float(x) for x in at], [float(y) for y in numbers]) for side, numbers in values.items()]
    return Plot(title, over, unit, series, log_x=over != "steps", log_y=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside ``with``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
