"""With 64 experts, 5 % of the parameters were said to be active per step, and 128 of 1024 rows of the state written.

**How it is measured.** Config *flow* (64 experts, top-2; 16 slots of 64, two read and two written; H = 1024) runs
forward on a drawn stream and chooses by itself. At every step the ``Sparsity`` that it returns says which slices of
which parameters are active and which slots are written; entries are counted from it, and that the slots outside are
copied bit for bit is compared at every step. That the cell declares no less than it touches is then proven by
``check_cell``, which looks at derivatives, on a sibling of the same structure with smaller slots (on *flow* itself in
the full form).

**Why that is fair.** A parameter that is not sliced counts as active at every step, the readout's too. Nothing is
estimated.

**What it leaves open.** The share depends on how much of the model is experts; the width of an expert from which 5 %
is reached is searched for, with everything else as it is.
"""

from dataclasses import dataclass, replace

import torch

from rtrl.cells.moe import RecurrentMoE
from rtrl.report.model import Cell, Table
from rtrl.testing import check_cell
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.problems import FLOW, Mixture, problem
from rtrl.verification.show import plot, table

SHARE, WRITTEN = 0.05, 128 / 1024


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration, how many steps are counted, the width of slots at which the cell is checked, and the widths of
    experts that are tried."""

    mixture: Mixture = FLOW
    steps: int = 120
    checked: int = 4
    widths: tuple[int, ...] = (64, 128, 192, 256, 384, 392, 512)


@dataclass(kw_only=True)
class Shares(Measurements):
    """By step, the share of parameters active and of rows written; how many experts were used in all; width of an
    expert → share active; P, and the experts' share of their own parameters."""

    config: Config
    active: list[float]
    written: list[float]
    experts_used: int
    by_width: dict[int, float]
    parameters: int
    of_experts: float

    @property
    def reached(self) -> int | None:
        """The width of an expert from which the share is 5 %."""
        return next((width for width, value in self.by_width.items() if value <= SHARE), None)


def verdict(m: Shares) -> Judgement:
    """Judge the shares of parameters active and of rows written."""
    return judge(max(m.active), max(m.written), m.reached)


def judge(share: float, written: float, reached: int | None) -> Judgement:
    """Judge the largest shares; ``reached``: the width of an expert from which the share of parameters is 5 %."""
    if written > WRITTEN:
        return Judgement.does_not_hold(f"{written:.1%} of the rows are written")
    if round(share, 3) <= SHARE:
        return Judgement.holds()
    if reached is None:
        return Judgement.does_not_hold(f"{share:.1%} of the parameters are active")
    return Judgement.holds_when(
        f"an expert is {reached} wide or wider; as configured {share:.1%} of the parameters are active"
    )


def show(m: Shares) -> Shown:
    """Show the shares, and the share over the width of an expert."""
    mixture, total, share, written = m.config.mixture, m.parameters, max(m.active), max(m.written)
    hidden = mixture.hidden
    result = (
        f"{share:.1%} of {total:,} parameters active ({m.of_experts:.1%} of the experts'), {round(written * hidden)} "
        f"of {hidden} rows written; check_cell passes"
    )
    rows: list[list[Cell]] = [
        ["parameters active", min(m.active) * total, share * total, total],
        ["rows written", min(m.written) * hidden, written * hidden, hidden],
        ["experts used in all", None, m.experts_used, mixture.n_experts],
    ]
    title, x_label = "Share of the parameters active per step", "width of an expert"
    return Shown(
        f"{share:.1%} of the parameters, {written:.1%} of the rows" if m.failures else result,
        [
            Table(f"Config {mixture.name}, {m.config.steps} steps", ["what", "least", "most", "of"], rows),
            table("Share active over the width of an expert", "width", {"share": m.by_width}),
        ],
        [plot(title, x_label, "share", {"counted": m.by_width}, log="x")],
        model=f"config {mixture.name}, P = {total:,}, H = {hidden}, T = {m.config.steps:,}, one seed",
    )


def active_entries(cell: RecurrentMoE, active: dict[str, int]) -> int:
    """Return the number of active entries of all parameters, given how many slices of each sliced one are active."""
    return sum(
        p.numel() if n not in active else p.numel() // p.shape[0] * active[n] for n, p in cell.named_parameters()
    )


@claim(
    "extraction",
    claimed="64 experts: 5 % of the parameters active, 128 of 1024 rows written",
    threshold="5 % of the parameters, 128 of 1024 rows",
    quick=Config(),
    full=Config(steps=2000, checked=64),
    small=Config(Mixture("small", 2, 2, 8, 4, 16), 12, 4, (8, 64, 4096)),
    verdict=verdict,
    show=show,
    noticed_breaks=("hidden-expert", "hidden-write"),
    void="the cell does not keep to what it declares",
)
def measure(config: Config, settings: Settings) -> Shares:
    """Count and check."""
    failures = []
    settings.progress("a run")
    mixture = config.mixture
    stream = problem(mixture, config.steps, settings.seed, device=settings.device)
    cell = stream.cell
    h = cell.init_state(1)
    shares, rows, uses, moved = [], [], torch.zeros(mixture.n_experts), 0
    active: dict[str, int] = {}
    with torch.no_grad():
        for x in stream.xs:
            _, h_next, used = cell(x, h)
            active = {name: index.shape[1] for name, index in used.active.items()}
            shares.append(active_entries(cell, active) / stream.parameters)
            rows.append(used.writes.shape[1] / mixture.n_slots)
            outside = torch.ones(mixture.n_slots, dtype=torch.bool, device=h.device)
            outside[used.writes[0]] = False
            moved += int((h_next[0, outside] != h[0, outside]).sum())
            uses[used.active["expert_up"][0].cpu()] += 1
            h = h_next
    if moved:
        failures.append(f"{moved} entries outside the rows declared written changed")
    settings.progress("check_cell")
    small = problem(replace(mixture, d_model=config.checked), 2, settings.seed)
    report = check_cell(small.cell, list(small.xs), seed=settings.seed, on_fail="return")
    if not report.passed:
        failures.append(f"check_cell: {report}")

    by_width = {}
    sizes = (mixture.d_in, mixture.d_out, mixture.d_model, mixture.n_slots, mixture.n_experts, 2)
    for width in config.widths:
        other = RecurrentMoE(*sizes, expert_hidden=width, device="meta")
        by_width[width] = active_entries(other, active) / sum(p.numel() for p in other.parameters())
    experts = [p.numel() for n, p in cell.named_parameters() if n.startswith("expert")]
    return Shares(
        config=config, active=shares, written=rows, experts_used=int((uses > 0).sum()), by_width=by_width,
        parameters=stream.parameters, failures=failures,
        of_experts=sum(n // mixture.n_experts * 2 for n in experts) / sum(experts),
    )  # fmt: skip
