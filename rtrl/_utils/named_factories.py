"""Learners, tasks and cells made by name, with options."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rtrl._utils import validation
from rtrl.errors import ConfigError


def options_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """The keyword options of a factory, with their defaults."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def make_named(kind: str, name: str, factories: Mapping[str, Callable[..., Any]], options: Mapping[str, Any]) -> Any:
    """Call the factory of this name with these options.

    Args:
        kind: the kind of thing it makes, in a word: "task".
        name: one of ``factories``.
        factories: by name.
        options: keyword arguments.

    Raises:
        ConfigError: there is no such name or option, or an option is missing or of the wrong type; or the factory
            refuses a value.
    """
    validation.known(kind, name, factories)
    known = options_of(factories[name])
    for option in options:
        if option not in known:
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"the {kind} {name!r} has no option {option!r}; {has}")
    missing = [option for option, default in known.items() if default is inspect.Parameter.empty]
    missing = [option for option in missing if option not in options]
    if missing:
        raise ConfigError(f"the {kind} {name!r} needs the option {missing[0]!r}")
    try:
        return factories[name](**options)
    except TypeError as error:  # a value of a type that the factory does not check
        raise ConfigError(f"the {kind} {name!r} does not take these options: {error}") from error
