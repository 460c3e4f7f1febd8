"""Import an object by ``package.module:name``."""

import importlib
import sys
from pathlib import Path
from typing import Any

from rtrl.errors import ConfigError


def load(target: str) -> Any:
    """Import the object that ``package.module:name`` names; the current folder is searched, too.

    Raises:
        ConfigError: the target is malformed, or there is no such module or name.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{target!r} must have the form package.module:name")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"{module_name} has no {name!r}")
        value = getattr(value, part)
    return value
