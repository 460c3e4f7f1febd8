"""How many multiply-adds a device does per second at best: from its data sheet, or measured where it is present."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

# Peak rates without sparsity, of plain float32 and float64 arithmetic, in floating-point operations a second, two of
# which are one multiply-add. Sources: the vendor's data sheets ("T4 70W Low Profile PCIe GPU Accelerator", "Ada GPU
# Architecture" for the RTX 4090, "A100 80GB" SXM, "H100 Tensor Core GPU" SXM). A core with AVX2 and two units for fused
# multiply-adds does 2 · 8 of them a cycle in float32.
_NOMINAL = {
    "one AVX2 core at 3 GHz": {"float32": 96e9, "float64": 48e9},
    "NVIDIA T4": {"float32": 8.1e12, "float64": 0.25e12},
    "NVIDIA RTX 4090": {"float32": 82.6e12, "float64": 1.29e12},
    "NVIDIA A100 SXM": {"float32": 19.5e12, "float64": 9.7e12},
    "NVIDIA H100 SXM": {"float32": 67e12, "float64": 34e12},
}


def nominal_rates(dtype: str) -> dict[str, float]:
    """Return device → multiply-adds per second at most, by the data sheets.

    Args:
        dtype: "float32" or "float64"; for others the table has nothing.

    Example:
        >>> nominal_rates("float32")["NVIDIA A100 SXM"]
        9750000000000.0
    """
    return {name: rates[dtype] / 2 for name, rates in _NOMINAL.items() if dtype in rates}


@dataclass(frozen=True)
class _Timed:
    device: torch.device
    side: int
    wait: Callable[[], None]


def measured_rates(dtype: torch.dtype = torch.float32, seconds: float = 0.05) -> dict[str, float]:
    """Return device → multiply-adds per second, the best of some large matrix products, for every device present.

    Args:
        dtype: of the matrices; devices that do not know it are left out.
        seconds: how long each device is timed.

    Cost:
        ``seconds`` per device, after one product to warm up; a few megabytes.
    """
    rates: dict[str, float] = {}
    for name, timed in _present().items():
        try:
            square = torch.full((timed.side, timed.side), 1 / timed.side, dtype=dtype, device=timed.device)
            best = _fastest(partial(torch.mm, square, square), timed.wait, seconds)
        except (RuntimeError, TypeError):  # no such dtype there, or no memory left
            continue
        rates[name] = timed.side**3 / best
    return rates


def _present() -> Mapping[str, _Timed]:
    threads = torch.get_num_threads()
    here = "this CPU, 1 thread" if threads == 1 else f"this CPU, {threads} threads"
    found = {here: _Timed(torch.device("cpu"), 512, lambda: None)}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", i)
        wait = lambda device=device: torch.cuda.synchronize(device)  # noqa: E731
        found[f"this {torch.cuda.get_device_name(i)} (cuda:{i})"] = _Timed(device, 4096, wait)
    if torch.backends.mps.is_available():
        found["this GPU (mps)"] = _Timed(torch.device("mps"), 2048, torch.mps.synchronize)
    return found


def _fastest(call: Callable[[], object], wait: Callable[[], None], seconds: float) -> float:
    """The shortest time that a call took."""
    call()
    wait()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
