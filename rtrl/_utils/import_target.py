"""``package.module:name`` → the object."""

import importlib
import sys
from pathlib import Path
from typing import Any

from rtrl.errors import ConfigError


def load(target: str) -> Any:
    """The object that ``package.module:name`` stands for; the present folder is looked in, too.

    Raises:
        ConfigError: there is no such thing.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{target!r} must have the form package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module_name} has no {name!r}")
        found = getattr(found, part)
    return found
