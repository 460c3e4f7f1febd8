"""Settings of every test run: hypothesis profiles, the device, and one thread a worker."""

import gc
import os

import hypothesis
import pytest
import torch

from rtrl import BlockRTRL

hypothesis.settings.register_profile("dev", max_examples=10, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=20, derandomize=True, deadline=None, print_blob=True, database=None
)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
# One run a mutant: few examples, the same for all of them, and none made smaller once one has failed.
hypothesis.settings.register_profile(
    "mutants",
    max_examples=4,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="the torch device that device-agnostic tests run on (default: cpu)"
    )
    parser.addoption(
        "--size",
        choices=("small", "full"),
        help="of the benchmarks; by default full with --benchmark-only and small without; the runs marked long, of "
        "10⁶ steps, only where full is asked for",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The oracles find what is wrong; an audit would find it before they do. Its own tests ask for it.
    every_init = [getattr(function, "__kwdefaults__", None) or {} for function in vars(BlockRTRL).values()]
    learner_defaults = [defaults for defaults in every_init if "audit" in defaults]  # several where it is mutated
    assert learner_defaults
    for defaults in learner_defaults:
        defaults["audit"] = 1 if config.getoption("hypothesis_profile", None) == "nightly" else "off"
    if not config.getoption("benchmark_only", False):
        torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked nightly, unless the profile or the marker is asked for."""
    if config.getoption("hypothesis_profile", None) == "nightly" or "nightly" in (config.option.markexpr or ""):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from what was imported and collected: tests that call it look at new objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that was asked for; the whole run fails where it is not there."""
    chosen = torch.device(request.config.getoption("--device"))
    torch.empty(0, device=chosen)
    return chosen
