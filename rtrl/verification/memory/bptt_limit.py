"""BPTT was said to be impossible beyond 10 000 tokens.

**How it is measured.** For each of the four configurations, one sample and float32, in two ways. The peak of all
tensor bytes alive during plain backpropagation through time is measured at three lengths (autograd's saved tensors and
the backward pass; parameters are not counted). Growth is linear, which the third length checks, so that the bytes at
10⁴, 10⁵ and 10⁶ steps follow from a line. And a process that does nothing else takes 400 steps and keeps the graph:
by how much its resident memory grows per step from the 100th on. That is several times more than the tensors hold,
since each operation also leaves a node of the graph and each small tensor its own bookkeeping; and it is what fills
this machine's memory. In the full form config *quick* is really run over 10⁴ steps. Beside each stands what the bytes
of exact online learning (the influence and the tree, block 1, window 16) buy as a horizon of truncated BPTT.

**Why that is fair.** It is this machine's physical memory that is compared, all of it. BPTT is what autograd does by
itself; checkpointing every √T steps would lengthen the limit a hundred-fold at twice the time. Truncated BPTT has no
limit at all: its gradient is another one, which sees no further than its horizon.

**What it leaves open.** A batch of B divides the limit by B; a GPU usually has less memory than its host.
"""

from dataclasses import dataclass, replace

from rtrl._utils.formatting import show_bytes
from rtrl.report.model import Cell, Table
from rtrl.verification.claim import Judgement, Measurements, NotMeasured, Settings, Shown, claim
from rtrl.verification.harness.measuring import fit_line
from rtrl.verification.harness.memory import bptt_on_cpu, influence_bytes, tree_bytes
from rtrl.verification.harness.problems import CONFIGS, problem
from rtrl.verification.harness.subprocesses import bptt_growth, physical_bytes
from rtrl.verification.show import plot

CLAIMED = 10_000
COLUMNS = ("config", "P", "tensor bytes per step", "error of the line at the third length")


@dataclass(frozen=True, slots=True)
class Config:
    """How much is measured."""

    configs: tuple[str, ...] = tuple(CONFIGS)  # the configurations
    lengths: tuple[int, int, int] = (8, 24, 48)  # the lengths of which two are fitted and the last one checks
    extrapolated: tuple[int, ...] = (10_000, 100_000, 1_000_000)  # the lengths that are read off the line
    process: tuple[int, int] = (100, 400)  # the steps between which a process grows
    really: int | None = None  # how long BPTT is really run; None for not at all


@dataclass(frozen=True, slots=True)
class Growth:
    """One configuration: P, peaks at the three lengths, bytes per step of a process (None if not known), and those of
    exact online learning, by formula."""

    parameters: int
    peaks: tuple[int, ...]
    process: float | None
    online: int


@dataclass(kw_only=True)
class Limits(Measurements):
    """The growth of every configuration, this machine's memory, and the peak of the really run one."""

    config: Config
    memory: int
    grown: dict[str, Growth]
    really: int | None

    def line(self, name: str) -> tuple[float, float]:
        """Return the line through the peaks at the first two lengths."""
        return fit_line(self.config.lengths[:2], self.grown[name].peaks[:2])

    @property
    def horizons(self) -> dict[str, float]:
        """The horizon of truncated BPTT that takes the bytes of exact online learning, by configuration."""
        lines = {name: self.line(name) for name in self.grown}
        return {name: (self.grown[name].online - start) / rate for name, (start, rate) in lines.items()}

    @property
    def limits(self) -> dict[str, float]:
        """The longest stream that fits, by configuration."""
        return {name: self.memory / (growth.process or self.line(name)[1]) for name, growth in self.grown.items()}


def verdict(m: Limits) -> Judgement:
    """Judge the limits; say what truncated BPTT needs, and where a process's memory is not known."""
    found = judge(m.limits)
    most = max(m.horizons.values())
    also = (
        "it is not the only practical way beyond them: TBPTT has no limit, and with the bytes of exact online learning "
        f"it sees up to {most:,.0f} steps back"
    )
    found = replace(found, condition=f"{found.condition}; {also}".lstrip("; "))
    if all(growth.process is not None for growth in m.grown.values()):
        return found
    more = f"{found.condition}; by tensors alone, since this system does not report a process's memory"
    return replace(found, condition=more.lstrip("; "))


def judge(limits: dict[str, float]) -> Judgement:
    """Judge the longest stream that fits, by configuration."""
    listed = ", ".join(f"{limit:,.0f} steps for {name}" for name, limit in limits.items())
    beyond = [name for name, limit in limits.items() if limit > CLAIMED]
    if not beyond:
        return Judgement.holds()
    if len(beyond) == len(limits):
        return Judgement.does_not_hold(f"this machine's memory is full at {listed}")
    return Judgement.holds_when(f"the model is larger than {', '.join(beyond)}: memory is full at {listed}")


def show(m: Limits) -> Shown:
    """Show bytes over T and the limits."""
    config, limits = m.config, m.limits
    rows: list[list[Cell]] = []
    lines: dict[str, dict[int, float]] = {}
    for name, growth in m.grown.items():
        start, rate = m.line(name)
        off = (start + rate * config.lengths[2]) / growth.peaks[2] - 1
        lines[name] = {t: start + rate * t for t in config.extrapolated}
        ends = [growth.process, limits[name], growth.online, m.horizons[name]]
        rows.append([name, growth.parameters, rate, off, *lines[name].values(), *ends])
    if m.really:
        empty = [None] * (len(config.extrapolated) + 3)
        rows.append([f"{config.configs[0]}, really run over {config.really} steps", None, None, None, m.really, *empty])
    columns = [*COLUMNS, *(f"T = {t:,}" for t in config.extrapolated), "of the process per step", "longest T here"]
    columns += ["bytes of exact online learning", "horizon of TBPTT for these"]
    title, level = "Tensors of BPTT against this machine's memory", dict.fromkeys(config.extrapolated, m.memory)
    return Shown(
        ", ".join(f"{name} {limit:,.0f}" for name, limit in limits.items()) + f" steps fill {show_bytes(m.memory)}",
        [Table("Peak bytes of BPTT, one sample, float32", columns, rows)],
        [plot(title, "T, steps", "bytes", {**lines, "this machine": level}, dashed=lines, log="xy")],
        model="; ".join(f"mixture {name}: P = {growth.parameters:,}" for name, growth in m.grown.items())
        + f"; T up to {config.really or max(config.lengths):,}, longer ones extrapolated; one seed",
    )


@claim(
    "bptt-limit",
    claimed="BPTT is impossible beyond 10 000 tokens",
    threshold="no more than 10 000 steps",
    quick=Config(),
    full=Config(lengths=(64, 256, 1024), really=10_000),
    verdict=verdict,
    show=show,
    question="memory",
    small=Config(("quick",), (3, 6, 9), process=(50, 150)),
    no_break="backpropagation by autograd is measured, on cells as they are: no part of the learners takes part",
)
def measure(config: Config, settings: Settings) -> Limits:
    """Measure bytes and growth of every configuration."""
    memory = physical_bytes()
    if memory is None:
        raise NotMeasured("this system does not report its memory")
    settings.progress("a new process")
    process = bptt_growth(config.configs, config.process, settings.seed)
    grown = {}
    for name in config.configs:
        settings.progress(f"config {name}")
        stream = problem(CONFIGS[name], 64, settings.seed)
        peaks = tuple(bptt_on_cpu(stream, t) for t in config.lengths)
        online = influence_bytes(CONFIGS[name]) + tree_bytes(CONFIGS[name], 1, 16)
        grown[name] = Growth(stream.parameters, peaks, process[name], online)
    really = None
    if config.really:
        settings.progress(f"{config.really} steps")
        really = bptt_on_cpu(problem(CONFIGS[config.configs[0]], 64, settings.seed), config.really)
    return Limits(config=config, memory=memory, grown=grown, really=really)
