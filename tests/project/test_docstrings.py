"""Public docstrings can be read by machines: every section parses, and every parameter is explained."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

import rtrl

ROOT = Path(rtrl.__file__).parent.parent
CASES = ["rtrl", "oracles"]
# Methods of the protocol of a cell, which rtrl.cells.Cell explains for all cells, and one of PyTorch's modules.
PROTOCOL = {"forward", "init_state", "analytic_step", "extra_repr"}


class Warnings(logging.Handler):
    """Collects what griffe has to say about docstrings."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load(name: str, folder: Path) -> griffe.Module:
    found = griffe.load(name, search_paths=[str(folder)], docstring_parser=griffe.Parser.google, force_inspection=False)
    assert isinstance(found, griffe.Module)
    return found


def exports(module: griffe.Module) -> Iterator[griffe.Object]:
    """What the module and the packages in it export, with the public methods of classes, inherited ones included."""
    for name in module.exports or []:
        member = module.members[str(name)]
        target = member.final_target if isinstance(member, griffe.Alias) else member
        if not isinstance(target, griffe.Module):
            yield target
        if isinstance(target, griffe.Class):
            for kind in (target, *target.mro()):
                yield from (m for n, m in kind.members.items() if _public(n) and isinstance(m, griffe.Function))
    for name, member in module.members.items():
        if isinstance(member, griffe.Module) and member.is_init_module and not name.startswith("_"):
            yield from exports(member)


def _public(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def complaints(module: griffe.Module) -> list[str]:
    """What griffe warns of in the docstrings of everything that is exported."""
    handler = Warnings()
    logger = logging.getLogger("griffe")
    logger.addHandler(handler)
    try:
        for item in {id(item): item for item in exports(module)}.values():
            if item.docstring is not None:
                item.docstring.parse("google")
    finally:
        logger.removeHandler(handler)
    return handler.lines


def unexplained(module: griffe.Module) -> list[str]:
    """Public functions, classes and methods without a docstring, and parameters that theirs does not explain.

    A parameter is explained by an entry of a section, or, in a short docstring, by its name in code font. A method may
    leave it to the docstring of the same method of a base class.
    """
    found = []
    for item in {id(item): item for item in exports(module)}.values():
        if not isinstance(item, (griffe.Class, griffe.Function)) or item.name == "__init__":
            continue
        if item.name in PROTOCOL and re.match(r"rtrl\.cells\.(?!protocol)", item.path):
            continue
        texts = [item.docstring, *_above(item)]
        docstrings = [docstring for docstring in texts if docstring is not None]
        if not docstrings:
            found.append(f"{item.path}: no docstring")
            continue
        named = set().union(*map(_named, docstrings))
        found += [f"{item.path}: {name}" for name in _parameters(item) if name not in named]
    return found


def _named(docstring: griffe.Docstring) -> set[str]:
    sections = docstring.parse("google", warnings=False)
    kinds = (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes)
    entries = {entry.name.strip("*") for section in sections if section.kind in kinds for entry in section.value}
    return entries | {word for code in re.findall(r"`+([^`]+)`+", docstring.value) for word in re.findall(r"\w+", code)}


def _above(item: griffe.Object) -> list[griffe.Docstring | None]:
    """The docstrings of the same method in the classes above."""
    parent = item.parent
    above = parent.mro() if isinstance(parent, griffe.Class) else []
    return [base.members[item.name].docstring for base in above if item.name in base.members]


def _parameters(item: griffe.Class | griffe.Function) -> list[str]:
    function = item.members.get("__init__") if isinstance(item, griffe.Class) else item
    names = (
        [parameter.name for parameter in function.parameters if parameter.name not in ("self", "cls")]
        if isinstance(function, griffe.Function)
        else []
    )
    if isinstance(item, griffe.Class) and "dataclass" in item.labels:
        names += [name for name, member in item.members.items() if _is_field(name, member)]
    return [name.strip("*") for name in names if not name.startswith("_")]


def _is_field(name: str, member: griffe.Object | griffe.Alias) -> bool:
    return isinstance(member, griffe.Attribute) and "dataclass-field" in member.labels and not name.startswith("_")


def package(folder: Path, text: str) -> griffe.Module:
    (folder / "pkg").mkdir()
    (folder / "pkg" / "__init__.py").write_text(text)
    return load("pkg", folder)


@pytest.mark.parametrize("name", CASES)
def test_public_docstrings_parse_without_a_warning(name: str) -> None:
    assert complaints(load(name, ROOT)) == []


@pytest.mark.parametrize("name", CASES)
def test_public_docstrings_explain_every_parameter(name: str) -> None:
    assert unexplained(load(name, ROOT)) == []


def test_enough_is_looked_at() -> None:
    names = {item.path for item in exports(load("rtrl", ROOT))}
    assert {"rtrl.learners.block_rtrl.BlockRTRL", "rtrl.learners.base.Learner.sync"} <= names
    assert "rtrl.learners.portable.PortableLearner.to" in names
    assert len(names) > 100


BAD = '''
__all__ = ["f", "A"]

def f(x: int, y: int) -> int:
    """Add two numbers.

    Args:
        x, y: the numbers.
    """
    return x + y

class A:
    """Hold a number.

    Raises:
        It is too large.
    """

    def __init__(self, size: int) -> None: ...

    def grow(self) -> None: ...
'''


def test_a_bad_docstring_is_found(tmp_path: Path) -> None:
    bad = package(tmp_path, BAD)
    said = "\n".join(complaints(bad))
    assert "x, y" in said and "It is too large" in said
    assert unexplained(bad) == ["pkg.f: x", "pkg.f: y", "pkg.A: size", "pkg.A.grow: no docstring"]


def test_a_good_docstring_is_not(tmp_path: Path) -> None:
    good = BAD.replace("x, y: the numbers.", "x: the first.\n        y: the second.")
    good = good.replace("Raises:\n        It is too large.", "Args:\n        size: the number.")
    good = good.replace("-> None: ...\n'", "").replace(
        "grow(self) -> None: ...", 'grow(self) -> None:\n        "Grow."'
    )
    module = package(tmp_path, good)
    assert complaints(module) == [] and unexplained(module) == []
