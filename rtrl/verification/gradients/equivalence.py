"""For every block and window, ``BlockRTRL`` gives the gradients and influences of BPTT, textbook RTRL and finite
differences.

**How it is measured.** A small mixture of experts (256 inputs and outputs, 4 slots of 8, 8 experts, top-2; float64)
reads real text, one byte a step, two samples at once, with a cross-entropy at every step. Its experts fall asleep and
wake as the text has it; nothing is laid down. For every pair of block and window the learner runs over the whole
text, and what it gives is compared with

- BPTT, unrolled over all steps: the gradient of every parameter, relative error at most 1e-10;
- textbook RTRL with full Jacobians: the gradient and the influence of every parameter at two moments, at most 1e-10;
- central differences of the loss along random directions, held to their own error estimate.

Three more runs change the parameters in mid-stream by SGD, by Adam while sleepers are not yet paid, and start samples
anew in mid-stream.

**Why that is fair.** The references share no code with the learner. An entry is judged by the scale of its own slice,
so that a seldom used expert is not hidden by the others; a reference that is zero or explodes voids its row. Each
oracle sees more steps than the block has, for a block as long as the stream would be BPTT by another name. And the
run fails if no expert slept through a block and woke, or none slept for longer than the window. Nine learners broken
on purpose (``rtrl verify --break help``) show that the gate can shut.

**What it leaves open.** One cell and one text: the property suite has the others. Float32 rounds more (see
*conditioning*).
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import oracles
import rtrl
from rtrl.cells.moe import RecurrentMoE
from rtrl.errors import ConfigError, RTRLError
from rtrl.tasks import ByteStream
from rtrl.verification import claim
from rtrl.verification.gradients.broken_learners import learner_type
from rtrl.verification.gradients.driver import Drive, Interventions, Sleep, Stretch, drive
from rtrl.verification.gradients.references import Slope, along, dense, differences
from rtrl.verification.harness.compare import Comparison, compare_gradients, compare_influences, void
from rtrl.verification.harness.models import INERT, SLICED, byte_model, usable_device
from rtrl.verification.harness.threads import one_thread

TOLERANCE = 1e-10
"""The largest relative error of an algebraic oracle; the same on every machine."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        file: the text; None for the standard library's sources. seed: of the weights and directions. device: where all
            is computed.
        steps: T for BPTT. prefix: T for the dense and difference oracles. side_prefix: T for the dense oracle of runs
            with interventions.
        blocks, windows: every pair of them is a run; a block is compared with oracles of more steps than it has, and
            with no others.
        broken: the name of a deliberately broken learner to put on trial, None for the real one.

    Raises:
        ConfigError: the largest block does not fit into ``steps``, the smallest not into the prefixes, or no break has
        that name.
    """

    file: Path | None = None
    seed: int = 0
    device: str = "cpu"
    steps: int = 300
    prefix: int = 64
    side_prefix: int = 24
    blocks: tuple[int, ...] = (1, 7, 16, 32)
    windows: tuple[int, ...] = (1, 3, 64)
    batch_size: int = 2
    broken: str | None = None

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
        learner_type(self.broken)

    @classmethod
    def quick(cls, **changes: Any) -> "Settings":
        """A small selection, for a first look and for tests: a few seconds."""
        return cls(**{"steps": 80, "prefix": 20, "side_prefix": 10, "blocks": (1, 7), "windows": (1, 3), **changes})


@dataclass(frozen=True)
class Row:
    """One oracle against one run.

    Attributes:
        oracle: the reference. learning: what happens to the parameters and samples in mid-stream. block, window,
            steps: of the run.
        gradient, influence: the comparisons; None where the oracle gives no influence.
        sleep: how the experts slept in these steps.
    """

    oracle: str
    learning: str
    block: int
    window: int
    steps: int
    gradient: Comparison
    influence: Comparison | None
    sleep: Sleep

    @property
    def passed(self) -> bool:
        """Every comparison of the row passed."""
        return self.gradient.passed and (self.influence is None or self.influence.passed)

    @property
    def problem(self) -> str | None:
        """What voids the row, in words."""
        return self.gradient.problem or (None if self.influence is None else self.influence.problem)

    def record(self) -> dict[str, Any]:
        """The row as plain numbers and strings; numbers that are not finite become None."""
        sleep = {name: getattr(self.sleep, name) for name in ("woken", "expired", "asleep", "longest")}
        compared = {
            what: None if c is None else _plain(asdict(c))
            for what, c in (("gradient", self.gradient), ("influence", self.influence))
        }
        kind = {name: getattr(self, name) for name in ("oracle", "learning", "block", "window", "steps")}
        return {**kind, **compared, "sleep": sleep, "passed": self.passed}


@dataclass
class Result:
    """All rows of the claim, and what they were measured with."""

    settings: Settings
    stream: dict[str, Any]
    cell: str
    rows: list[Row] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def failures(self) -> list[str]:
        """Why the gate is shut, a line each; empty if the claim holds."""
        found = [
            f"{row.oracle}, {row.learning}, block {row.block}, window {row.window}: "
            f"{row.problem or 'outside the tolerance'}"
            for row in self.rows
            if not row.passed
        ]
        if not self.rows:
            found.append("nothing was compared")
        elif not found and not any(row.sleep.woken for row in self.rows):
            found.append("no expert slept through a block and woke: this text says nothing about sleeping slices")
        elif not found and not any(row.sleep.expired for row in self.rows):
            found.append("no expert slept for longer than a window: this text says nothing about the window")
        return found

    @property
    def passed(self) -> bool:
        """Whether every row passed and experts slept, some beyond the window."""
        return not self.failures

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        settings = {**asdict(self.settings), "file": None if self.settings.file is None else str(self.settings.file)}
        versions = {"rtrl": rtrl.__version__, "torch": torch.__version__, "python": platform.python_version()}
        return {
            "claim": "gradient equivalence",
            "passed": self.passed,
            "failures": self.failures,
            "seed": self.settings.seed,
            "duration_s": round(self.duration_s, 3),
            "tolerance": TOLERANCE,
            "versions": versions,
            "settings": settings,
            "stream": self.stream,
            "cell": self.cell,
            "rows": [row.record() for row in self.rows],
        }


Report = Callable[[str, int, int], None]
"""Called before every piece of work with its name, how many pieces are done and how many there are."""


def measure(settings: Settings, progress: Report | None = None) -> Result:
    """Run every block and window over the text and compare each with every oracle.

    Raises:
        ConfigError: the text or the device cannot be used. What a learner raises in a run is a failure of its rows,
        not an error.

    Cost: by default about a minute on one core; the dense oracle holds about 200 megabytes.
    """
    began = time.perf_counter()
    device = usable_device(settings.device)
    text = ByteStream(settings.file, settings.batch_size, steps=settings.steps, dtype=torch.float64, device=device)
    stretch = Stretch(*text.first(settings.steps))
    cell = byte_model(settings.seed, device)
    result = Result(
        settings,
        {"source": text.source, "sha256": text.digest},
        f"{type(cell).__name__}({cell.extra_repr()}), normal weights from the seed",
    )
    trial = _Trial(settings, cell, stretch, progress)
    with one_thread():
        result.rows = list(trial.rows())
    result.duration_s = time.perf_counter() - began
    return result


class _Trial:
    """The plan of all runs, and the references that they share."""

    def __init__(self, settings: Settings, cell: RecurrentMoE, stretch: Stretch, progress: Report | None) -> None:
        self._settings, self._cell, self._stretch, self._progress = settings, cell, stretch, progress
        self._learner = learner_type(settings.broken)
        self._done, self._pieces = 0, 3 + len(settings.blocks) * len(settings.windows) + 3 * 3 - 1

    def rows(self) -> Iterator[Row]:
        settings, cell, stretch = self._settings, self._cell, self._stretch
        self._piece("BPTT")
        whole = oracles.bptt(cell, stretch.inputs, stretch.loss)
        self._piece("dense RTRL")
        head = stretch.first(settings.prefix)
        gradient, influences = dense(cell, head, (settings.prefix // 2, settings.prefix))
        self._piece("finite differences")
        slopes = differences(cell, head, SLICED, settings.seed)
        for block in settings.blocks:
            for window in settings.windows:
                self._piece(f"block {block}, window {window}")
                run = self._drive(block, window, stretch, tuple(influences) if block < settings.prefix else ())
                at = ("fixed parameters", block, window)
                yield self._judge("BPTT", *at, settings.steps, run, whole)
                if block < settings.prefix:
                    yield self._judge("dense RTRL", *at, settings.prefix, run, gradient, influences)
                    yield self._differ(*at, run, slopes)
        yield from self._side("SGD in mid-stream", Interventions("SGD", every=8, rate=0.005))
        yield from self._side(
            "Adam in mid-stream, sleepers unpaid", Interventions("Adam", every=11, rate=1e-3, dormant=False), False
        )
        yield from self._side("resets in mid-stream", Interventions(resets=_resets(stretch)))

    def _side(self, learning: str, plan: Interventions, with_dense: bool = True) -> Iterator[Row]:
        """The rows of one run with interventions; where parameters change, its own offsets go into the references."""
        settings, n = self._settings, self._settings.side_prefix
        fitting = [block for block in settings.blocks if block < n]
        at = (learning, fitting[min(1, len(fitting) - 1)], sorted(settings.windows)[min(1, len(settings.windows) - 1)])
        self._piece(learning)
        run = self._drive(at[1], at[2], self._stretch, (n,), plan)
        offsets = None if plan.optimizer is None or isinstance(run, RTRLError) else run.offsets
        self._piece(f"BPTT, {learning}")
        inputs, loss = self._stretch.inputs, self._stretch.loss
        yield self._judge(
            "BPTT",
            *at,
            settings.steps,
            run,
            oracles.bptt(self._cell, inputs, loss, resets=plan.resets, offsets=offsets),
        )
        if with_dense:
            self._piece(f"dense RTRL, {learning}")
            resets = None if plan.resets is None else plan.resets[:n]
            until = None if offsets is None else offsets[:n]
            gradient, influences = dense(self._cell, self._stretch.first(n), (n,), resets, until)
            yield self._judge("dense RTRL", *at, n, run, gradient, influences)

    def _drive(
        self, block: int, window: int, stretch: Stretch, moments: tuple[int, ...], plan: Interventions | None = None
    ) -> Drive | RTRLError:
        try:
            return drive(self._cell, stretch, self._learner, block, window, moments, plan)
        except RTRLError as error:
            return error

    def _judge(
        self, oracle: str, learning: str, block: int, window: int, steps: int, run: Drive | RTRLError,
        gradient: Mapping[str, Tensor], influences: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> Row:  # fmt: skip
        if isinstance(run, RTRLError):
            return Row(oracle, learning, block, window, steps, _raised(run), None, Sleep(window))
        snapshot = run.snapshots[steps]
        compared = compare_gradients(snapshot.gradient, gradient, SLICED, TOLERANCE)
        worst = None
        if influences is not None:
            parts = [
                compare_influences(run.snapshots[t].influence, at, INERT, TOLERANCE) for t, at in influences.items()
            ]
            worst = _together(parts, TOLERANCE)
        return Row(oracle, learning, block, window, steps, compared, worst, snapshot.sleep)

    def _differ(self, learning: str, block: int, window: int, run: Drive | RTRLError, slopes: list[Slope]) -> Row:
        steps = self._settings.prefix
        if isinstance(run, RTRLError):
            return Row("finite differences", learning, block, window, steps, _raised(run), None, Sleep(window))
        snapshot = run.snapshots[steps]
        return Row(
            "finite differences",
            learning,
            block,
            window,
            steps,
            along(snapshot, slopes, TOLERANCE),
            None,
            snapshot.sleep,
        )

    def _piece(self, name: str) -> None:
        if self._progress is not None:
            self._progress(name, self._done, self._pieces)
        self._done += 1


def _resets(stretch: Stretch) -> Tensor:
    """Sample 0 anew at step 4, the last at 8, then once more each, and all at once: mostly inside a block."""
    steps, size = stretch.targets.shape
    resets = torch.zeros(steps, size, dtype=torch.bool, device=stretch.targets.device)
    resets[4, 0] = resets[8, -1] = resets[17, 0] = resets[steps // 2 + 1, -1] = resets[2 * steps // 3 + 2] = True
    return resets


def _together(parts: list[Comparison], tolerance: float) -> Comparison:
    """Several comparisons as one: void if one is, else the worst."""
    for part in parts:
        if part.problem is not None or part.compared == 0:
            return part
    worst = max(parts, key=lambda part: part.error)
    return Comparison(worst.error, tolerance, sum(part.compared for part in parts), worst.where)


def _raised(error: RTRLError) -> Comparison:
    return void(f"{type(error).__name__}: {error}", TOLERANCE)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def finding(result: Result) -> claim.Finding:
    """The result as the finding of a claim; its rows become a table."""
    algebraic = [row for row in result.rows if row.oracle != "finite differences"]
    errors = [c.error for row in algebraic for c in (row.gradient, row.influence) if c is not None]
    worst = max((error for error in errors if math.isfinite(error)), default=math.nan)
    columns = ["oracle", "learning", "block", "window", "steps", "gradient error", "influence error", "verdict"]
    rows: list[list[str | int | float | None]] = [
        [
            row.oracle,
            row.learning,
            row.block,
            row.window,
            row.steps,
            row.gradient.error,
            None if row.influence is None else row.influence.error,
            "pass" if row.passed else "FAIL",
        ]
        for row in result.rows
    ]
    failed = sum(not row.passed for row in result.rows)
    return claim.Finding(
        f"{len(result.rows) - failed} of {len(result.rows)} comparisons agree, largest error {worst:.1e}",
        f"all, to {TOLERANCE:.0e}",
        "holds" if result.passed else "does not hold",
        "" if result.passed else f"{max(failed, 1)} comparisons disagree or say nothing",
        failures=result.failures,
        tables=[claim.Table("Gradients and influences against the oracles", columns, rows)],
        data={"largest_error": worst, "stream": result.stream, "cell": result.cell},
    )


def _measure(settings: claim.Settings, progress: claim.Progress) -> claim.Finding:
    sizes: dict[str, Any] = {"seed": settings.seed, "device": settings.device}
    return finding(measure(Settings(**sizes) if settings.full else Settings.quick(**sizes), progress))


CLAIM = claim.Claim(
    "gradient-equivalence",
    "for every block and window, the gradient is that of BPTT, textbook RTRL and finite differences",
    _measure,
)
