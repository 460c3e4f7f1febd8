"""Modules that have moved: the old name still imports for one release, with a warning that says the new one."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "rtrl.alive": "rtrl.profiling.live_bytes",
    "rtrl.baselines": "rtrl.learners",
    "rtrl.claims": "rtrl.verification",
    "rtrl.influence": "rtrl._influence.store",
    "rtrl.learner": "rtrl.learners.block_rtrl",
    "rtrl.macs": "rtrl.profiling.macs",
    "rtrl.planning": "rtrl.costs",
    "rtrl.segment_tree": "rtrl._influence.segment_tree",
    "rtrl.transition": "rtrl._influence.transition",
}


class _Renamed(MetaPathFinder, Loader):
    """Finds the old names in ``MOVED`` and hands out the modules of today in their place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} is called {new} now; the old name works in this release only",
            DeprecationWarning,
            stacklevel=2,
        )
        module = ModuleType(spec.name, f"The old name of ``{new}``.")
        module.__getattr__ = lambda name: getattr(importlib.import_module(new), name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        return


def install() -> None:
    """Let the import system know the old names, once."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        sys.meta_path.append(_Renamed())
