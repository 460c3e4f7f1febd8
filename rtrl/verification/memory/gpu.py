"""How much memory does a GPU really need? Left open by the earlier work.

**How it is measured.** Where PyTorch finds a CUDA device, the table of *memory-table* once more, config *quick*, but
by the allocator's own peaks (``torch.cuda.max_memory_allocated`` above what was allocated before): backpropagation
through time at each T, and ``BlockRTRL`` after as many steps, every expert and slot used once at the beginning. The
online learner's peak may not grow with T.

**Why that is fair.** The allocator counts everything it hands out, rounding and scratch memory of kernels included, on
both sides alike.

**What it leaves open.** Without a device nothing is measured, and nothing is estimated in its place. What the
CUDA context itself takes, some hundreds of megabytes, is outside the allocator.
"""

from dataclasses import dataclass

import torch

from rtrl._utils.formatting import show_bytes
from rtrl.verification.claim import Judgement, Measurements, NotMeasured, Settings, Shown, claim
from rtrl.verification.harness import problems
from rtrl.verification.harness.memory import CudaPeak, bptt_peak, bytes_after_sync, use_all_slices
from rtrl.verification.harness.problems import LearnerRun, Mixture, problem
from rtrl.verification.show import plot, table


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration, the lengths, and the learner's sizes."""

    mixture: Mixture = problems.QUICK
    lengths: tuple[int, ...] = (32, 128, 512, 1024)
    block: int = 16
    window: int = 16


@dataclass(kw_only=True)
class Peaks(Measurements):
    """Peak bytes by T, bytes held between steps, and the device."""

    config: Config
    bptt: dict[int, int]
    rtrl: dict[int, int]
    held: dict[int, int]
    device: str


def verdict(m: Peaks) -> Judgement:
    """Judge whether the online learner's peak is lower from some length on."""
    longest = max(m.bptt)
    if m.rtrl[longest] >= m.bptt[longest]:
        return Judgement.does_not_hold(f"up to T = {longest} BPTT takes less: {show_bytes(m.bptt[longest])}")
    first = next(t for t in sorted(m.bptt) if m.rtrl[t] < m.bptt[t])
    less = show_bytes(m.rtrl[first])
    return Judgement.holds_when(f"T is {first} or more: there the learner's {less} are less than BPTT's")


def show(m: Peaks) -> Shown:
    """Show the peaks over T."""
    t, columns = max(m.bptt), {"BPTT": m.bptt, "BlockRTRL": m.rtrl}
    title = f"Allocator peaks, config {m.config.mixture.name}, bytes"
    return Shown(
        f"at T = {t}: BPTT {show_bytes(m.bptt[t])}, BlockRTRL {show_bytes(m.rtrl[t])}, on {m.device}",
        [table(title, "T", {**columns, "BlockRTRL between steps": m.held})],
        [plot("Peak of the CUDA allocator over T", "T, steps", "bytes", columns, log="xy")],
        model=f"RecurrentMoE, config {m.config.mixture.name}: H = {m.config.mixture.hidden}, T up to {t:,}; one seed",
    )


def _device(settings: Settings) -> str:
    """Return the CUDA device of the settings, or the present one if they name another kind."""
    return settings.device if settings.device.startswith("cuda") else "cuda"


@claim(
    "gpu",
    claimed="what a GPU really takes (left open)",
    threshold="allocator peaks; RTRL flat in T and below BPTT",
    quick=Config(),
    full=Config(lengths=(32, 128, 512, 1024, 4096, 16_384)),
    verdict=verdict,
    show=show,
    question="memory",
    noticed_breaks=("leak", "keep-states"),
)
def measure(config: Config, settings: Settings) -> Peaks:
    """Take the allocator's peaks, where there is a device."""
    if not torch.cuda.is_available():
        raise NotMeasured("no device")
    device = _device(settings)
    stream = problem(config.mixture, 256, settings.seed, device=device)
    bptt_peak(stream, 2, lambda: CudaPeak(device))  # what libraries allocate once
    settings.progress("BlockRTRL")
    m = Peaks(config=config, bptt={}, rtrl={}, held={}, device=torch.cuda.get_device_name(device))
    meter = CudaPeak(device)
    run = LearnerRun(stream, block=config.block, window=config.window)
    use_all_slices(run)
    for t in config.lengths:
        run.advance(t - run.t)
        run.sync()
        m.rtrl[t], m.held[t] = meter.peak, bytes_after_sync(run.learner)
    if len(set(m.held.values())) != 1:
        m.failures.append(f"what BlockRTRL holds after a delivery changes with T: {m.held}")
    settled = [m.rtrl[t] for t in config.lengths[1:]]
    if settled and settled[-1] > 1.05 * settled[0]:
        m.failures.append(f"the allocator's peak grows with T: {m.rtrl}")
    del run
    for t in config.lengths:
        settings.progress(f"BPTT over {t} steps")
        m.bptt[t] = bptt_peak(stream, t, lambda: CudaPeak(device))
    return m
