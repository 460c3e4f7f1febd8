"""The library needs PyTorch and NumPy alone; what needs an extra says which one; other services' files are sound."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import fresh_process

import rtrl

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def run_without(names: str, code: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a process in which the modules of these names cannot be imported."""
    hidden = f"import sys\nfor name in {names.split()!r}: sys.modules[name] = None\n"
    return fresh_process.run(hidden + code, cwd=ROOT)


def floors(requirements: list[str]) -> dict[str, str]:
    """The lowest version that each requirement names."""
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", text) for text in requirements)
    return {match[1].lower(): match[2] for match in found if match is not None}


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if "==" in line]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_the_library_needs_pytorch_and_numpy_alone() -> None:
    assert set(floors(PROJECT["dependencies"])) == {"torch", "numpy"}
    everything = "typer rich jinja2 markupsafe matplotlib sklearn tensorboard click"
    code = """
import torch, rtrl, rtrl.costs, rtrl.learners, rtrl.profiling, rtrl.report, rtrl.tasks, rtrl.testing, rtrl.training
cell = rtrl.from_torch(torch.nn.GRUCell(3, 5), torch.nn.Linear(5, 2))
print(rtrl.testing.check_cell(cell, [torch.randn(2, 3)]))
learner = rtrl.BlockRTRL(cell, batch_size=2, block=4)
learner.backward(learner.step(torch.randn(2, 3)).square().sum())
learner.sync()
"""
    done = run_without(everything, code)
    assert done.returncode == 0, done.stderr


def test_a_plan_is_printed_without_an_extra() -> None:
    code = "import torch, rtrl\ncell = rtrl.from_torch(torch.nn.GRUCell(3, 5))\nprint(rtrl.plan(cell, steps=10))"
    done = run_without("typer rich", code)
    assert done.returncode == 0, done.stderr
    assert "BlockRTRL(block=" in done.stdout and "<- best" in done.stdout


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_the_command_says_which_extra_it_needs(name: str) -> None:
    done = run_without(name, "from rtrl.cli import main\nmain()")
    assert done.returncode == 2
    assert done.stderr == f"The command rtrl needs {name}, which is not installed: pip install 'rtrl[cli]'\n"


def test_another_missing_module_is_not_taken_for_an_extra() -> None:
    done = run_without("rtrl.cli.plan", "from rtrl.cli import main\nmain()")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr and "rtrl.cli.plan" in done.stderr


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_a_report_says_which_extra_it_needs(name: str) -> None:
    results = next(path for path in sorted((ROOT / "docs").rglob("results.json")))
    arguments = ["rtrl", "report", str(results), "--output", "/dev/null"]
    done = run_without(name, f"sys.argv = {arguments!r}\nfrom rtrl.cli import main\nmain()")
    assert done.returncode == 2, done.stderr
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stderr).split())
    assert name in said and "pip install 'rtrl[report]'" in said


def test_the_extras_of_the_commands_are_in_those_of_the_tests() -> None:
    assert {"cli", "report", "tasks", "tensorboard", "test", "docs", "bench", "dev", "mutants"} <= set(EXTRAS)
    assert "rtrl[cli,report,tasks]" in EXTRAS["test"]
    assert "rtrl[test,docs]" in EXTRAS["dev"]


def test_the_entry_point_is_there() -> None:
    module, function = PROJECT["scripts"]["rtrl"].split(":")
    assert (module, function) == ("rtrl.cli", "main")


def test_the_lowest_versions_are_those_declared() -> None:
    used = [*PROJECT["dependencies"], *(line for name in ("cli", "report", "tasks", "test") for line in EXTRAS[name])]
    declared, lowest = floors(used), pins(ROOT / "constraints-lowest.txt")
    assert set(lowest) == set(declared)
    for name, version in lowest.items():
        assert [*version.split("."), "0", "0"][:3] == [*declared[name].split("."), "0", "0"][:3], name


def test_every_declared_package_is_pinned() -> None:
    declared = {*floors(PROJECT["dependencies"]), *(name for lines in EXTRAS.values() for name in floors(lines))}
    assert {name.lower() for name in declared} <= set(pins(ROOT / "constraints.txt"))


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.github-workflows", ".github/workflows/ci.yml"), ("vendor.citation-file-format", "CITATION.cff")],
)
def test_the_files_for_other_services_have_their_form(schema: str, file: str, tmp_path: Path) -> None:
    def check(path: Path) -> int:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert check(ROOT / file) == 0
    broken = tmp_path / Path(file).name
    broken.write_text((ROOT / file).read_text().replace("jobs:", "job:").replace("cff-version", "cff-versions"))
    assert check(broken) != 0


def test_the_workflow_is_sound(tmp_path: Path) -> None:
    def audit(path: Path) -> "subprocess.CompletedProcess[str]":
        zizmor = Path(sys.executable).with_name("zizmor")
        command = [str(zizmor), "--offline", "--no-progress", "--no-config", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    done = audit(workflow)
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "bad.yml"
    bad.write_text(workflow.read_text().replace("bash .ci/run", "echo ${{ github.event.issue.title }}"))
    assert audit(bad).returncode != 0


def test_the_workflow_runs_the_gate_the_counts_and_the_docs_on_every_python() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    matrix = "python: [" + ", ".join(f'"{version}"' for version in versions) + "]"
    jobs = dict(
        zip(*[iter(re.split(r"^  (\w+):\n", text.split("\njobs:\n")[1], flags=re.MULTILINE)[1:])] * 2, strict=True)
    )
    for job, command in (("gate", "bash .ci/run"), ("counts", "tox -e counts"), ("docs", "tox -e docs")):
        assert matrix in jobs[job] and command in jobs[job], job
    environments = (ROOT / "tox.ini").read_text()
    assert all(f"[testenv:{name}]" in environments for name in re.findall(r"tox -e (\w+)", text))


def test_the_citation_has_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == rtrl.__version__  # type: ignore[index]
