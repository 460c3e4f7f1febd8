"""With 64 experts, 5 % of the parameters were said to be active a step, and 128 of 1024 rows of the state written.

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
from rtrl.testing import check_cell
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.problems import FLOW, Mixture, problem
from rtrl.verification.harness.threads import one_thread

SHARE, WRITTEN = 0.05, 128 / 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """The configuration, how many steps are counted, and the width of slots at which the cell is checked."""

    mixture: Mixture = FLOW
    steps: int = 120
    checked: int = 4
    widths: tuple[int, ...] = (64, 128, 192, 256, 384, 392, 512)


QUICK = Sizes()
FULL = Sizes(steps=2000, checked=64)


def judge(share: float, written: float, reached: int | None) -> tuple[Verdict, str]:
    """The verdict from the share of parameters active and of rows written; ``reached``: the width of an expert from
    which the former is 5 %."""
    if written > WRITTEN:
        return "does not hold", f"{written:.1%} of the rows are written"
    if round(share, 3) <= SHARE:
        return "holds", ""
    if reached is None:
        return "does not hold", f"{share:.1%} of the parameters are active"
    return "holds when", f"an expert is {reached} wide or wider; as configured {share:.1%} of the parameters are active"


def active_entries(cell: RecurrentMoE, active: dict[str, int]) -> int:
    """Entries of all parameters that are active, given how many slices of each sliced one are."""
    return sum(
        p.numel() if n not in active else p.numel() // p.shape[0] * active[n] for n, p in cell.named_parameters()
    )


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """Count and check; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    failures = []
    progress("a run", 0, 2)
    stream = problem(sizes.mixture, sizes.steps, settings.seed, device=settings.device)
    cell = stream.cell
    assert isinstance(cell, RecurrentMoE)
    total = stream.parameters
    h = cell.init_state(1)
    shares, rows, uses, moved = [], [], torch.zeros(sizes.mixture.n_experts), 0
    active: dict[str, int] = {}
    with torch.no_grad():
        for x in stream.xs:
            _, h_next, used = cell(x, h)
            active = {name: index.shape[1] for name, index in used.active.items()}
            shares.append(active_entries(cell, active) / total)
            assert used.writes is not None
            rows.append(used.writes.shape[1] / sizes.mixture.n_slots)
            outside = torch.ones(sizes.mixture.n_slots, dtype=torch.bool, device=h.device)
            outside[used.writes[0]] = False
            moved += int((h_next[0, outside] != h[0, outside]).sum())
            uses[used.active["expert_up"][0].cpu()] += 1
            h = h_next
    if moved:
        failures.append(f"{moved} entries outside the rows declared written changed")
    progress("check_cell", 1, 2)
    small = problem(replace(sizes.mixture, d_model=sizes.checked), 2, settings.seed)
    report = check_cell(small.cell, list(small.xs), seed=settings.seed, on_fail="return")
    if not report.passed:
        failures.append(f"check_cell: {report}")

    share, written = max(shares), max(rows)
    by_width = {}
    sizes_of = (sizes.mixture.d_in, sizes.mixture.d_out, sizes.mixture.d_model, sizes.mixture.n_slots)
    for width in sizes.widths:
        other = RecurrentMoE(*sizes_of, sizes.mixture.n_experts, 2, expert_hidden=width, device="meta")
        by_width[width] = active_entries(other, active) / sum(p.numel() for p in other.parameters())
    reached = next((width for width, value in by_width.items() if value <= SHARE), None)
    experts = {n: p.numel() for n, p in cell.named_parameters() if n.startswith("expert")}
    of_experts = sum(n // sizes.mixture.n_experts * 2 for n in experts.values()) / sum(experts.values())
    verdict, condition = judge(share, written, reached)
    if failures:
        verdict, condition = "does not hold", "the cell does not keep to what it declares"
    hidden = sizes.mixture.hidden
    return Finding(
        f"{share:.1%} of {total:,} parameters active ({of_experts:.1%} of the experts'), {round(written * hidden)} of "
        f"{hidden} rows written; check_cell passes"
        if not failures
        else f"{share:.1%} of the parameters, {written:.1%} of the rows",
        "5 % of the parameters, 128 of 1024 rows",
        verdict,
        condition,
        failures,
        [
            Table(
                f"Config {sizes.mixture.name}, {sizes.steps} steps",
                ["what", "least", "most", "of"],
                [
                    ["parameters active", min(shares) * total, share * total, total],
                    ["rows written", min(rows) * hidden, written * hidden, hidden],
                    ["experts used in all", None, int((uses > 0).sum()), sizes.mixture.n_experts],
                ],
            ),
            Table(
                "Share active over the width of an expert", ["width", "share"], [[w, s] for w, s in by_width.items()]
            ),
        ],
        [
            Plot(
                "Share of the parameters active a step",
                "width of an expert",
                "share",
                [Series("counted", [float(w) for w in by_width], list(by_width.values()))],
                log_x=True,
            )
        ],
        {"share": share, "written": written, "parameters": total, "width_for_5_percent": reached},
    )


CLAIM = Claim("extraction", "64 experts: 5 % of the parameters active, 128 of 1024 rows written", measure)
