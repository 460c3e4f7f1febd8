"""Memory was claimed to differ by 0.5 % between T = 100, 500 and 1000; here it must not differ at all, up to 10⁶
steps.

**How it is measured.** Two models run through a stream with a loss at every step, each in a process that does nothing
else: a small mixture (3 slots of 4, 4 experts, top-2; the tree at work; 5000 steps, in the full form 10⁵), and a GRU
(H = 16; sequences of a block at once; 20 000 steps, in the full form 10⁶). Gradients are delivered every eight blocks.
The mixture uses every expert and slot once at the beginning. At every T of the table, right after a delivery, two
numbers are taken: the bytes the learner holds (``retained_bytes``: influence, tree, open block, gradients, state), and
the resident memory of the process. Bytes must be the same to the last one, and those of the mixture not less than what
a formula says of its influence and tree; a process may not grow by more than 1 % from the third T on.

**Why that is fair.** What is held is counted with the influence and the tree, experts become dormant and are
reactivated all the time, and the process would show what the count forgets. A control, a list that keeps every state,
would grow by 48 bytes and a Python object per step.

**What it leaves open.** Before every slice has been active once, the learner holds less, so a stream that uses an
expert late sees one step upward then; a learner on a GPU is in *gpu*.
"""

import math
from dataclasses import dataclass

from rtrl._utils.formatting import show_bytes
from rtrl.report.model import Table
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.memory import influence_bytes, tree_bytes
from rtrl.verification.harness.problems import Mixture
from rtrl.verification.harness.subprocesses import gru_bytes, online_bytes
from rtrl.verification.show import plot

RSS = 0.01
"""The share by which a process may grow."""

CLAIMED = 1_000_000
"""The number of steps up to which memory must be constant."""


@dataclass(frozen=True, slots=True)
class Config:
    """The mixture, the numbers of steps after which its bytes are taken, its learner's sizes; H, numbers of steps and
    block of the GRU."""

    mixture: Mixture = Mixture("small", 2, 2, 4, 3, 4)  # noqa: RUF009
    checkpoints: tuple[int, ...] = (100, 500, 1000, 5000)
    block: int = 20
    window: int = 8
    hidden: int = 16
    gru: tuple[int, ...] = (100, 500, 1000, 20_000)
    gru_block: int = 50


@dataclass(kw_only=True)
class Bytes(Measurements):
    """By model: bytes held by the learner, and of the process, after a number of steps; and the fewest bytes that the
    mixture's learner can hold, by formula."""

    held: dict[str, dict[int, int]]
    rss: dict[str, dict[int, int | None]]
    least: int

    def __post_init__(self) -> None:
        for name, held in self.held.items():
            if len(set(held.values())) != 1:
                self.failures.append(f"the bytes held change with T, {name}: {list(held.values())}")
            if self.growth(name) >= RSS:
                self.failures.append(f"the process grows by {self.growth(name):.1%}, {name}")
        mixture = next(iter(self.held.values()))
        if min(mixture.values()) < self.least:
            self.failures.append(f"the learner says {min(mixture.values())} bytes; the formula says {self.least}")

    def growth(self, name: str) -> float:
        """Return the growth of the process from the third checkpoint on, when it has warmed up; NaN if it is not
        known."""
        settled = [value for value in list(self.rss[name].values())[2:] if value]
        return max(settled) / settled[0] - 1 if len(settled) > 1 else math.nan

    @property
    def longest(self) -> int:
        """The longest run."""
        return max(max(held) for held in self.held.values())


def verdict(m: Bytes) -> Judgement:
    """Judge the bytes."""
    if m.failures:
        return Judgement.does_not_hold("; ".join(m.failures))
    if any(math.isnan(m.growth(name)) for name in m.held):
        return Judgement.holds_when("the bytes held are meant: this system does not report the process's")
    if m.longest < CLAIMED:
        return Judgement.not_at_claimed_size(f"up to {m.longest:,} of {CLAIMED:,} steps it holds")
    return Judgement.holds()


def show(m: Bytes) -> Shown:
    """Show the bytes over T."""
    parts, rows = [], []
    lines: dict[str, dict[int, int | None]] = {}
    most = max(max(held.values()) - min(held.values()) for held in m.held.values())
    for name, held in m.held.items():
        spread = max(held.values()) - min(held.values())
        parts.append(
            f"{name}: {show_bytes(min(held.values()))} held at every T up to {max(held):,}, difference {spread} "
            f"bytes, process {m.growth(name):+.2%}"
        )
        rows += [[name, t, value, m.rss[name][t]] for t, value in held.items()]
        lines[f"held, {name}"] = dict(held)
        if all(m.rss[name].values()):
            lines[f"the process, {name}"] = m.rss[name]
    return Shown(
        "; ".join(parts),
        [Table("Bytes after T steps, one sample, float32", ["model", "T", "held", "process"], rows)],
        [plot("Bytes held and bytes of the process over T", "T, steps", "bytes", lines, log="xy")],
        headline=f"The bytes that BlockRTRL holds differ by {most} between the shortest stream and {m.longest:,} steps",
        model=f"{', '.join(m.held)}; T up to {m.longest:,}, one sample, one seed",
    )


@claim(
    "memory-constant",
    claimed="memory at T = 100, 500, 1000 differs by 0.5 %",
    threshold=f"difference 0 bytes; process < {RSS:.0%}",
    quick=Config(checkpoints=(100, 500, 1000, 2000), gru=(100, 500, 1000, 20_000)),
    full=Config(checkpoints=(100, 500, 1000, 10_000, 100_000), gru=(100, 500, 1000, 10_000, 100_000, 1_000_000)),
    verdict=verdict,
    show=show,
    question="memory",
    small=Config(checkpoints=(50, 150, 200, 300), block=4, gru=(50, 100, 150, 200)),
    noticed_breaks=("leak", "keep-states", "uncounted-influence"),
)
def measure(config: Config, settings: Settings) -> Bytes:
    """Take the bytes in new processes."""
    settings.progress(f"{max(config.checkpoints)} steps of the mixture")
    mixture = online_bytes(config.mixture, config.checkpoints, config.block, config.window, settings.seed)
    settings.progress(f"{max(config.gru)} steps of the GRU")
    gru = gru_bytes(config.hidden, config.gru, config.gru_block, settings.seed)
    runs = {
        f"mixture, H = {config.mixture.hidden}": (config.checkpoints, mixture),
        f"GRU, H = {config.hidden}": (config.gru, gru),
    }
    held = {
        name: {t: value or 0 for t, value in zip(steps, found["held_bytes"], strict=True)}
        for name, (steps, found) in runs.items()
    }
    rss = {name: dict(zip(steps, found["rss_bytes"], strict=True)) for name, (steps, found) in runs.items()}
    least = influence_bytes(config.mixture) + tree_bytes(config.mixture, config.block, config.window)
    return Bytes(held=held, rss=rss, least=least)
