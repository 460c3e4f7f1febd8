"""Things that are chosen by name and given options: learners, tasks, cells."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rtrl._utils import validation
from rtrl.errors import ConfigError


def options_of(make: Callable[..., Any]) -> dict[str, Any]:
    """The options that a maker takes by keyword, with their defaults."""
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def call(kind: str, name: str, makers: Mapping[str, Callable[..., Any]], options: Mapping[str, Any]) -> Any:
    """What the maker of this name gives for these options.

    Args:
        kind: what is made, in a word, for messages: "task".

    Raises:
        ConfigError: there is no such name or option. And whatever the maker raises.
    """
    validation.known(kind, name, makers)
    known = options_of(makers[name])
    for option in options:
        if option not in known:
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"the {kind} {name!r} has no option {option!r}; {has}")
    missing = [option for option, default in known.items() if default is inspect.Parameter.empty]
    missing = [option for option in missing if option not in options]
    if missing:
        raise ConfigError(f"the {kind} {name!r} needs the option {missing[0]!r}")
    try:
        return makers[name](**options)
    except TypeError as error:  # a value of a kind that the maker did not think of
        raise ConfigError(f"the {kind} {name!r} does not take these options: {error}") from error
