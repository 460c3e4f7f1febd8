"""Everything that needs a device, in at most eight minutes: tests, exactness, memory, speed; one results file.

    python tests/device/run.py                                              (``tox -e cuda``)
    python tests/device/run.py --device cpu --size small -o device.json     (tries the script itself)

It writes a record of ``rtrl.report``; ``rtrl report docs/results/device.json --update docs/results/device.md`` writes
its page. Without a device, all in it is "not measured".
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.timing import alternate, median_ratio, medians
from rtrl.report import ClaimResult, Table, to_json
from rtrl.testing import worst_difference
from rtrl.verification.claim import Settings
from rtrl.verification.harness.memory import CudaPeak
from rtrl.verification.record import record

ROOT = Path(__file__).parents[2]
INPUTS, STEPS = 32, 9
WITH_DEVICE = "device or host"  # those whose name says that they take one
TESTS = ("tests/engine", "tests/cells", "tests/influence", "tests/learners/test_separate_gradients.py")
CELLS: dict[str, Callable[[int], nn.Module]] = {
    "RNN": lambda d: rtrl.from_torch(nn.RNNCell(d, 4), nn.Linear(4, 2)),
    "GRU": lambda d: rtrl.from_torch(nn.GRUCell(d, 4)),
    "LSTM": lambda d: rtrl.from_torch(nn.LSTMCell(d, 4)),
    "MinGRU": lambda d: rtrl.cells.MinGRU(d, 4),
    "RTU": lambda d: rtrl.cells.RTU(d, 3),
    "two layers": lambda d: rtrl.Stack([rtrl.cells.MinGRU(d, 3), rtrl.from_torch(nn.RNNCell(3, 3))]),
    "mixture of experts": lambda d: rtrl.RecurrentMoE(d, 2, d_model=4, n_slots=4, n_experts=4, topk=2),
}


@dataclass(frozen=True)
class Size:
    """How much is measured: H of the networks that are timed, lengths T of the streams for memory, and its H."""

    hidden: tuple[int, ...] = (256, 1024, 2048)
    lengths: tuple[int, ...] = (256, 1024, 4096)
    memory_hidden: int = 256
    product: int = 8192
    rounds: int = 3
    tests: tuple[str, ...] = TESTS
    cells: tuple[str, ...] = tuple(CELLS)


SIZES = {"full": Size(), "small": Size((4, 6), (16, 32), 4, 32, 1, (), ("RNN", "RTU"))}


@dataclass
class Run:
    """A run on one device, with the time that is left."""

    device: str
    size: Size
    seconds: float
    began: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


def device_tests(run: Run) -> ClaimResult:
    if not run.size.tests:
        return result("tests", "", "none fails", "not measured", "no tests were asked for")
    options = ["-q", "-p", "no:cacheprovider", "--device", run.device, "-k", WITH_DEVICE]
    command = [sys.executable, "-m", "pytest", *options, *run.size.tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    said = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    return result("tests", said, "none fails", "holds" if done.returncode == 0 else "does not hold", said)


def exactness(run: Run) -> ClaimResult:
    """Gradients of a stream longer than block and window, and of the newest step alone, against BPTT in float64."""
    rows: list[list[Any]] = []
    for name in run.size.cells:
        torch.manual_seed(0)
        cell = CELLS[name](3).double().to(run.device)
        xs = torch.randn(STEPS, 2, 3, dtype=torch.float64).to(run.device)
        learner = rtrl.BlockRTRL(cell, 2, block=2, window=3)
        for x in xs:
            y = learner.step(x)
            learner.backward(loss_of(y))
        alone = learner.gradients({"newest": loss_of(y)})["newest"]
        cell.zero_grad()
        learner.sync()
        summed = {n: p.grad for n, p in cell.named_parameters() if p.grad is not None}
        every = oracles.bptt(cell, xs, lambda t, y: loss_of(y))
        newest = oracles.bptt(cell, xs, lambda t, y: loss_of(y) if t == STEPS - 1 else None)
        errors = [worst_difference(*pair, nonzero="none").error for pair in ((summed, every), (alone, newest))]
        rows.append([name, *errors])
    worst = max(max(row[1:]) for row in rows)
    table = Table("Worst relative error", ["cell", "all losses", "the newest loss alone"], rows)
    verdict = "holds" if worst <= 1e-10 else "does not hold"
    return result("exactness", f"{worst:.1e}", "≤ 1e-10, float64", verdict, "", [table])


def loss_of(y: Any) -> Tensor:
    return sum(leaf.sin().sum() for leaf in torch.utils._pytree.tree_leaves(y) if leaf.is_floating_point())


def memory(run: Run) -> ClaimResult:
    """Peaks of a GRU over streams of T steps, above the parameters and the input."""
    torch.manual_seed(0)
    cell = rtrl.from_torch(nn.GRUCell(INPUTS, run.size.memory_hidden)).to(run.device)
    x = torch.randn(1, INPUTS, device=run.device)

    def online(steps: int) -> None:
        learner = rtrl.BlockRTRL(cell, 1, block=run.size.memory_hidden)
        for _ in range(steps):
            learner.backward(learner.step(x).square().sum())
        learner.sync()

    def unrolled(steps: int) -> None:
        h, total = cell.init_state(1), 0.0
        for _ in range(steps):
            y, h = cell(x, h)
            total = total + y.square().sum()
        total.backward()

    online(2), unrolled(2)  # what libraries allocate once
    rows: list[list[Any]] = []
    for steps in run.size.lengths:
        cell.zero_grad()
        rows.append([steps, peak(run, lambda t=steps: unrolled(t)), peak(run, lambda t=steps: online(t))])
    table = Table(f"Peak bytes, GRU, H = {run.size.memory_hidden}", ["T", "BPTT", "BlockRTRL, block = H"], rows)
    flat = rows[-1][2] <= 1.05 * rows[-2][2]
    text = f"{rows[-1][2] / 2**20:.1f} MiB at T = {rows[-1][0]}, BPTT {rows[-1][1] / 2**20:.1f} MiB"
    return result("memory", text, "≤ 1.05 ×", "holds" if flat else "does not hold", "", [table])


def peak(run: Run, work: Callable[[], None]) -> int:
    """The most bytes at once while ``work`` runs."""
    if run.on_cuda:
        meter = CudaPeak(run.device)
        work()
        return meter.peak
    with LiveBytes() as alive:
        work()
    return alive.peak


class Side:
    """A tanh network with a loss at every step, in chunks of H steps."""

    def __init__(self, run: Run, hidden: int, way: str) -> None:
        torch.manual_seed(0)
        self.cell = rtrl.from_torch(nn.RNNCell(INPUTS, hidden)).to(run.device)
        self.xs = torch.randn(hidden, 1, INPUTS).to(run.device)
        self.hidden, self.h = hidden, self.cell.init_state(1)
        self.advance: Callable[[], int] = getattr(self, way)
        if way in ("online", "sequences"):
            self.learner = rtrl.BlockRTRL(self.cell, 1, block=hidden, audit="off")
        self.taking = torch.compile(self.cell) if way == "compiled" else self.cell
        if way == "graph":
            self._capture()

    def online(self) -> int:
        for x in self.xs:
            self.learner.backward(self.learner.step(x).square().sum())
        self.learner.sync()
        return self.hidden

    def sequences(self) -> int:
        self.learner.backward(self.learner.unroll(self.xs).square().sum())
        self.learner.sync()
        return self.hidden

    def eager(self) -> int:
        h, total = self.h, 0.0
        for x in self.xs:
            y, h = self.taking(x, h)
            total = total + y.square().sum()
        total.backward()
        self.h.copy_(h.detach())
        return self.hidden

    compiled = eager

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.eager()
        torch.cuda.current_stream().wait_stream(stream)
        self.cell.zero_grad()
        self.captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.captured):
            self.eager()

    def graph(self) -> int:
        self.captured.replay()
        return self.hidden


def speed(run: Run) -> ClaimResult:
    """Seconds a step, in turns, in float32; and the share of the rate of a plain matrix product."""
    n = run.size.product
    square = torch.randn(n, n, device=run.device)
    product = alternate({"mm": lambda: (square @ square).shape[0]}, run.size.rounds, run.device)["mm"]
    rate = n**2 / min(product)  # multiply-adds a second
    names = ["online", "sequences", "eager", "compiled", "graph"]
    ways = names if run.on_cuda else names[:3]
    rows: list[list[Any]] = []
    for hidden in run.size.hidden:
        if run.left < 60 and run.on_cuda:
            rows.append([hidden, *["out of time"] * 7])
            continue
        sides, missing = {}, {}
        for way in ways:
            try:
                side = Side(run, hidden, way)
                side.advance()
                sides[way] = side.advance
            except Exception as error:  # a side that cannot be built has no number; the others have
                missing[way] = type(error).__name__
        times = alternate(sides, run.size.rounds, run.device)
        middle = medians(times)
        parameters = hidden * (hidden + INPUTS + 2)
        macs = hidden * parameters * 2 + hidden**3  # a step in blocks of H: H·P·(1 + H/H) + H³
        best = min((way for way in ("online", "sequences") if way in times), key=middle.__getitem__, default=None)
        ratio = median_ratio(times[best], times["eager"]) if best and "eager" in times else None
        share = macs / middle[best] / rate if best else None
        seconds = [
            middle.get(way, missing.get(way, "—")) for way in ("online", "sequences", "eager", "compiled", "graph")
        ]
        rows.append([hidden, *seconds, ratio, share])
        del sides
        if run.on_cuda:
            torch.cuda.empty_cache()
    columns = ["H", "BlockRTRL", "BlockRTRL, unroll", "BPTT", "BPTT, compiled", "BPTT, CUDA graph", "× BPTT", "share"]
    table = Table("Seconds a step of a tanh network, blocks and chunks of H steps", columns, rows)
    text = f"matrix product {2 * rate / 1e12:.2f} TFLOP/s in float32"
    return result("speed", text, "none", "holds when", "there is no bar", [table])


def result(
    name: str, text: str, threshold: str, verdict: Any, condition: str = "", tables: Sequence[Table] = ()
) -> ClaimResult:
    said = "" if verdict == "holds" else condition
    return ClaimResult(
        id=name,
        claimed=CLAIMED[name],
        result=text,
        threshold=threshold,
        verdict=verdict,
        condition=said,
        tables=list(tables),
    )


CLAIMED = {
    "tests": "the tests that take a device pass on it",
    "exactness": "gradients equal BPTT's",
    "memory": "memory does not grow with T",
    "speed": "what a step costs, beside BPTT, and its share of the rate of a matrix product",
}
PARTS = {"tests": device_tests, "exactness": exactness, "memory": memory, "speed": speed}


def measure(run: Run) -> list[ClaimResult]:
    """All parts, or that there is no device."""
    if run.on_cuda and not torch.cuda.is_available():
        return [result(name, "", "", "not measured", "no device") for name in PARTS]
    found = []
    for name, part in PARTS.items():
        began = time.perf_counter()
        print(f"{name} …", flush=True)
        found.append(part(run))
        print(f"{name}: {found[-1].verdict}, {found[-1].result}, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--seconds", type=float, default=480, help="all parts together, about")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "results" / "device.json")
    chosen = parser.parse_args(arguments)
    run = Run(chosen.device, SIZES[chosen.size], chosen.seconds)
    found = measure(run)
    name = torch.cuda.get_device_name(chosen.device) if run.on_cuda and torch.cuda.is_available() else chosen.device
    settings = Settings(full=chosen.size == "full", device=name)
    chosen.output.write_text(to_json(record(found, settings, "python tests/device/run.py")), encoding="utf-8")
    return 1 if any(claim.verdict == "does not hold" for claim in found) else 0


if __name__ == "__main__":
    sys.exit(main())
