"""The package as syntax trees: what each module imports, reads, and defines."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """A module of a package, parsed.

    Attributes:
        name: its dotted name; a package has the name of its folder.
        path: its file.
        folder: the folder directly below the package; "" for the modules beside those folders.
        tree: its syntax tree.
    """

    name: str
    path: Path
    folder: str
    tree: ast.Module


def modules(root: Path) -> dict[str, Module]:
    """Every module below the folder ``root`` of a package, by dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        dotted = (root.name, *parts[:-1], *(() if path.stem == "__init__" else (path.stem,)))
        folder = parts[0] if len(parts) > 1 else ""
        found[".".join(dotted)] = Module(".".join(dotted), path, folder, ast.parse(path.read_text(encoding="utf-8")))
    return found


def _runs(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below a node, without those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _runs(other)
            continue
        yield child
        yield from _runs(child)


def imports(package: dict[str, Module]) -> dict[str, set[str]]:
    """The modules of the package that each module imports, at its top or inside a function."""
    found: dict[str, set[str]] = {name: set() for name in package}
    for name, module in package.items():
        for node in _runs(module.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [dotted if dotted in package else node.module for dotted in inner]
            found[name] |= {dotted for dotted in names if dotted in package}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import one another, each sorted (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            circle = []
            while not circle or circle[-1] != name:
                circle.append(stack.pop())
            if len(circle) > 1 or name in graph.get(name, ()):
                found.append(sorted(circle))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(found)


def between_folders(package: dict[str, Module]) -> dict[str, set[str]]:
    """The other folders that each folder imports from."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, others in imports(package).items():
        own = _place(package[name])
        found[own] |= {_place(package[other]) for other in others} - {own}
    return dict(found)


def _place(module: Module) -> str:
    return module.folder or module.name


def _defined(tree: ast.AST) -> Iterator[str]:
    """The names that a module gives a value, as variables, fields, functions or classes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_reads(package: dict[str, Module], allowed: frozenset[str] = frozenset()) -> list[str]:
    """Where a module reads a private name that its own folder does not define, or imports one of another folder.

    Args:
        package: the modules.
        allowed: names with one leading underscore that belong to other libraries.
    """
    own: dict[str, set[str]] = defaultdict(set)
    for module in package.values():
        own[module.folder] |= set(_defined(module.tree))
    found = []
    for name, module in package.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if not of_itself and node.attr not in own[module.folder] | allowed:
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom) and _foreign(package, node.module, module.folder):
                private = [alias.name for alias in node.names if re.match(r"_[^_]", alias.name)]
                found += [f"{name}:{node.lineno}: {n}" for n in private if f"{node.module}.{n}" not in package]
    return found


def _foreign(package: dict[str, Module], name: str | None, folder: str) -> bool:
    return name in package and package[name].folder != folder


def exported(package: dict[str, Module]) -> dict[str, set[str]]:
    """Every name in an ``__all__`` of a package's ``__init__``, with the modules that it is imported from there."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, module in package.items():
        if module.path.name != "__init__.py":
            continue
        origins = {
            alias.asname or alias.name: node.module or ""
            for node in module.tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in module.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for public in ast.literal_eval(node.value):
                    found[public].add(_origin(package, origins.get(public, name), public))
    return dict(found)


def _origin(package: dict[str, Module], module: str, name: str) -> str:
    """The module that defines a name, through the ``__init__`` files that only pass it on."""
    if f"{module}.{name}" in package:
        return f"{module}.{name}"
    for node in package[module].tree.body if module in package else []:
        if isinstance(node, ast.ImportFrom) and node.module and name in [a.asname or a.name for a in node.names]:
            return _origin(package, node.module, name)
    return module


def classes(package: dict[str, Module]) -> dict[str, set[str]]:
    """The modules that define a class of each name at their top level."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, module in package.items():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name].add(name)
    return dict(found)
