"""How much memory does a GPU really need? Left open by the earlier work.

**How it is measured.** Where PyTorch finds a CUDA device, the table of *memory-table* once more, config *quick*, but
by the allocator's own peaks (``torch.cuda.max_memory_allocated`` above what was allocated before): backpropagation
through time at each T, and ``BlockRTRL`` after as many steps, every expert and slot laid down once at the beginning.
The online learner's peak may not grow with T.

**Why that is fair.** The allocator counts whatever it hands out, rounding and scratch memory of kernels included, on
both sides alike.

**What it leaves open.** Nothing is measured where there is no device, and nothing is estimated in its place. What the
CUDA context itself takes, some hundreds of megabytes, is outside the allocator.
"""

from dataclasses import dataclass

import torch

from rtrl._utils.formatting import show_bytes
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness import problems
from rtrl.verification.harness.memory import CudaPeak, between_blocks, bptt_peak, wake_all
from rtrl.verification.harness.problems import Mixture, Run, problem


@dataclass(frozen=True, slots=True)
class Sizes:
    """The configuration, the lengths, and the learner's sizes."""

    mixture: Mixture = problems.QUICK
    lengths: tuple[int, ...] = (32, 128, 512, 1024)
    block: int = 16
    window: int = 16


QUICK = Sizes()
FULL = Sizes(lengths=(32, 128, 512, 1024, 4096, 16_384))


def judge(bptt: dict[int, int], rtrl: dict[int, int]) -> tuple[Verdict, str]:
    """The verdict: the online learner's peak is flat, and lower from some length on."""
    longest = max(bptt)
    if rtrl[longest] < bptt[longest]:
        first = next(t for t in sorted(bptt) if rtrl[t] < bptt[t])
        return "holds when", f"T is {first} or more: there the learner's {show_bytes(rtrl[first])} are less than BPTT's"
    return "does not hold", f"up to T = {longest} BPTT takes less: {show_bytes(bptt[longest])}"


def _device(settings: Settings) -> str:
    """The CUDA device that was asked for, the present one if another kind was."""
    return settings.device if settings.device.startswith("cuda") else "cuda"


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """The table, where there is a device; ``sizes`` to run less."""
    if not torch.cuda.is_available():
        return Finding("—", "allocator peaks", "not measured", "no device")
    sizes = sizes or (FULL if settings.full else QUICK)
    device = _device(settings)
    failures: list[str] = []
    stream = problem(sizes.mixture, 256, settings.seed, device=device)
    bptt_peak(stream, 2, lambda: CudaPeak(device))  # what libraries allocate once
    progress("BlockRTRL", 0, len(sizes.lengths) + 1)
    rtrl: dict[int, int] = {}
    held: dict[int, int] = {}
    meter = CudaPeak(device)
    run = Run(stream, block=sizes.block, window=sizes.window)
    wake_all(run)
    for t in sizes.lengths:
        run.advance(t - run.t)
        run.deliver()
        rtrl[t], held[t] = meter.peak, between_blocks(run.learner)
    if len(set(held.values())) != 1:
        failures.append(f"what BlockRTRL holds after a delivery changes with T: {held}")
    settled = [rtrl[t] for t in sizes.lengths[1:]]
    if settled and settled[-1] > 1.05 * settled[0]:
        failures.append(f"the allocator's peak grows with T: {rtrl}")
    del run
    bptt: dict[int, int] = {}
    for done, t in enumerate(sizes.lengths):
        progress(f"BPTT over {t} steps", done + 1, len(sizes.lengths) + 1)
        bptt[t] = bptt_peak(stream, t, lambda: CudaPeak(device))
    verdict, condition = judge(bptt, rtrl)
    at = [float(t) for t in sizes.lengths]
    return Finding(
        f"at T = {max(bptt)}: BPTT {show_bytes(bptt[max(bptt)])}, BlockRTRL {show_bytes(rtrl[max(rtrl)])}, on "
        f"{torch.cuda.get_device_name(device)}",
        "allocator peaks; RTRL flat in T and below BPTT",
        verdict,
        condition,
        failures,
        [
            Table(
                f"Allocator peaks, config {sizes.mixture.name}, bytes",
                ["T", "BPTT", "BlockRTRL", "BlockRTRL between steps"],
                [[t, bptt[t], rtrl[t], held[t]] for t in sizes.lengths],
            )
        ],
        [
            Plot(
                "Peak of the CUDA allocator over T",
                "T, steps",
                "bytes",
                [
                    Series("BPTT", at, [float(v) for v in bptt.values()]),
                    Series("BlockRTRL", at, [float(v) for v in rtrl.values()]),
                ],
                log_x=True,
                log_y=True,
            )
        ],
        {"bptt": {str(t): v for t, v in bptt.items()}, "rtrl": {str(t): v for t, v in rtrl.items()}},
    )


CLAIM = Claim("gpu", "what a GPU really takes (left open)", measure)
