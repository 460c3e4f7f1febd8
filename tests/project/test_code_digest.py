"""The digest of the installed code changes with every source file of the package and its oracles, with nothing else."""

from pathlib import Path

import pytest

from rtrl._utils import code_digest


def test_the_digest_is_that_of_all_source_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "a_package_of_this_test"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "inner" / "b.py").write_text("y = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code_digest, "PACKAGES", (package.name,))
    found = [code_digest.installed_code()]
    (package / "data.txt").write_text("no code")
    assert code_digest.installed_code() == found[0]
    (package / "inner" / "b.py").write_text("y = 3\n")
    found.append(code_digest.installed_code())
    (package / "inner" / "b.py").rename(package / "inner" / "c.py")
    found.append(code_digest.installed_code())
    (package / "inner" / "c.py").unlink()
    found.append(code_digest.installed_code())
    assert len(set(found)) == len(found) and all(len(digest) == 16 for digest in found)


def test_the_package_and_its_oracles_are_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {code_digest.installed_code()}
    for packages in (("rtrl",), ("oracles",), ()):
        monkeypatch.setattr(code_digest, "PACKAGES", packages)
        found.add(code_digest.installed_code())
    assert len(found) == 4
