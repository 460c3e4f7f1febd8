"""BPTT was said to be impossible beyond 10 000 tokens.

**How it is measured.** For each of the four configurations, one sample and float32, in two ways. The peak of all
tensor bytes alive during plain backpropagation through time is measured at three lengths (autograd's saved tensors and
the backward pass; parameters are not counted). Growth is linear, which the third length checks, so that the bytes at
10⁴, 10⁵ and 10⁶ steps follow from a line. And a process that does nothing else takes 400 steps and keeps the graph:
by how much its resident memory grows a step from the 100th on. That is several times more than the tensors hold, since
each operation also leaves a node of the graph and each small tensor its own bookkeeping; and it is what fills this
machine's memory. In the full form config *quick* is really run over 10⁴ steps.

**Why that is fair.** It is this machine's physical memory that is compared, all of it. BPTT is what autograd does by
itself; checkpointing every √T steps would lengthen the limit a hundred-fold at twice the time, and truncation would
make it another gradient.

**What it leaves open.** A batch of B divides the limit by B; a GPU usually has less memory than its host.
"""

import os
from dataclasses import dataclass

from rtrl._utils.formatting import show_bytes
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.bptt_process import growth
from rtrl.verification.harness.memory import bptt_on_cpu
from rtrl.verification.harness.problems import CONFIGS, line, problem
from rtrl.verification.harness.threads import one_thread

CLAIMED = 10_000
COLUMNS = ("config", "P", "tensor bytes a step", "error of the line at the third length")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The configurations, the lengths of which two are fitted and the last checks, the lengths that are told from the
    fit, those between which a process grows, and how long BPTT is really run."""

    configs: tuple[str, ...] = tuple(CONFIGS)
    lengths: tuple[int, int, int] = (8, 24, 48)
    told: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    process: tuple[int, int] = (100, 400)
    really: int | None = None


QUICK = Sizes()
FULL = Sizes(lengths=(64, 256, 1024), really=10_000)


def physical_bytes() -> int | None:
    """The memory of this machine; None where the system does not tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def judge(limits: dict[str, float]) -> tuple[Verdict, str]:
    """The verdict from the longest stream that fits, by configuration."""
    told = ", ".join(f"{limit:,.0f} steps for {name}" for name, limit in limits.items())
    beyond = [name for name, limit in limits.items() if limit > CLAIMED]
    if not beyond:
        return "holds", ""
    if len(beyond) == len(limits):
        return "does not hold", f"this machine's memory is full at {told}"
    return "holds when", f"the model is larger than {', '.join(beyond)}: memory is full at {told}"


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """Bytes and limits; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    memory = physical_bytes()
    if memory is None:
        return Finding("", "> 10 000 steps do not fit", "not measured", "this system does not tell its memory")
    rows: list[list[str | int | float | None]] = []
    limits: dict[str, float] = {}
    curves = []
    pieces = len(sizes.configs) + 2
    progress("a process of its own", 0, pieces)
    grows = growth(sizes.configs, sizes.process, settings.seed)
    for done, name in enumerate(sizes.configs):
        progress(f"config {name}", done + 1, pieces)
        stream = problem(CONFIGS[name], 64, settings.seed)
        peaks = [bptt_on_cpu(stream, t) for t in sizes.lengths]
        start, rate = line(sizes.lengths[:2], peaks[:2])
        off = (start + rate * sizes.lengths[2]) / peaks[2] - 1
        told = [start + rate * t for t in sizes.told]
        limits[name] = memory / (grows[name] or rate)
        rows.append([name, stream.parameters, rate, off, *told, grows[name], limits[name]])
        curves.append(Series(name, [float(t) for t in sizes.told], told, dashed=True))
    really = None
    if sizes.really:
        progress(f"{sizes.really} steps", pieces - 1, pieces)
        really = bptt_on_cpu(problem(CONFIGS[sizes.configs[0]], 64, settings.seed), sizes.really)
        rows.append(
            [
                f"{sizes.configs[0]}, really run over {sizes.really} steps",
                None,
                None,
                None,
                really,
                None,
                None,
                None,
                None,
            ]
        )
    verdict, condition = judge(limits)
    if None in grows.values():
        condition = f"{condition}; by tensors alone, since this system does not tell a process's memory".lstrip("; ")
    curves.append(Series("this machine", [float(t) for t in sizes.told], [float(memory)] * len(sizes.told)))
    return Finding(
        ", ".join(f"{name} {limit:,.0f}" for name, limit in limits.items()) + f" steps fill {show_bytes(memory)}",
        "no more than 10 000 steps",
        verdict,
        condition,
        [],
        [
            Table(
                "Peak bytes of BPTT, one sample, float32",
                [*COLUMNS, *(f"T = {t:,}" for t in sizes.told), "of the process a step", "longest T here"],
                rows,
            )
        ],
        [Plot("Tensors of BPTT against this machine's memory", "T, steps", "bytes", curves, log_x=True, log_y=True)],
        {"limits": limits, "process_bytes_per_step": grows, "memory_bytes": memory, "really_bytes": really},
    )


CLAIM = Claim("bptt-limit", "BPTT is impossible beyond 10 000 tokens", measure)
