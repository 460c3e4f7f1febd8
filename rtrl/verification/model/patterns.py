"""Which parameters are active when? Left open by the earlier work; here is the picture, from a real run.

**How it is measured.** A byte model (8 experts, 4 slots, float64) learns to predict real text by ``BlockRTRL`` and
Adam. Over the last steps, whatever the cell itself chooses is noted from the ``Sparsity`` that it returns: experts
used, slots read, slots written, one mark each. At some steps the gradient of the next state and of the loss is taken
by plain autograd, and every slice that is not marked must have a gradient of exactly zero in every parameter, and
every unmarked slot must be copied bit for bit: the picture shows all that is active, or the claim fails.

**Why that is fair.** Nothing is laid down; the run is one that learns, and autograd knows nothing of what is
declared.

**What it leaves open.** Whether a use of experts is a good one: the table tells how even it is and how long they
sleep.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional as F

from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.tasks import ByteStream
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.models import byte_model
from rtrl.verification.harness.threads import one_thread


@dataclass(frozen=True, slots=True)
class Sizes:
    """Steps of learning, of them the last that are drawn, every how many one is proven, and the learner's sizes."""

    steps: int = 800
    drawn: int = 300
    proven: int = 20
    block: int = 16
    window: int = 16
    rate: float = 5e-3


QUICK = Sizes()
FULL = Sizes(steps=20_000, drawn=600, proven=10)


@dataclass(frozen=True, slots=True)
class Mark:
    """What one step touched."""

    step: int
    experts: list[int]
    reads: list[int]
    writes: list[int]


def strays(cell: RecurrentMoE, x: torch.Tensor, h: torch.Tensor, used: Sparsity) -> tuple[int, int]:
    """(entries of gradients and state outside what is declared that are not what they should be, entries looked at),
    by plain autograd of one step."""
    y, h_next, _ = cell(x, h)
    assert used.writes is not None
    total = y.square().sum() + (h_next * torch.linspace(1, 2, h_next.numel(), dtype=h.dtype).view_as(h_next)).sum()
    gradients = torch.autograd.grad(total, list(cell.parameters()), materialize_grads=True)
    wrong = looked = 0
    for (name, p), gradient in zip(cell.named_parameters(), gradients, strict=True):
        if name in used.active:
            outside = torch.ones(p.shape[0], dtype=torch.bool)
            outside[used.active[name][0]] = False
            wrong += int(gradient[outside].count_nonzero())
            looked += gradient[outside].numel()
    kept = torch.ones(h.shape[1], dtype=torch.bool)
    kept[used.writes[0]] = False
    return wrong + int((h_next[0, kept] != h[0, kept]).sum()), looked + h[0, kept].numel()


def run(sizes: Sizes, seed: int, progress: Progress) -> tuple[list[Mark], int, int, float]:
    """The marks of the last steps, strays among how many entries, and the mean loss there in bits a byte."""
    stream = ByteStream(None, 1, steps=sizes.steps, dtype=torch.float64)
    cell = byte_model(seed, torch.device("cpu"))
    learner = BlockRTRL(cell, 1, block=sizes.block, window=sizes.window)
    optimizer = torch.optim.Adam(cell.parameters(), lr=sizes.rate)
    marks: list[Mark] = []
    seen: list[Sparsity] = []
    wrong = looked = 0
    bits = 0.0

    def note(
        module: torch.nn.Module, args: object, kwargs: dict[str, object], out: tuple[object, object, Sparsity]
    ) -> None:
        if kwargs.get("replay") is None:
            seen.append(out[2])

    for t in range(sizes.steps):
        if t % 100 == 0:
            progress(f"step {t}", t, sizes.steps)
        x, target = stream[t]
        h = learner.state
        handle = cell.register_forward_hook(note, with_kwargs=True)
        y = learner.step(x)
        handle.remove()
        used = seen[-1]
        seen.clear()
        loss = F.cross_entropy(y, target)
        if t >= sizes.steps - sizes.drawn:
            assert used.reads is not None
            assert used.writes is not None
            experts = used.active["expert_up"][0].tolist()
            marks.append(Mark(t, experts, used.reads[0].tolist(), used.writes[0].tolist()))
            bits += float(loss.detach()) / 0.6931471805599453 / sizes.drawn
            if t % sizes.proven == 0:
                some, entries = strays(cell, x, h, used)
                wrong, looked = wrong + some, looked + entries
        learner.backward(loss)
        if learner.at_block_end:
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()
    return marks, wrong, looked, bits


def sleeps(marks: list[Mark], experts: int) -> dict[int, tuple[int, int]]:
    """Expert → (steps in use, longest sleep between two uses or to an end)."""
    found = {}
    for expert in range(experts):
        used = [i for i, mark in enumerate(marks) if expert in mark.experts]
        edges = [-1, *used, len(marks)]
        found[expert] = len(used), max(b - a - 1 for a, b in pairwise(edges))
    return found


def judge(wrong: int, looked: int) -> tuple[Verdict, str]:
    """The verdict: the picture is complete, and something was looked at."""
    if not looked:
        return "does not hold", "nothing was compared"
    return ("holds", "") if not wrong else ("does not hold", f"{wrong} entries outside the marks are active")


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """The picture; ``sizes`` to run less."""
    sizes = sizes or (FULL if settings.full else QUICK)
    with one_thread():
        marks, wrong, looked, bits = run(sizes, settings.seed, progress)
    failures = [f"{wrong} of {looked} entries that are not declared active are"] if wrong else []
    verdict, condition = judge(wrong, looked)
    n_experts, n_slots = 8, 4
    by_expert = sleeps(marks, n_experts)

    def raster(title: str, label: str, parts: dict[str, str]) -> Plot:
        series = []
        for name, attribute in parts.items():
            pairs = [(mark.step, index) for mark in marks for index in getattr(mark, attribute)]
            series.append(Series(name, [float(step) for step, _ in pairs], [float(index) for _, index in pairs]))
        return Plot(title, "step", label, series, kind="raster")

    in_use = [used / len(marks) for used, _ in by_expert.values()]
    return Finding(
        f"{len(marks)} steps drawn; experts in use {min(in_use):.0%} … {max(in_use):.0%} of the time, longest sleep "
        f"{max(longest for _, longest in by_expert.values())} steps; {wrong} of {looked:,} unmarked entries active",
        "all that is active is in the picture",
        verdict,
        condition,
        failures,
        [
            Table(
                f"Experts over the last {len(marks)} of {sizes.steps} steps ({bits:.2f} bits a byte)",
                ["expert", "steps in use", "share", "longest sleep"],
                [[expert, used, used / len(marks), longest] for expert, (used, longest) in by_expert.items()],
            ),
            Table(
                "Slots",
                ["slot", "steps read", "steps written"],
                [
                    [slot, sum(slot in mark.reads for mark in marks), sum(slot in mark.writes for mark in marks)]
                    for slot in range(n_slots)
                ],
            ),
        ],
        [
            raster("Experts used at each step", "expert", {"used": "experts"}),
            raster("Slots read and written at each step", "slot", {"read": "reads", "written": "writes"}),
        ],
        {"bits_per_byte": bits, "strays": wrong, "looked_at": looked},
    )


CLAIM = Claim("patterns", "one can see which parameters are active when (left open)", measure)
