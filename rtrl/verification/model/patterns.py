"""Which parameters are active when? Left open by the earlier work; here is the picture, from a real run.

**How it is measured.** A byte model (8 experts, 4 slots, float64) learns to predict real text by ``BlockRTRL`` and
Adam; its loss has a term that balances the experts (``load_balancing_loss``). Over the last steps, what the cell itself
chooses is noted from the ``Sparsity`` that it returns: experts used, slots read, slots written, one mark each. At some
steps the gradient of the next state and of the loss is taken by plain autograd, and every slice that is not marked must
have a gradient of exactly zero in every parameter, and every unmarked slot must be copied bit for bit: the picture
shows all that is active, or the claim fails. An expert that is not used in the whole second half of the run is *dead*;
it is counted apart from those that are *dormant*, which are used again.

**Why that is fair.** Nothing is replayed; the run is one that learns, and autograd knows nothing of what is declared.
Dormancy saves something only if experts are used again: a dead expert is capacity lost.

**What it leaves open.** Whether a use of experts is a good one: the table tells how even it is and how long they are
dormant. The same run without the balancing term stands beside it. The quick run has `d_model` 8, the full one 32.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.cells.routing import MoEOutput, load_balancing_loss
from rtrl.errors import RTRLError
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.report.model import Plot, Series
from rtrl.tasks import ByteStream
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.problems import byte_model
from rtrl.verification.harness.routing_watch import WatchRouting
from rtrl.verification.show import table

CLAIMED_WIDTH = 32


@dataclass(frozen=True, slots=True)
class Config:
    """Steps of learning, the last of them that are drawn, the distance of those that are proven, the learner's sizes,
    the weight of the balancing term, the model's widths, and whether a run without balancing stands beside."""

    steps: int = 600
    drawn: int = 300
    proven: int = 20
    block: int = 16
    window: int = 16
    rate: float = 5e-3
    balance: float = 1.0
    d_model: int = 8
    hidden: int = 8
    compared: bool = True


@dataclass(frozen=True, slots=True)
class Mark:
    """What one step touched."""

    step: int
    experts: list[int]
    reads: list[int]
    writes: list[int]


@dataclass(kw_only=True)
class Picture(Measurements):
    """The marks of the last steps, how many undeclared entries were active and how many were looked at, the mean loss
    in bits per byte, and how often each expert was used in the second half: balanced, and without the
    balancing term; P."""

    config: Config
    experts: int
    slots: int
    marks: list[Mark]
    strays: int = 0
    looked_at: int = 0
    bits: float = 0.0
    uses: list[int] = field(default_factory=list)
    unbalanced: list[int] = field(default_factory=list)
    parameters: int = 0

    @property
    def dead(self) -> list[int]:
        """The experts that are not used in the second half of the run."""
        return [expert for expert, count in enumerate(self.uses) if not count]


def strays(cell: RecurrentMoE, x: Tensor, h: Tensor, used: Sparsity) -> tuple[int, int]:
    """Return (entries outside what is declared that are active, entries looked at), by plain autograd of one step."""
    y, h_next, _ = cell(x, h)
    assert used.writes is not None
    output = y.output if isinstance(y, MoEOutput) else y
    total = output.square().sum() + (h_next * torch.linspace(1, 2, h_next.numel(), dtype=h.dtype).view_as(h_next)).sum()
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
    """Judge whether the picture is complete, something was looked at, and no expert is dead."""
    if not m.looked_at:
        return Judgement.does_not_hold("nothing was compared")
    if m.strays:
        return Judgement.does_not_hold(f"{m.strays} entries outside the marks are active")
    if m.dead:
        return Judgement.does_not_hold(
            f"{len(m.dead)} of {m.experts} experts are dead: not used in the second half of the run"
        )
    if m.config.d_model < CLAIMED_WIDTH:
        return Judgement.not_at_claimed_size(
            f"d_model {m.config.d_model}: all that is active is marked, no expert is dead"
        )
    return Judgement.holds()


def show(m: Picture) -> Shown:
    """Show the marks as rasters, and how even the use is."""
    n, by_expert = max(len(m.marks), 1), dormancies(m.marks, m.experts)
    use = {expert: used for expert, (used, _) in by_expert.items()}
    live = {expert: length for expert, (_, length) in by_expert.items() if expert not in m.dead}
    columns = {
        "steps in use": use,
        "share": {expert: used / n for expert, used in use.items()},
        "longest dormancy": live,
        "dead": {expert: expert in m.dead for expert in use},
        "uses in the second half": dict(enumerate(m.uses)),
        "without balancing": dict(enumerate(m.unbalanced)),
    }

    def touched(attribute: str) -> dict[int, int]:
        return {slot: sum(slot in getattr(mark, attribute) for mark in m.marks) for slot in range(m.slots)}

    def raster(title: str, label: str, parts: dict[str, str]) -> Plot:
        lines = []
        for name, attribute in parts.items():
            pairs = [(mark.step, index) for mark in m.marks for index in getattr(mark, attribute)]
            lines.append(Series(name, [float(step) for step, _ in pairs], [float(index) for _, index in pairs]))
        return Plot(title, "step", label, lines, kind="raster")

    title = f"Experts over the last {n} of {m.config.steps} steps ({m.bits:.2f} bits per byte)"
    without = sum(not count for count in m.unbalanced)
    return Shown(
        f"{n} steps drawn; {len(m.dead)} of {m.experts} experts dead ({without} without balancing), the others used "
        f"{min((use[e] / n for e in live), default=0.0):.0%} … {max(use.values(), default=0) / n:.0%} of the time, "
        f"longest dormancy {max(live.values(), default=0)} steps; {m.strays} of {m.looked_at:,} unmarked entries "
        "active",
        [
            table(title, "expert", columns),
            table("Slots", "slot", {"steps read": touched("reads"), "steps written": touched("writes")}),
        ],
        [
            raster("Experts used at each step", "expert", {"used": "experts"}),
            raster("Slots read and written at each step", "slot", {"read": "reads", "written": "writes"}),
        ],
        model=(
            f"RecurrentMoE, d_model {m.config.d_model}, 4 slots, 8 experts, P = {m.parameters:,}, H = "
            f"{4 * m.config.d_model}, T = {m.config.steps:,}, one seed"
        ),
    )


@claim(
    "patterns",
    claimed="one can see which parameters are active when (left open)",
    threshold="all that is active is in the picture; no expert is dead",
    quick=Config(),
    full=Config(steps=3000, drawn=600, proven=10, d_model=CLAIMED_WIDTH, hidden=2 * CLAIMED_WIDTH),
    small=Config(steps=240, drawn=40, proven=20, rate=2e-2, compared=False),
    verdict=verdict,
    show=show,
    noticed_breaks=("hidden-expert", "hidden-write", "collapsed-router"),
)
def measure(config: Config, settings: Settings) -> Picture:
    """Learn, note what the last steps touch, and learn again without balancing."""
    m = Picture(config=config, experts=0, slots=0, marks=[])
    try:
        m.uses = _learn(m, config, settings)
        if config.compared:
            m.unbalanced = _learn(None, replace(config, balance=0.0), settings)
    except RTRLError as error:  # the learner itself found that the cell does not keep to what it declares
        m.failures.append(f"the learner refuses: {error}")
    if m.strays:
        m.failures.append(f"{m.strays} of {m.looked_at} entries that are not declared active are")
    return m


def _learn(m: Picture | None, config: Config, settings: Settings) -> list[int]:
    """Learn, fill the picture if there is one, and return how often each expert is used in the second half."""
    stream = ByteStream(None, 1, steps=config.steps, dtype=torch.float64)
    cell = byte_model(settings.seed, d_model=config.d_model, hidden=config.hidden, router_output=True)
    learner = BlockRTRL(cell, 1, block=config.block, window=config.window)
    optimizer = torch.optim.Adam(cell.parameters(), lr=config.rate)
    uses = torch.zeros(cell.n_experts, dtype=torch.long)
    if m is not None:
        m.experts, m.slots, m.parameters = cell.n_experts, cell.n_slots, sum(p.numel() for p in cell.parameters())
    for t in range(config.steps):
        if t % 100 == 0:
            settings.progress(f"{'balanced' if config.balance else 'not balanced'}, step {t}")
        x, target = stream[t]
        h = learner.state
        with WatchRouting(cell) as watch:
            y = learner.step(x)
        used, loss = watch.steps[-1], F.cross_entropy(y.output, target)
        uses[used.active["expert_up"][0]] += t >= config.steps // 2
        if m is not None and t >= config.steps - config.drawn:
            _note(m, t, used, float(loss.detach()) / math.log(2))
            if t % config.proven == 0:
                wrong, looked = strays(cell, x, h, used)
                m.strays, m.looked_at = m.strays + wrong, m.looked_at + looked
        learner.backward(loss + config.balance * load_balancing_loss(y.router_logits, y.experts))
        if learner.at_block_end:
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()
    return uses.tolist()


def _note(m: Picture, t: int, used: Sparsity, bits: float) -> None:
    """Add one step to the picture."""
    assert used.reads is not None
    assert used.writes is not None
    m.marks.append(Mark(t, used.active["expert_up"][0].tolist(), used.reads[0].tolist(), used.writes[0].tolist()))
    m.bits += bits / m.config.drawn
