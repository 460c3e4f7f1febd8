"""Memory was claimed to differ by 0.5 % between T = 100, 500 and 1000; here it must not differ at all, up to 10⁶
steps.

**How it is measured.** A small mixture (3 slots of 4, 4 experts, top-2, float32) runs through a stream with a loss at
every step, in a process that does nothing else, its gradients delivered every eight blocks. Every expert and slot is
used once at the beginning. At T = 100, 500, 1000 and 5000 (10⁴, 10⁵ and 10⁶ in the full form), right after a delivery,
two numbers are taken: the bytes the learner holds (``retained_bytes``: influence, tree, open block, gradients, state; a
test holds that count against the tensors alive), and the resident memory of the process. Bytes must be the same to the
last one; the process may not grow by more than 1 % from T = 1000 on.

**Why that is fair.** What is held is counted with the influence and the tree, experts become dormant and are
reactivated all the time, and the process would show what the count forgets. A control, a list that keeps every state,
would grow by 48 bytes and a Python object per step.

**What it leaves open.** Before every slice has been active once, the learner holds less, so a stream that uses an
expert late sees one step upward then; a learner on a GPU is in *gpu*.
"""

import math
from dataclasses import dataclass

from rtrl._utils.formatting import show_bytes
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.problems import Mixture
from rtrl.verification.harness.subprocesses import online_bytes
from rtrl.verification.show import plot, table

RSS = 0.01
"""The share by which the process may grow."""


@dataclass(frozen=True, slots=True)
class Config:
    """The model, the numbers of steps after which bytes are taken, and the learner's sizes."""

    mixture: Mixture = Mixture("small", 2, 2, 4, 3, 4)  # noqa: RUF009
    checkpoints: tuple[int, ...] = (100, 500, 1000, 5000)
    block: int = 20
    window: int = 8


@dataclass(kw_only=True)
class Bytes(Measurements):
    """Bytes held by the learner, and of the process, after a number of steps."""

    held: dict[int, int]
    rss: dict[int, int | None]

    def __post_init__(self) -> None:
        if len(set(self.held.values())) != 1:
            self.failures.append(f"the bytes held change with T: {list(self.held.values())}")
        if self.growth >= RSS:
            self.failures.append(f"the process grows by {self.growth:.1%}")

    @property
    def growth(self) -> float:
        """The growth of the process from the third checkpoint on, when it has warmed up; NaN if it is not known."""
        settled = [value for value in list(self.rss.values())[2:] if value]
        return max(settled) / settled[0] - 1 if len(settled) > 1 else math.nan


def verdict(m: Bytes) -> Judgement:
    """Judge the bytes."""
    if m.failures:
        return Judgement.does_not_hold("; ".join(m.failures))
    if math.isnan(m.growth):
        return Judgement.holds_when("the bytes held are meant: this system does not report the process's")
    return Judgement.holds()


def show(m: Bytes) -> Shown:
    """Show the bytes over T."""
    held, process = m.held.values(), {"the process": m.rss} if all(m.rss.values()) else {}
    title, lines = "Bytes held and bytes of the process over T", {"held by the learner": m.held, **process}
    return Shown(
        f"{show_bytes(min(held))} held at every T up to {max(m.held):,}, difference {max(held) - min(held)} bytes; "
        f"process {m.growth:+.2%}",
        [table("Bytes after T steps", "T", {"held": m.held, "process": m.rss})],
        [plot(title, "T, steps", "bytes", lines, log="xy")],
    )


@claim(
    "memory-constant",
    claimed="memory at T = 100, 500, 1000 differs by 0.5 %",
    threshold=f"difference 0 bytes; process < {RSS:.0%}",
    quick=Config(),
    full=Config(checkpoints=(100, 500, 1000, 10_000, 100_000, 1_000_000)),
    verdict=verdict,
    show=show,
)
def measure(config: Config, settings: Settings) -> Bytes:
    """Take the bytes in a new process."""
    settings.progress(f"{max(config.checkpoints)} steps")
    found = online_bytes(config.mixture, config.checkpoints, config.block, config.window, settings.seed)
    held, rss = (dict(zip(config.checkpoints, found[name], strict=True)) for name in ("held_bytes", "rss_bytes"))
    return Bytes(held={t: value or 0 for t, value in held.items()}, rss=rss)
