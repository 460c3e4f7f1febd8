"""The rules of the house: where things stand, what imports what, and that oracles and the package stay apart."""

import ast
from pathlib import Path

import pytest
from helpers import fresh_process
from project import source

import rtrl

ROOT = Path(rtrl.__file__).parent
PACKAGE = source.modules(ROOT)
ORACLES_ALLOWED = ("testing", "verification")  # the folders of rtrl that may import the oracles

# What each folder may import besides rtrl.errors: only folders above it, so that data flows one way.
FLOW: dict[str, set[str]] = {
    "_utils": set(),
    "profiling": {"_utils"},
    "report": {"_utils"},
    "tasks": {"_utils"},
    "cells": {"_utils"},
    "_influence": {"_utils", "cells"},
    "_engine": {"_utils", "cells", "_influence"},
    "learners": {"_utils", "cells", "_influence", "_engine"},
    "costs": {"_utils", "cells", "_influence", "_engine", "learners", "profiling"},
    "training": {"_utils", "cells", "learners", "tasks"},
    "testing": {"_utils", "cells", "_engine", "learners", "profiling", "training"},
    "verification": {
        *("_utils", "cells", "_influence", "_engine", "learners", "costs", "profiling"),
        *("tasks", "training", "testing", "report"),
    },
    "cli": {"_utils", "cells", "learners", "costs", "tasks", "training", "testing", "verification", "report"},
}

# Names with one underscore that other libraries have and the package needs, with the reason.
FOREIGN_PRIVATE = {
    "_version": "a tensor's counter of changes in place; PyTorch has no public name for it",
    "_is_view": "whether a tensor shares the memory of another; PyTorch has no public name for it",
    "_C": "PyTorch's switch of gradients without the cost of a context manager, and functorch's level",
    "_set_grad_enabled": "as _C",
    "_functorch": "as _C",
    "_are_functorch_transforms_active": "as _C",
    "_is_any_autocast_enabled": "as _C",
    "_current_level": "whether forward-mode derivatives are being taken; PyTorch has no public name for it",
    "_cache_enabled": "whether parametrizations are cached; PyTorch has no public name for it",
    "_post_accumulate_grad_hooks": "hooks of a parameter, which must not see the learner's own derivatives",
    "_nn": "how PyTorch reads the arguments of ``module.to``",
    "_parse_to": "as _nn",
    "_make_wrapper_subclass": "how a subclass of Tensor is made that has no memory",
    "_disabled_torch_function_impl": "how such a subclass is kept out of the overriding of functions",
    "_schema": "which arguments an operator of PyTorch writes to",
    "_ops": "the type of PyTorch's operators, for the counter of multiply-adds",
    "_cdata": "the identity of a storage",
    "_values": "the values of a sparse tensor, without a check",
    "_parameters": "the parameters of one module by itself, in place",
    "_buffers": "the buffers of one module by itself, in place",
    "_modules": "the children of one module by itself, in place",
    "_forward_hooks": "hooks of a module: its own fast way would pass them by",
    "_forward_pre_hooks": "as _forward_hooks",
    "_backward_hooks": "as _forward_hooks",
    "_backward_pre_hooks": "as _forward_hooks",
    "_foreach_norm": "the norms of many tensors by one launch; PyTorch has no public name for it",
    "_foreach_add_": "as _foreach_norm, of sums: all or none, if an interrupt strikes",
    "_len_torch_function_stack": "how many modes are entered, to leave those that an interrupt left entered",
    "_pop_torch_function_stack": "as _len_torch_function_stack",
    "_len_torch_dispatch_stack": "as _len_torch_function_stack",
    "_pop_torch_dispatch_stack": "as _len_torch_function_stack",
    "_fields": "of a named tuple, public in spite of its underscore",
    "_replace": "as _fields",
    "_asdict": "as _fields",
}


def write(folder: Path, **texts: str) -> dict[str, source.Module]:
    """A package named ``pkg`` of the given modules; ``a__b`` is module b in folder a."""
    root = folder / "pkg"
    for name, text in {"__init__": "", **texts}.items():
        path = root / (name.replace("__", "/", 1) + ".py" if not name.startswith("__") else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return source.modules(root)


# ---------------------------------------------------------------------- the layout


def strangers(root: Path) -> list[str]:
    """What stands in the package beside its folders and the three files that belong there."""
    allowed = {"__init__.py", "errors.py", "py.typed"}
    return [p.name for p in root.iterdir() if p.name not in allowed and not (p.is_dir() and p.name != "__pycache__")]


def test_the_package_holds_folders_and_three_files() -> None:
    assert [name for name in strangers(ROOT) if name != "__pycache__"] == []
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} - {"__pycache__"} == set(FLOW)
    assert (ROOT / "py.typed").exists() and (ROOT / "errors.py").exists()


def test_a_loose_module_is_a_stranger(tmp_path: Path) -> None:
    write(tmp_path, helper="", errors="", cells__a="")
    assert strangers(tmp_path / "pkg") == ["helper.py"]


# ---------------------------------------------------------------------- imports


def test_no_module_imports_itself_in_a_circle() -> None:
    assert source.circles(source.imports(PACKAGE)) == []


def test_a_circle_is_found_also_inside_a_function(tmp_path: Path) -> None:
    lazily = "def f():\n    from pkg import a\n    return a\n"
    assert source.circles(source.imports(write(tmp_path, a="from pkg.b import f\n", b=lazily))) == [["pkg.a", "pkg.b"]]


def test_an_import_for_the_type_checker_alone_makes_no_circle(tmp_path: Path) -> None:
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg import a\n"
    assert source.circles(source.imports(write(tmp_path, a="from pkg.b import f\n", b=typed))) == []


def backwards(found: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports between folders that the flow does not have."""
    return {
        (folder, other)
        for folder, others in found.items()
        if folder in FLOW
        for other in others
        if other in {*FLOW, "oracles"} and other not in FLOW[folder]
    }


def test_data_flows_one_way_between_folders() -> None:
    assert backwards(source.between_folders(PACKAGE)) == set()


def test_the_flow_itself_has_no_circle() -> None:
    seen: set[str] = set()
    for folder, others in FLOW.items():
        assert others <= seen, folder
        seen.add(folder)


def test_an_import_against_the_flow_is_found(tmp_path: Path) -> None:
    found = source.between_folders(write(tmp_path, cells__a="import pkg.learners.b\n", learners__b=""))
    assert backwards(found) == {("cells", "learners")}


# ---------------------------------------------------------------------- private names


def test_no_module_reads_private_names_of_another_folder() -> None:
    assert source.private_reads(PACKAGE, frozenset(FOREIGN_PRIVATE)) == []


def test_every_foreign_private_name_is_still_needed() -> None:
    found = " ".join(source.private_reads(PACKAGE))
    assert [name for name in FOREIGN_PRIVATE if f".{name}" not in found] == []


def test_a_private_read_across_folders_is_found(tmp_path: Path) -> None:
    package = write(
        tmp_path,
        one__a="class A:\n    def __init__(self):\n        self._hidden = 1\n\n_secret = 1\n",
        one__b="from pkg.one.a import A, _secret\nx = A()._hidden\n",
        two__c="from pkg.one.a import A, _secret\ny = A()._hidden\n",
    )
    assert source.private_reads(package) == ["pkg.two.c:1: _secret", "pkg.two.c:2: A()._hidden"]


# ---------------------------------------------------------------------- public names


def doubles(package: dict[str, source.Module]) -> dict[str, set[str]]:
    """Exported names that mean two things: exported from two modules, or also the name of another class."""
    classes = source.classes(package)
    found = {name: where | classes.get(name, set()) for name, where in source.exported(package).items()}
    return {name: where for name, where in found.items() if len(where) > 1}


def test_no_public_name_is_defined_twice() -> None:
    assert doubles(PACKAGE) == {}


def test_a_second_definition_is_found(tmp_path: Path) -> None:
    package = write(
        tmp_path,
        __init__="from pkg.one import Plan, Stream\n\n__all__ = ['Plan', 'Stream']\n",
        one____init__="from pkg.one.a import Plan, Stream, make\n\n__all__ = ['Plan', 'Stream', 'make']\n",
        one__a="class Plan: ...\nclass Stream: ...\ndef make(): ...\n",
        two____init__="from pkg.two.b import make\n\n__all__ = ['make']\n",
        two__b="class Plan: ...\ndef make(): ...\n",
    )
    assert doubles(package) == {"Plan": {"pkg.one.a", "pkg.two.b"}, "make": {"pkg.one.a", "pkg.two.b"}}


@pytest.mark.parametrize("name", rtrl.__all__)
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    value = getattr(rtrl, name)
    assert value.__doc__ or isinstance(value, str)


# ---------------------------------------------------------------------- oracles


def importers_of_oracles(root: Path) -> list[str]:
    """Modules under ``root``, outside the allowed folders, that import oracles anywhere, also inside functions."""
    found = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        if where.parts[0] in ORACLES_ALLOWED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if any(name.split(".")[0] == "oracles" for name in names):
                found.append(str(where))
    return found


def loaded_after(code: str, name: str) -> list[str]:
    script = f"import sys\n{code}\nprint(*[m for m in sys.modules if m == {name!r} or m.startswith({name!r} + '.')])"
    done = fresh_process.run(script)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_production_code_does_not_import_oracles() -> None:
    assert importers_of_oracles(ROOT) == []


def test_an_import_of_oracles_is_found(tmp_path: Path) -> None:
    (tmp_path / "verification").mkdir()
    (tmp_path / "verification" / "allowed.py").write_text("import oracles\n")
    (tmp_path / "bad.py").write_text("def f():\n    from oracles.bptt import bptt\n    return bptt\n")
    assert importers_of_oracles(tmp_path) == ["bad.py"]


def test_a_fresh_process_that_uses_rtrl_has_not_loaded_oracles() -> None:
    assert loaded_after("import rtrl", "oracles") == []
    assert loaded_after("import rtrl, oracles", "oracles") != []


def test_a_fresh_process_that_uses_oracles_has_not_loaded_rtrl() -> None:
    code = (
        "import pkgutil, importlib, oracles\n"
        "for m in pkgutil.walk_packages(oracles.__path__, 'oracles.'):\n    importlib.import_module(m.name)"
    )
    assert loaded_after(code, "rtrl") == []
    assert loaded_after(code + "\nimport rtrl", "rtrl") != []
