"""Which parameters are active when? Left open by the earlier work; here is the picture, from a real run.

**How it is measured.** A byte model (8 experts, 4 slots, float64) learns to predict real text by ``BlockRTRL`` and
Adam. Over the last steps, what the cell itself chooses is noted from the ``Sparsity`` that it returns: experts used,
slots read, slots written, one mark each. At some steps the gradient of the next state and of the loss is taken by plain
autograd, and every slice that is not marked must have a gradient of exactly zero in every parameter, and every unmarked
slot must be copied bit for bit: the picture shows all that is active, or the claim fails.

**Why that is fair.** Nothing is replayed; the run is one that learns, and autograd knows nothing of what is declared.

**What it leaves open.** Whether a use of experts is a good one: the table tells how even it is and how long they are
dormant.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import Plot, Series
from rtrl.tasks import ByteStream
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.problems import byte_model
from rtrl.verification.harness.routing_watch import WatchRouting
from rtrl.verification.show import table


@dataclass(frozen=True, slots=True)
class Config:
    """Steps of learning, the last of them that are drawn, the distance of those that are proven, and the learner's
    sizes."""

    steps: int = 800
    drawn: int = 300
    proven: int = 20
    block: int = 16
    window: int = 16
    rate: float = 5e-3


@dataclass(frozen=True, slots=True)
class Mark:
    """What one step touched."""

    step: int
    experts: list[int]
    reads: list[int]
    writes: list[int]


@dataclass(kw_only=True)
class Picture(Measurements):
    """The marks of the last steps, how many undeclared entries were active and how many were looked at, and the mean
    loss in bits per byte."""

    config: Config
    experts: int
    slots: int
    marks: list[Mark]
    strays: int = 0
    looked_at: int = 0
    bits: float = 0.0


def strays(cell: RecurrentMoE, x: Tensor, h: Tensor, used: Sparsity) -> tuple[int, int]:
    """Return (entries outside what is declared that are active, entries looked at), by plain autograd of one step."""
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


def dormancies(marks: list[Mark], experts: int) -> dict[int, tuple[int, int]]:
    """Return expert → (steps in use, longest dormancy between two uses or to an end)."""
    found = {}
    for expert in range(experts):
        used = [i for i, mark in enumerate(marks) if expert in mark.experts]
        edges = [-1, *used, len(marks)]
        found[expert] = len(used), max(b - a - 1 for a, b in pairwise(edges))
    return found


def verdict(m: Picture) -> Judgement:
    """Judge whether the picture is complete, and something was looked at."""
    if not m.looked_at:
        return Judgement.does_not_hold("nothing was compared")
    if m.strays:
        return Judgement.does_not_hold(f"{m.strays} entries outside the marks are active")
    return Judgement.holds()


def show(m: Picture) -> Shown:
    """Show the marks as rasters, and how even the use is."""
    n, by_expert = len(m.marks), dormancies(m.marks, m.experts)
    use = {expert: used for expert, (used, _) in by_expert.items()}
    shares = {expert: used / n for expert, used in use.items()}
    longest = {expert: length for expert, (_, length) in by_expert.items()}

    def touched(attribute: str) -> dict[int, int]:
        return {slot: sum(slot in getattr(mark, attribute) for mark in m.marks) for slot in range(m.slots)}

    def raster(title: str, label: str, parts: dict[str, str]) -> Plot:
        lines = []
        for name, attribute in parts.items():
            pairs = [(mark.step, index) for mark in m.marks for index in getattr(mark, attribute)]
            lines.append(Series(name, [float(step) for step, _ in pairs], [float(index) for _, index in pairs]))
        return Plot(title, "step", label, lines, kind="raster")

    title = f"Experts over the last {n} of {m.config.steps} steps ({m.bits:.2f} bits per byte)"
    return Shown(
        f"{n} steps drawn; experts in use {min(shares.values()):.0%} … {max(shares.values()):.0%} of the time, longest "
        f"dormancy {max(longest.values())} steps; {m.strays} of {m.looked_at:,} unmarked entries active",
        [
            table(title, "expert", {"steps in use": use, "share": shares, "longest dormancy": longest}),
            table("Slots", "slot", {"steps read": touched("reads"), "steps written": touched("writes")}),
        ],
        [
            raster("Experts used at each step", "expert", {"used": "experts"}),
            raster("Slots read and written at each step", "slot", {"read": "reads", "written": "writes"}),
        ],
    )


@claim(
    "patterns",
    claimed="one can see which parameters are active when (left open)",
    threshold="all that is active is in the picture",
    quick=Config(),
    full=Config(steps=20_000, drawn=600, proven=10),
    verdict=verdict,
    show=show,
)
def measure(config: Config, settings: Settings) -> Picture:
    """Learn, and note what the last steps touch."""
    stream = ByteStream(None, 1, steps=config.steps, dtype=torch.float64)
    cell = byte_model(settings.seed)
    learner = BlockRTRL(cell, 1, block=config.block, window=config.window)
    optimizer = torch.optim.Adam(cell.parameters(), lr=config.rate)
    m = Picture(config=config, experts=cell.n_experts, slots=cell.n_slots, marks=[])
    for t in range(config.steps):
        if t % 100 == 0:
            settings.progress(f"step {t}")
        x, target = stream[t]
        h = learner.state
        with WatchRouting(cell) as watch:
            y = learner.step(x)
        loss = F.cross_entropy(y, target)
        if t >= config.steps - config.drawn:
            used = watch.used
            assert used is not None
            assert used.reads is not None
            assert used.writes is not None
            m.marks.append(
                Mark(t, used.active["expert_up"][0].tolist(), used.reads[0].tolist(), used.writes[0].tolist())
            )
            m.bits += float(loss.detach()) / math.log(2) / config.drawn
            if t % config.proven == 0:
                wrong, looked = strays(cell, x, h, used)
                m.strays, m.looked_at = m.strays + wrong, m.looked_at + looked
        learner.backward(loss)
        if learner.at_block_end:
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()
    if m.strays:
        m.failures.append(f"{m.strays} of {m.looked_at} entries that are not declared active are")
    return m
