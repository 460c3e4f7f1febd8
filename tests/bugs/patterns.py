"""Patterns: Python code that is found in a syntax tree by its form, so that its layout does not matter.

In a pattern a name of CAPITALS, two or more, stands for any expression, and as an attribute for any attribute; where it
occurs again, for the same one. ``...`` stands for all further arguments of a call, or as a statement for any
statements; a pattern has one ``...`` at most. In the code that is put in the place of what was found, both stand for
what they were found to be.

A pattern is an expression, or one or several statements, which follow each other.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

Bound = dict[str, Any]

_REST = "..."
_NOT_FORM = {"ctx", "kind", "type_comment"}


def changed(body: list[ast.stmt], find: str, put: str) -> int:
    """Put ``put`` wherever ``body`` has the form of ``find``, in place; says at how many places."""
    pattern, new = ast.parse(find).body, ast.parse(put).body
    if len(pattern) == len(new) == 1 and isinstance(pattern[0], ast.Expr) and isinstance(new[0], ast.Expr):
        return _change_expressions(ast.Module(body, []), pattern[0].value, put)
    return _change_statements(ast.Module(body, []), pattern, put)


def _change_expressions(tree: ast.Module, pattern: ast.expr, put: str) -> int:
    found: dict[ast.AST, ast.AST] = {}
    for node in ast.walk(tree):
        bound = _match(pattern, node, {}) if isinstance(node, ast.expr) else None
        if bound is not None:
            found[node] = _filled(put, bound)[0].value  # type: ignore[attr-defined]
    _Replace(found).visit(tree)
    return len(found)


def _change_statements(tree: ast.Module, pattern: list[ast.stmt], put: str) -> int:
    places = 0
    for body in list(_bodies(tree)):
        for start in reversed(range(len(body))):
            for stop in range(start + 1, len(body) + 1):
                bound = _match_all(pattern, body[start:stop], {})
                if bound is not None:
                    body[start:stop] = _filled(put, bound) or [ast.Pass()]
                    places += 1
                    break
    return places


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield value


# ---------------------------------------------------------------------- finding


def _match(pattern: Any, found: Any, bound: Bound) -> Bound | None:
    """``bound``, and what further names stand for, if a part of a tree has the form of a pattern; else None."""
    name = pattern.id if isinstance(pattern, ast.Name) else pattern
    if _stands_for_any(name) and isinstance(found, ast.expr | str):
        return _bind(name, found, bound)
    if type(pattern) is not type(found):
        return None
    if isinstance(pattern, list):
        return _match_all(pattern, found, bound)
    if isinstance(pattern, ast.Constant):
        return bound if repr(pattern.value) == repr(found.value) else None
    if isinstance(pattern, ast.Call):
        return _match_call(pattern, found, bound)
    if isinstance(pattern, ast.AST):
        fields = [field for field in pattern._fields if field not in _NOT_FORM]
        return _match_each([getattr(pattern, f) for f in fields], [getattr(found, f) for f in fields], bound)
    return bound if pattern == found else None


def _match_each(patterns: list[Any], found: list[Any], bound: Bound) -> Bound | None:
    """Part by part; there are as many of both."""
    for pattern, part in zip(patterns, found, strict=True):
        known = _match(pattern, part, bound)
        if known is None:
            return None
        bound = known
    return bound


def _match_all(patterns: list[Any], found: list[Any], bound: Bound) -> Bound | None:
    """All of a list, in order; one of the patterns may be ``...``."""
    rest = next((place for place, pattern in enumerate(patterns) if _is_rest(pattern)), None)
    if rest is None:
        return _match_each(patterns, found, bound) if len(patterns) == len(found) else None
    assert _REST not in bound, "a pattern has one '...' at most"
    stop = len(found) - (len(patterns) - rest - 1)
    if stop < rest:
        return None
    bound = {**bound, _REST: found[rest:stop]}
    return _match_each([*patterns[:rest], *patterns[rest + 1 :]], [*found[:rest], *found[stop:]], bound)


def _match_call(pattern: ast.Call, found: ast.Call, bound: Bound) -> Bound | None:
    """Keyword arguments match by name, in any order."""
    named = {keyword.arg: keyword.value for keyword in found.keywords}
    wanted = {keyword.arg: keyword.value for keyword in pattern.keywords}
    if not wanted.keys() <= named.keys():
        return None
    known = _match_each([pattern.func, *wanted.values()], [found.func, *(named[name] for name in wanted)], bound)
    if known is None:
        return None
    others = [keyword for keyword in found.keywords if keyword.arg not in wanted]
    arguments = [ast.Expr(value) if _is_ellipsis(value) else value for value in pattern.args]
    return _match_all(arguments, [*found.args, *others], known)


def _bind(name: str, found: ast.expr | str, bound: Bound) -> Bound | None:
    node = ast.Name(found) if isinstance(found, str) else found
    if name in bound and ast.unparse(bound[name]) != ast.unparse(node):
        return None
    return {**bound, name: node}


def _stands_for_any(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch("[A-Z][A-Z0-9_]+", name) is not None


def _is_rest(pattern: Any) -> bool:
    return isinstance(pattern, ast.Expr) and _is_ellipsis(pattern.value)


def _is_ellipsis(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


# ---------------------------------------------------------------------- putting


def _filled(put: str, bound: Bound) -> list[ast.stmt]:
    """The code to be put, with what names and ``...`` were found to be."""
    return _Fill(bound).visit(ast.parse(put)).body  # type: ignore[no-any-return]


class _Replace(ast.NodeTransformer):
    """Puts nodes in the place of others, the outermost first."""

    def __init__(self, new: dict[ast.AST, ast.AST]) -> None:
        self._new = new

    def visit(self, node: ast.AST) -> Any:
        return self._new[node] if node in self._new else self.generic_visit(node)


class _Fill(ast.NodeTransformer):
    """Puts what was found in the place of names of CAPITALS and of ``...``."""

    def __init__(self, bound: Bound) -> None:
        self._bound = bound

    def visit_Name(self, node: ast.Name) -> Any:
        return self._bound[node.id] if _stands_for_any(node.id) else node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if _stands_for_any(node.attr):
            node.attr = self._bound[node.attr].id
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        return self._bound[_REST] if _is_rest(node) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        open_, values = any(map(_is_ellipsis, node.args)), [a for a in node.args if not _is_ellipsis(a)]
        node.args = values
        self.generic_visit(node)
        for rest in self._bound[_REST] if open_ else ():
            (node.keywords if isinstance(rest, ast.keyword) else node.args).append(rest)
        return node
