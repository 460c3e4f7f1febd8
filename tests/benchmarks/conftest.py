"""What every benchmark shares: the size, whether times are taken, and where measured numbers go."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from measuring import Measurement

from rtrl.verification.harness.subprocesses import physical_bytes

THREADS = 2
LOAD = pytest.StashKey[float | None]()


@pytest.fixture(scope="session")
def benchmark_only(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("benchmark_only", False))


@pytest.fixture(scope="session", autouse=True)
def two_threads(benchmark_only: bool) -> Iterator[None]:
    """Where times are taken, two threads on two processors for everybody, JAX included, which has no other switch."""
    if not benchmark_only:
        yield
        return
    threads = torch.get_num_threads()
    processors = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    torch.set_num_threads(THREADS)
    if len(processors) > THREADS:
        os.sched_setaffinity(0, sorted(processors)[:THREADS])
    yield
    torch.set_num_threads(threads)
    if len(processors) > THREADS:
        os.sched_setaffinity(0, processors)


@pytest.fixture
def measurement(request: pytest.FixtureRequest, benchmark: Any, benchmark_only: bool) -> Measurement:
    size = request.config.getoption("--size") or ("full" if benchmark_only else "small")
    return Measurement(benchmark, size, benchmark_only)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--size") != "full":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: only where --size=full is asked for"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LOAD] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The versions that the times depend on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    machine_info["versions"] = {name: installed(name) for name in ("torch", "jax", "jaxlib", "numpy")}
    machine_info["load_before"] = config.stash.get(LOAD, None)
    machine_info["processors"] = os.cpu_count()
    machine_info["memory_bytes"] = physical_bytes()
