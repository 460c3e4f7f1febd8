"""Breaking a function in memory: its source is changed and compiled, and its code swapped, wherever it is imported."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any


class StaleEntry(Exception):
    """A text that is to be replaced is no longer there: the catalogue is out of date."""


@contextmanager
def rewritten(function: Callable[..., Any], *changes: tuple[str, str]) -> Iterator[None]:
    """Run with ``function`` changed: each (old, new) pair replaces text in its source, which must contain it.

    Raises:
        StaleEntry: the source does not contain a text to be replaced.
    """
    target = inspect.unwrap(function)
    assert isinstance(target, FunctionType)
    source = textwrap.dedent(inspect.getsource(target))
    for old, new in changes:
        if old not in source:
            raise StaleEntry(f"{target.__qualname__} no longer contains {old!r}")
        source = source.replace(old, new)
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    space: dict[str, Any] = {}
    exec(compile(tree, f"<broken {target.__qualname__}>", "exec"), target.__globals__, space)
    kept, target.__code__ = target.__code__, space[definition.name].__code__
    try:
        yield
    finally:
        target.__code__ = kept
