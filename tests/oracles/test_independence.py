"""The oracles never import the code they check, and the proof of it can fail."""

from __future__ import annotations

from pathlib import Path

from helpers import fresh_process

import oracles

PROBE = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
names = sorted(sys.modules)
assert len([n for n in names if n.startswith(sys.argv[1] + ".")]) == int(sys.argv[2])
print(json.dumps([n for n in names if n.split(".")[0] == "rtrl"]))
"""


def checked_code_loaded_by(package: str, home: Path) -> str:
    """The modules of `rtrl`, as JSON, that a fresh interpreter holds after importing all of `package`."""
    submodules = len(list((home / package).glob("*.py"))) - 1
    # In ``home``, so that what lies there comes before whatever is installed.
    done = fresh_process.run(PROBE, package, str(submodules), cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_oracles_import_nothing_of_the_checked_code() -> None:
    assert checked_code_loaded_by("oracles", Path(oracles.__file__).parents[1]) == "[]"


def test_the_proof_catches_a_package_that_does(tmp_path: Path) -> None:
    (tmp_path / "rtrl").mkdir()
    (tmp_path / "rtrl" / "__init__.py").write_text("")
    (tmp_path / "rtrl" / "core.py").write_text("answer = 42\n")
    (tmp_path / "guilty").mkdir()
    (tmp_path / "guilty" / "__init__.py").write_text("")
    (tmp_path / "guilty" / "hidden.py").write_text("def f():\n    pass\n\nfrom rtrl.core import answer\n")
    assert checked_code_loaded_by("guilty", tmp_path) == '["rtrl", "rtrl.core"]'
