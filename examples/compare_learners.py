"""Compare BlockRTRL with truncated BPTT on a GRU: time per step, and bytes alive at once.

Both deliver a gradient after every block of H steps. Truncated BPTT is plain PyTorch: a graph over the block, one
backward pass, and the state detached; its gradient ignores everything before the block. The sides are timed in turns.

    python examples/compare_learners.py --hidden 32 128 --batch-size 1 16 --rounds 9 --json comparison.json

The table is printed in Markdown. ``--page README.md`` puts it between the two comments of README that say where.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rtrl
from rtrl.profiling import LiveBytes
from rtrl.profiling.timing import alternate

INPUTS = 32


@dataclass(frozen=True)
class Comparison:
    """What was measured on a GRU of H units: seconds per step, and bytes alive at once, of both sides."""

    hidden: int
    batch_size: int
    rtrl_seconds: float
    tbptt_seconds: float
    rtrl_bytes: int
    tbptt_bytes: int


def compare(hidden: int, batch_size: int, rounds: int) -> Comparison:
    """Measure one size; a round is one block of H steps, or as many blocks as make 64 steps."""
    torch.manual_seed(0)
    cell = rtrl.from_torch(nn.GRUCell(INPUTS, hidden), nn.Linear(hidden, 1))
    xs = torch.randn(hidden * max(1, 64 // hidden), batch_size, INPUTS)
    sides = {"rtrl": block_rtrl(cell, xs, hidden), "tbptt": truncated_bptt(cell, xs, hidden)}
    peaks = {}
    for name, run in sides.items():
        with LiveBytes() as alive:
            run()
            run()
        peaks[name] = alive.peak
    sides = {"rtrl": block_rtrl(cell, xs, hidden), "tbptt": truncated_bptt(cell, xs, hidden)}
    seconds = {name: statistics.median(times) for name, times in alternate(sides, rounds).items()}
    return Comparison(hidden, batch_size, seconds["rtrl"], seconds["tbptt"], peaks["rtrl"], peaks["tbptt"])


def block_rtrl(cell: nn.Module, xs: Tensor, block: int) -> Callable[[], int]:
    learner: list[rtrl.BlockRTRL] = []  # made at the first call, so that its bytes are counted

    def run() -> int:
        if not learner:
            learner.append(rtrl.BlockRTRL(cell, batch_size=xs.shape[1], block=block))
        for x in xs:
            learner[0].backward(learner[0].step(x).square().mean())
            if learner[0].at_block_end:
                learner[0].sync()
        cell.zero_grad()
        return len(xs)

    return run


def truncated_bptt(cell: nn.Module, xs: Tensor, horizon: int) -> Callable[[], int]:
    state = [cell.init_state(xs.shape[1])]

    def run() -> int:
        h = state[0]
        for chunk in xs.split(horizon):
            losses = []
            for x in chunk:
                y, h = cell(x, h)
                losses.append(y.square().mean())
            torch.stack(losses).sum().backward()
            h = h.detach()
        state[0] = h
        cell.zero_grad()
        return len(xs)

    return run


def table(rows: list[Comparison]) -> str:
    """The rows in Markdown."""
    lines = [
        "| H | batch | time per step: TBPTT | BlockRTRL | bytes at most: TBPTT | BlockRTRL |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        times = f"{milliseconds(row.tbptt_seconds)} | {milliseconds(row.rtrl_seconds)}"
        sizes = f"{mebibytes(row.tbptt_bytes)} | {mebibytes(row.rtrl_bytes)}"
        lines.append(f"| {row.hidden} | {row.batch_size} | {times} | {sizes} |")
    return "\n".join(lines)


def caption(record: dict[str, Any]) -> str:
    """How, and on what machine, a table was measured."""
    machine = record["machine"]
    return (
        f"Medians of {record['rounds']} rounds, float32, threads: {machine['threads']}, {machine['processor']}, "
        f"PyTorch {machine['torch']}."
    )


def with_table(page: str, record: dict[str, Any]) -> str:
    """The text of a page, with the table of a record between its two comments."""
    before, _, rest = page.partition("<!-- comparison -->")
    after = rest.partition("<!-- /comparison -->")[2]
    shown = f"{table([Comparison(**row) for row in record['rows']])}\n\n{caption(record)}"
    return f"{before}<!-- comparison -->\n\n{shown}\n\n<!-- /comparison -->{after}"


def milliseconds(seconds: float) -> str:
    return f"{two_digits(seconds * 1e3)} ms"


def mebibytes(size: int) -> str:
    return f"{two_digits(size / 2**20)} MiB"


def two_digits(value: float) -> str:
    """The value with two significant digits, or with all digits before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description="BlockRTRL beside truncated BPTT.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[16], help="sizes of the GRU")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--json", type=Path, help="write the numbers and the machine to this file")
    parser.add_argument("--page", type=Path, help="put the table into this page")
    options = parser.parse_args()

    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    rows = [compare(hidden, size, options.rounds) for hidden in options.hidden for size in options.batch_size]
    record = {"machine": machine, "rounds": options.rounds, "rows": [asdict(row) for row in rows]}
    print(f"{table(rows)}\n\n{caption(record)}")
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.page is not None:
        options.page.write_text(with_table(options.page.read_text(encoding="utf-8"), record), encoding="utf-8")


def processor() -> str:
    """The name of the processor where Linux tells it, and its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
