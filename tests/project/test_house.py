"""The rule of the house: oracles know nothing of rtrl, and in rtrl only testing and verification know the oracles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rtrl

ROOT = Path(rtrl.__file__).parent
ALLOWED = ("testing", "verification")


def importers_of_oracles(root: Path) -> list[str]:
    """Modules under ``root``, outside the allowed folders, that import oracles anywhere, also inside functions."""
    found = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        if where.parts[0] in ALLOWED:
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
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return out.stdout.split()


def test_production_code_does_not_import_oracles() -> None:
    assert importers_of_oracles(ROOT) == []


def test_that_this_can_fail(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", rtrl.__all__)
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    value = getattr(rtrl, name)
    assert value.__doc__
