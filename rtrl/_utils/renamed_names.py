"""Public names that have changed: the old name still works for one release, with a warning that says the new one."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed_names(module: str, new_names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module some of whose names have changed.

    Args:
        module: the name of the module.
        new_names: old name → new name.
    """

    def module_getattr(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is called {new_names[name]} now; the old name works in this release only"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new_names[name])

    return module_getattr
