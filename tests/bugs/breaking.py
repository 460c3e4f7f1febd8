"""Breaking a function in memory. Its code is swapped, wherever it is imported, and swapped back.

``replaced`` puts another function in its place. ``swapped`` changes its syntax tree where that has the form of a
pattern; ``patterns`` says what patterns are.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from patterns import changed

Broken = Callable[..., Any] | property
Break = partial[AbstractContextManager[None]]  # of one of the two tools


class StaleEntry(Exception):
    """A form that is to be replaced is not in a function as often as it should be: the catalogue is out of date."""


@contextmanager
def replaced(function: Broken, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Run with ``make(function)`` in the place of a function; of a property, its getter."""
    target = _target(function)
    original = FunctionType(target.__code__, target.__globals__, target.__name__, target.__defaults__)
    original.__kwdefaults__ = target.__kwdefaults__
    with _running(target, _call_of(make(original))):
        yield


@contextmanager
def swapped(function: Broken, find: str, put: str, *, count: int = 1) -> Iterator[None]:
    """Run with the pattern ``put`` in the place of whatever has the form of the pattern ``find`` in a function.

    Raises:
        StaleEntry: that is not ``count`` places.
    """
    target = _target(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(target)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    places = changed(definition.body, find, put)
    if places != count:
        raise StaleEntry(f"{target.__qualname__} has {places} places of this form, not {count}: {find}")
    space: dict[str, Any] = {}
    exec(compile(ast.unparse(tree), f"<broken {target.__qualname__}>", "exec"), target.__globals__, space)
    with _running(target, space[definition.name].__code__):
        yield


def _target(function: Broken) -> FunctionType:
    """The function under decorators."""
    target = inspect.unwrap(function.fget if isinstance(function, property) and function.fget else function)
    assert isinstance(target, FunctionType)
    assert not target.__closure__, "code with a closure cannot be swapped"
    return target


@contextmanager
def _running(target: FunctionType, code: CodeType) -> Iterator[None]:
    """Run with other code in a function, whose signature looks the same as before."""
    kept, signature = target.__code__, inspect.signature(target)
    target.__code__ = code
    target.__signature__ = signature  # type: ignore[attr-defined]
    try:
        yield
    finally:
        target.__code__ = kept
        del target.__signature__  # type: ignore[attr-defined]


def _call_of(replacement: Callable[..., Any]) -> CodeType:
    """Code that calls a function, which it holds as a constant: so it needs no name for it where it runs."""

    def call(*args: Any, **options: Any) -> Any:
        function: Any = "the replacement"
        return function(*args, **options)

    constants = (replacement if value == "the replacement" else value for value in call.__code__.co_consts)
    return call.__code__.replace(co_consts=tuple(constants))
