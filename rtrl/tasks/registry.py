"""Tasks by name, for the command line and for loops over them."""

from collections.abc import Callable, Mapping
from typing import Any

from rtrl._utils import named_factories
from rtrl.tasks.adding import Adding
from rtrl.tasks.anbn import AnBn
from rtrl.tasks.byte_model import ByteModel
from rtrl.tasks.copy import Copy
from rtrl.tasks.digits import Digits
from rtrl.tasks.haystack import Haystack
from rtrl.tasks.protocol import Task

TASKS: Mapping[str, Callable[..., Task]] = {
    "anbn": AnBn,
    "haystack": Haystack,
    "copy": Copy,
    "adding": Adding,
    "bytes": ByteModel,
    "digits": Digits,
}
"""Name → the task's class, whose arguments are its options."""


def make(name: str, **options: Any) -> Task:
    """The task of this name: ``anbn``, ``haystack``, ``copy``, ``adding``, ``bytes`` or ``digits``; the options are the
    arguments of its class.

    Raises:
        ConfigError: there is no such task or option, or a value is out of range.

    >>> make("copy", delay=7).d_in
    5
    """
    task: Task = named_factories.make_named("task", name, TASKS, options)
    return task
