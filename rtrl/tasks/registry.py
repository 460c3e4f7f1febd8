"""Tasks by name, for the command line and for loops over tasks."""

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
from rtrl.tasks.tmaze import TMaze

TASKS: Mapping[str, Callable[..., Task]] = {
    "anbn": AnBn,
    "haystack": Haystack,
    "copy": Copy,
    "adding": Adding,
    "bytes": ByteModel,
    "digits": Digits,
    "tmaze": TMaze,
}
"""The class of each task by name; its arguments are the options of the task."""


def make(name: str, **options: Any) -> Task:
    """Make a task by its name.

    Args:
        name: ``anbn``, ``haystack``, ``copy``, ``adding``, ``bytes``, ``digits`` or ``tmaze``.
        options: the arguments of its class.

    Returns:
        The task.

    Raises:
        ConfigError: the task or the option does not exist, or a value is out of range; the message lists the names.

    Example:
        >>> make("copy", delay=7).d_in
        5
    """
    task: Task = named_factories.make_named("task", name, TASKS, options)
    return task
