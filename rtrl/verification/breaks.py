"""All breaks by name: faults that are planted in this process on purpose, to see which verdicts they change.

A break replaces methods of production classes. Every object that is made or used the ordinary way is broken then, and a
claim cannot tell that it is measured on broken code. A break is undone when its context ends, by an error too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from rtrl._utils import validation
from rtrl.verification.broken import costs, influence, training
from rtrl.verification.broken.fault import Break


def _of(module: ModuleType) -> dict[str, Break]:
    return {found.name: found for found in vars(module).values() if isinstance(found, Break)}


BREAKS = {**_of(influence), **_of(costs), **_of(training)}
"""Every break by name."""

OF_GRADIENTS = tuple(_of(influence))
"""The names of those that make the gradients of ``BlockRTRL`` wrong."""

_planted: list[str] = []


def find(name: str) -> Break:
    """Return the break of this name.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    validation.known("break", name, list(BREAKS))
    return BREAKS[name]


def active() -> tuple[str, ...]:
    """Return the names of the breaks that are planted now; a process that is started meanwhile plants them too."""
    return tuple(_planted)


@contextmanager
def planted(*names: str) -> Iterator[None]:
    """Plant breaks for as long as the context lasts.

    Args:
        names: the breaks, in the order in which they are planted.

    Raises:
        ConfigError: one of them is unknown; nothing is planted then.
    """
    from unittest import mock  # it takes a while to import, and few need it

    breaks = [find(name) for name in names]
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for each in breaks:
            each.plant(patch)
            _planted.append(each.name)
            stack.callback(_planted.remove, each.name)
        yield
