"""For every block and window, ``BlockRTRL`` gives the gradients and influences of BPTT, textbook RTRL and finite
differences.

**How it is measured.** A small mixture of experts (256 inputs and outputs, 4 slots of 8, 8 experts, top-2; float64)
reads real text, one byte per step, two samples at once, with a cross-entropy at every step. Its experts become dormant
and are reactivated as the text has it; nothing is replayed. For every pair of block and window the learner runs over
the whole text, and what it gives is compared with

- BPTT, unrolled over all steps: the gradient of every parameter, relative error at most 1e-10;
- textbook RTRL with full Jacobians: the gradient and the influence of every parameter at two checkpoints, at most
  1e-10;
- central differences of the loss along random directions, held to their own error estimate.

Three more runs change the parameters in mid-stream by SGD, by Adam while dormant slices are not yet up to date, and
reset samples in mid-stream.

**Why that is fair.** The references share no code with the learner. An entry is judged by the scale of its own slice,
so that a seldom used expert is not hidden by the others; a reference that is zero or explodes voids its row. Each
oracle sees more steps than the block has, for a block as long as the stream would be BPTT by another name. And the
check fails if no expert was dormant through a block and reactivated, or none was dormant for longer than the window.
Ten faults planted on purpose (``rtrl verify-gradients --break help``) confirm that the check fails when it should.

**What it leaves open.** One cell and one text: the property suite has the others. Float32 rounds more (see
*conditioning*).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import oracles
from rtrl.cells.moe import RecurrentMoE
from rtrl.errors import ConfigError, RTRLError
from rtrl.report.model import Cell, Plot, Series, Table
from rtrl.tasks import ByteStream
from rtrl.verification.breaks import OF_GRADIENTS
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.gradients.driver import DormancyCount, Interventions, LearnerRecord, Segment, run_learner
from rtrl.verification.gradients.references import Slope, compare_slopes, dense_rtrl, finite_differences
from rtrl.verification.harness.compare import Comparison, compare_gradients, compare_influences, void
from rtrl.verification.harness.problems import INERT, SLICED, byte_model, usable_device

TOLERANCE = 1e-10
"""The largest relative error of an algebraic oracle; the same on every machine."""

SGD = ("SGD in mid-stream", Interventions("SGD", every=8, rate=0.005))
ADAM = ("Adam in mid-stream, slices pending", Interventions("Adam", every=11, rate=1e-3, dormant=False))


@dataclass(frozen=True)
class Config:
    """How much is measured.

    Attributes:
        file: the text; None for the standard library's sources.
        steps: T for BPTT.
        prefix: T for the dense and difference oracles.
        side_prefix: T for the dense oracle of runs with interventions.
        blocks: blocks of the learner; a block is compared with oracles of more steps than it has, and with no others.
        windows: windows of the learner; every pair of block and window is a run.
        batch_size: B.

    Raises:
        ConfigError: the largest block does not fit into ``steps``, or the smallest does not fit into the prefixes.
    """

    file: str | None = None
    steps: int = 300
    prefix: int = 64
    side_prefix: int = 24
    blocks: tuple[int, ...] = (1, 7, 16, 32)
    windows: tuple[int, ...] = (1, 3, 64)
    batch_size: int = 2

    def __post_init__(self) -> None:
        least = max(*self.blocks, self.prefix, self.side_prefix)
        if self.steps <= least:
            raise ConfigError(
                f"steps must be more than {least} (the longest block and the prefixes must fit in), got {self.steps}"
            )
        if min(self.blocks) < 1 or min(self.windows) < 1 or min(self.prefix, self.side_prefix) <= min(self.blocks):
            raise ConfigError(
                f"blocks and windows must be positive, the prefixes longer than the smallest block, got {self}"
            )

    @property
    def pieces(self) -> int:
        """How many pieces of work there are."""
        return 3 + len(self.blocks) * len(self.windows) + 3 * 3 - 1


QUICK = Config(steps=80, prefix=20, side_prefix=10, blocks=(1, 7), windows=(1, 3))
FULL = Config()
SMALL = Config(steps=22, prefix=4, side_prefix=4, blocks=(3,), windows=(3,))  # in window 1 nothing is composed


@dataclass(frozen=True)
class OracleRow:
    """One oracle against one run."""

    oracle: str  # the reference
    learning: str  # what happens to the parameters and samples in mid-stream
    block: int  # of the learner
    window: int  # of the learner
    steps: int  # steps of the comparison
    gradient: Comparison  # the comparison of gradients
    influence: Comparison | None  # the comparison of influences; None where the oracle gives none
    dormancy: DormancyCount  # how the experts were dormant in these steps

    @property
    def passed(self) -> bool:
        """Whether every comparison of the row passed."""
        return self.gradient.passed and (self.influence is None or self.influence.passed)

    @property
    def problem(self) -> str | None:
        """What voids the row, in words."""
        return self.gradient.problem or (None if self.influence is None else self.influence.problem)


@dataclass(kw_only=True)
class OracleRows(Measurements):
    """All rows, and what they were measured with."""

    config: Config
    stream: dict[str, Any]
    cell: str
    rows: list[OracleRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.failures += [
            f"{row.oracle}, {row.learning}, block {row.block}, window {row.window}: "
            f"{row.problem or 'outside the tolerance'}"
            for row in self.rows
            if not row.passed
        ]
        if not self.rows:
            self.failures.append("nothing was compared")
        elif not self.failures and not any(row.dormancy.reactivated for row in self.rows):
            self.failures.append(
                "no expert was dormant through a block and reactivated: this text says nothing about dormant slices"
            )
        elif not self.failures and not any(row.dormancy.expired for row in self.rows):
            self.failures.append(
                "no expert was dormant for longer than a window: this text says nothing about the window"
            )

    @property
    def passed(self) -> bool:
        """Whether every row passed and experts were dormant, some beyond the window."""
        return not self.failures

    @property
    def failed(self) -> int:
        """How many rows did not pass."""
        return sum(not row.passed for row in self.rows)

    @property
    def largest_error(self) -> float:
        """The largest error of an algebraic oracle."""
        algebraic = [row for row in self.rows if row.oracle != "finite differences"]
        errors = [c.error for row in algebraic for c in (row.gradient, row.influence) if c is not None]
        return max((error for error in errors if math.isfinite(error)), default=math.nan)


def verdict(m: OracleRows) -> Judgement:
    """Judge whether every row passed."""
    if m.passed:
        return Judgement.holds()
    return Judgement.does_not_hold(f"{max(m.failed, 1)} comparisons disagree or say nothing")


def show(m: OracleRows) -> Shown:
    """Show the rows as a table."""
    columns = ["oracle", "learning", "block", "window", "steps", "gradient error", "influence error", "tolerance"]
    more = ["dormant slices caught up", "longest dormancy", "verdict"]
    rows: list[list[Cell]] = [
        [
            row.oracle, row.learning, row.block, row.window, row.steps, row.gradient.error,
            None if row.influence is None else row.influence.error, row.gradient.tolerance,
            f"{row.dormancy.reactivated} + {row.dormancy.dormant}", row.dormancy.longest,
            "pass" if row.passed else "FAIL",
        ]
        for row in m.rows
    ]  # fmt: skip
    n = len(m.rows)
    agree = f"{n - m.failed} of {n} comparisons"
    return Shown(
        f"{agree} agree, largest error {m.largest_error:.1e}",
        [Table("Gradients and influences against the oracles", [*columns, *more], rows)],
        [_errors(m)],
        headline=f"The gradient is that of BPTT, textbook RTRL and finite differences in {agree}, with relative errors "
        f"up to {m.largest_error:.1e} in float64",
        model=f"{m.cell}; T = {m.config.steps}, B = {m.config.batch_size}, blocks {_listed(m.config.blocks)}, windows "
        f"{_listed(m.config.windows)}; one seed",
    )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _errors(m: OracleRows) -> Plot:
    """Draw the errors against the algebraic oracles, over all blocks and windows."""
    rows: dict[str, list[OracleRow]] = {}
    for row in m.rows:
        if row.oracle != "finite differences":
            rows.setdefault(f"{row.oracle}, {row.learning}", []).append(row)
    series = []
    for name in ("gradient", "influence"):
        errors = [[c.error for row in found if (c := getattr(row, name)) is not None] for found in rows.values()]
        places = [x for x, values in enumerate(errors) if values]
        worst, least = ([float(pick(errors[x])) for x in places] for pick in (max, min))
        series.append(Series(name, [float(x) for x in places], worst, low=least, high=worst))
    series.append(Series("tolerance", [float(x) for x in range(len(rows))], [TOLERANCE] * len(rows), dashed=True))
    return Plot(
        "Errors against the oracles, largest and smallest of all blocks and windows", "oracle, and what changes in "
        "mid-stream", "relative error", series, "points", log_y=True, x_names=list(rows),
    )  # fmt: skip


@claim(
    "gradient-equivalence",
    claimed="for every block and window, the gradient is that of BPTT, textbook RTRL and finite differences",
    threshold=f"all, to {TOLERANCE:.0e}",
    quick=QUICK,
    full=FULL,
    small=SMALL,
    noticed_breaks=OF_GRADIENTS,
    verdict=verdict,
    show=show,
    question="exact",
)
def measure(config: Config, settings: Settings) -> OracleRows:
    """Run every block and window over the text, and compare each with every oracle.

    What a learner raises in a run is a failure of its rows, not an error.

    Raises:
        ConfigError: the text or the device cannot be used.

    Cost: in the full form about a minute on one core; the dense oracle holds about 200 megabytes.
    """
    device = usable_device(settings.device)
    text = ByteStream(config.file, config.batch_size, steps=config.steps, dtype=torch.float64, device=device)
    segment = Segment(*text.first(config.steps))
    cell = byte_model(settings.seed, device)
    return OracleRows(
        config=config,
        stream={"source": text.source, "sha256": text.digest},
        cell=f"{type(cell).__name__}({cell.extra_repr()}), normal weights from the seed",
        rows=list(_Comparisons(config, settings, cell, segment).rows()),
    )


class _Comparisons:
    """All runs, and the references that they share."""

    def __init__(self, config: Config, settings: Settings, cell: RecurrentMoE, segment: Segment) -> None:
        self._config, self._settings, self._cell, self._segment = config, settings, cell, segment

    def rows(self) -> Iterator[OracleRow]:
        config, cell, segment, progress = self._config, self._cell, self._segment, self._settings.progress
        progress("BPTT")
        bptt = oracles.bptt(cell, segment.inputs, segment.loss)
        progress("dense RTRL")
        head = segment.first(config.prefix)
        gradient, influences = dense_rtrl(cell, head, (config.prefix // 2, config.prefix))
        progress("finite differences")
        slopes = finite_differences(cell, head, SLICED, self._settings.seed)
        for block in config.blocks:
            for window in config.windows:
                progress(f"block {block}, window {window}")
                run = self._run(block, window, tuple(influences) if block < config.prefix else ())
                at = ("fixed parameters", block, window)
                yield self._compare("BPTT", *at, config.steps, run, bptt)
                if block < config.prefix:
                    yield self._compare("dense RTRL", *at, config.prefix, run, gradient, influences)
                    yield self._compare_slopes(*at, run, slopes)
        yield from self._intervened(*SGD)
        yield from self._intervened(*ADAM, with_dense=False)
        yield from self._intervened("resets in mid-stream", Interventions(resets=_resets(segment)))

    def _intervened(self, learning: str, interventions: Interventions, with_dense: bool = True) -> Iterator[OracleRow]:
        """The rows of one run with interventions; where parameters change, its own offsets go into the references."""
        config, n, progress = self._config, self._config.side_prefix, self._settings.progress
        fitting = [block for block in config.blocks if block < n]
        at = (learning, fitting[min(1, len(fitting) - 1)], sorted(config.windows)[min(1, len(config.windows) - 1)])
        progress(learning)
        run = self._run(at[1], at[2], (n,), interventions)
        offsets = None if interventions.optimizer is None or isinstance(run, RTRLError) else run.offsets
        progress(f"BPTT, {learning}")
        inputs, loss, resets = self._segment.inputs, self._segment.loss, interventions.resets
        gradient = oracles.bptt(self._cell, inputs, loss, resets=resets, offsets=offsets)
        yield self._compare("BPTT", *at, config.steps, run, gradient)
        if with_dense:
            progress(f"dense RTRL, {learning}")
            until = None if offsets is None else offsets[:n]
            resets = None if resets is None else resets[:n]
            gradient, influences = dense_rtrl(self._cell, self._segment.first(n), (n,), resets, until)
            yield self._compare("dense RTRL", *at, n, run, gradient, influences)

    def _run(
        self, block: int, window: int, checkpoints: tuple[int, ...], interventions: Interventions | None = None
    ) -> LearnerRecord | RTRLError:
        try:
            return run_learner(self._cell, self._segment, block, window, checkpoints, interventions)
        except RTRLError as error:
            return error

    def _compare(
        self, oracle: str, learning: str, block: int, window: int, steps: int, run: LearnerRecord | RTRLError,
        gradient: Mapping[str, Tensor], influences: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> OracleRow:  # fmt: skip
        if isinstance(run, RTRLError):
            return OracleRow(oracle, learning, block, window, steps, _raised(run), None, DormancyCount(window))
        snapshot, worst = run.snapshots[steps], None
        compared = compare_gradients(snapshot.gradient, gradient, SLICED, TOLERANCE)
        if influences is not None:
            worst = _worst(
                compare_influences(run.snapshots[t].influence, reference, INERT, TOLERANCE)
                for t, reference in influences.items()
            )
        return OracleRow(oracle, learning, block, window, steps, compared, worst, snapshot.dormancy)

    def _compare_slopes(
        self, learning: str, block: int, window: int, run: LearnerRecord | RTRLError, slopes: list[Slope]
    ) -> OracleRow:
        at = ("finite differences", learning, block, window, self._config.prefix)
        if isinstance(run, RTRLError):
            return OracleRow(*at, _raised(run), None, DormancyCount(window))
        snapshot = run.snapshots[self._config.prefix]
        return OracleRow(*at, compare_slopes(snapshot, slopes, TOLERANCE), None, snapshot.dormancy)


def _resets(segment: Segment) -> Tensor:
    """Reset sample 0 at step 4, the last at 8, then once more each, and all at once: mostly inside a block."""
    steps, size = segment.targets.shape
    resets = torch.zeros(steps, size, dtype=torch.bool, device=segment.targets.device)
    resets[4, 0] = resets[8, -1] = resets[17, 0] = resets[steps // 2 + 1, -1] = resets[2 * steps // 3 + 2] = True
    return resets


def _worst(comparisons: Iterator[Comparison]) -> Comparison:
    """Join several comparisons: void if one is, else the worst."""
    parts = list(comparisons)
    for part in parts:
        if part.problem is not None or part.compared == 0:
            return part
    worst = max(parts, key=lambda part: part.error)
    return Comparison(worst.error, TOLERANCE, sum(part.compared for part in parts), worst.where)


def _raised(error: RTRLError) -> Comparison:
    return void(f"{type(error).__name__}: {error}", TOLERANCE)
