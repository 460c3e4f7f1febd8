"""``rtrl check`` and ``pytest --rtrl-spec`` in a folder of a user's own, outside the package."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rtrl.cli.app import app
from rtrl.testing import cell_checks

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

SPECS = '''
import functools

import torch
from torch import nn

import rtrl
import third_party
from rtrl.testing import CellSpec, LearnerSpec
from rtrl.testing.streams import dense_stream

few = dict(streams=[dense_stream(0, steps=6)], sparse=False)
good = LearnerSpec(third_party.textbook, name="good", **few)
bad = LearnerSpec(third_party.cut_at_borders, name="bad", **few)
known = LearnerSpec(third_party.cut_at_borders, name="declared", expected_failures={"own streams": "truncated"}, **few)
stale = LearnerSpec(third_party.textbook, name="stale", expected_failures={"own streams": "once wrong"}, **few)
unjudged = LearnerSpec(third_party.textbook, name="unjudged", expected_failures={"dormant slices": "no"}, **few)
unknown = LearnerSpec(third_party.textbook, name="unknown", expected_failures={"own stream": "misspelt"}, **few)
both = [good, bad]
nothing = []


def make_cell():
    return rtrl.cells.from_torch(nn.GRUCell(3, 4), nn.Linear(4, 2))


def pair():
    return rtrl.cells.from_torch(nn.GRUCell(3, 4)), [torch.ones(2, 3), torch.zeros(2, 3)]


class Leak(nn.Module):
    """Row 0 decays, undeclared."""

    def __init__(self):
        super().__init__()
        self.write = nn.Linear(3, 1)

    def init_state(self, batch_size):
        return torch.full((batch_size, 2), 0.5)

    def forward(self, x, h):
        h_next = torch.stack([0.9 * h[:, 0], torch.tanh(self.write(x)[:, 0] + h[:, 1])], dim=1)
        return h_next, h_next, rtrl.Sparsity(None, torch.ones(len(x), 1, dtype=torch.int64))


class Odd(nn.Module):
    def init_state(self, batch_size):
        return torch.zeros(batch_size, 2)

    def forward(self, x, h):
        return x["words"], h


def four(a, b, c, d): ...


def keyword(*, a): ...


def several(*a): ...


def raising():
    raise ValueError("not today")


gru = nn.GRUCell
strange = LearnerSpec(third_party.textbook, name="a/b::c [x]\\n2", **few)
functions = [third_party.textbook, third_party.off_by_one]


text = "a text"
cell = make_cell()
partial = functools.partial(rtrl.BlockRTRL, block=2)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which is also where this process is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "broken", "leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    shutil.copy(HERE / "third_party.py", tmp_path)
    (tmp_path / "mine.py").write_text(SPECS)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def check(*arguments: str) -> Any:
    """``rtrl check`` in this process."""
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "400", "TERM": "dumb"})


def with_plugin(*arguments: str) -> list[str]:
    """The arguments of a pytest with the plugin, whether the package is installed or not."""
    installed = any(point.name == "rtrl" for point in entry_points(group="pytest11"))
    return [*([] if installed else ["-p", "_rtrl_pytestplugin"]), "-p", "no:cacheprovider", "-q", *arguments]


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in the folder, in a process of its own."""
    return run(folder, "-m", "pytest", *with_plugin(*arguments))


def inprocess(folder: Path, pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """pytest in the folder, in this process: PyTorch is not imported again."""
    os.chdir(folder)
    return pytester.runpytest_inprocess("--rootdir", str(folder), *with_plugin(*arguments))


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("name", "check_name", "first", "words"),
    [
        ("off_by_one", "dense cell", "step 0", "off by one step"),
        ("cut_at_borders", "dense cell", "step 5", "truncated BPTT"),
    ],
)
def test_a_wrong_learner_is_refused_by_name(folder: Path, name: str, check_name: str, first: str, words: str) -> None:
    done = check(f"third_party:{name}", "--only", check_name)
    assert done.exit_code == 1, done.output
    for part in (f"{name}: FAIL {check_name}", first, words, "found", "expected", f"rtrl check third_party:{name}"):
        assert part in done.stdout
    assert "--seed 0" in done.stdout


def test_the_command_runs_in_a_process_of_its_own(folder: Path) -> None:
    command = ["check", "third_party:off_by_one", "--only", "dense cell"]
    done = run(folder, "-c", "from rtrl.cli import main; main()", *command)
    assert done.returncode == 1, done.stderr
    assert "off by one step" in done.stdout


def test_a_right_learner_passes(folder: Path) -> None:
    done = check("third_party:textbook", "--only", "dense cell", "--only", "layers", "--seed", "3")
    assert done.exit_code == 0, done.output
    assert "2 passed" in done.stdout
    done = check("third_party:backpropagation", "--only", "dense cell")
    assert done.exit_code == 0, done.output


def test_cells_are_checked_with_inputs_given_or_guessed(folder: Path) -> None:
    for name in ("make_cell", "pair"):
        done = check(f"mine:{name}")
        assert done.exit_code == 0, done.output
        assert f"{len(cell_checks())} passed" in done.stdout
    done = check("mine:Leak")
    assert done.exit_code == 1
    assert "Leak: FAIL unwritten rows are copied: " in done.stdout
    assert "row 0" in done.stdout


def test_verdicts_go_to_json(folder: Path) -> None:
    done = check("mine:both", "--only", "own streams", "--json", "-")
    assert done.exit_code == 1
    records = json.loads(done.stdout)
    assert [(record["spec"], record["outcome"]) for record in records] == [("good", "passed"), ("bad", "failed")]
    assert records[1]["failures"][0]["step"] == 5
    assert "bad: FAIL own streams" in done.stderr
    done = check("mine:both", "--only", "own streams", "--json", "out.json")
    assert json.loads((folder / "out.json").read_text()) == records


def test_expected_failures_stale_ones_and_nothing_judged(folder: Path) -> None:
    done = check("mine:known", "--only", "own streams")
    assert (done.exit_code, "1 expected failure" in done.stdout) == (0, True)
    done = check("mine:stale", "--only", "own streams")
    assert (done.exit_code, "but it passes; take it out of expected_failures" in done.stdout) == (1, True)
    done = check("mine:good", "--only", "dense cell")
    assert (done.exit_code, "Nothing was judged." in done.stdout) == (1, True)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("mine", "must have the form package.module:name"),
        ("mine:", "must have the form"),
        ("mine:nobody", "mine has no 'nobody'"),
        ("nowhere:thing", "nowhere cannot be imported"),
        ("broken:thing", "No module named 'no_such_module'"),
        ("mine:nothing", "nothing to check"),
        ("mine:text", "must be a spec, a list of specs"),
        ("mine:cell", "is a module; give a function that makes it"),
        ("mine:four", "must be given 4 arguments"),
        ("mine:keyword", "must be given a="),
        ("leaving:thing", "leaving cannot be imported: SystemExit: 3"),
        ("mine:several", "takes *a"),
        ("mine:raising", "raising() raised ValueError: not today"),
        ("mine:gru", "must be given arguments"),
        ("mine:Odd", "cannot be guessed"),
        ("mine:unknown", "names 'own stream', which is not a check"),
    ],
)
def test_targets_that_stand_for_nothing_are_refused(folder: Path, target: str, words: str) -> None:
    done = check(target)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.replace("│", " ").split())


def test_an_unknown_check_is_refused(folder: Path) -> None:
    done = check("mine:good", "--only", "dense")
    assert done.exit_code == 2
    assert "there is no check 'dense'" in done.stderr


# ---------------------------------------------------------------- the plugin


def test_the_plugin_runs_a_spec_without_a_test_file(folder: Path) -> None:
    (folder / "test_other.py").write_text("def test_other():\n    raise SystemError\n")
    done = pytest_run(folder, "--rtrl-spec=mine:both", "-k", "own")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "FAILED rtrl::bad::own streams" in done.stdout
    assert "step 5" in done.stdout
    assert "Traceback" not in done.stdout
    assert "SystemError" not in done.stdout, "nothing else is collected"


def test_the_plugin_runs_files_that_are_named_beside_a_spec(folder: Path, pytester: pytest.Pytester) -> None:
    (folder / "test_other.py").write_text("def test_other():\n    raise SystemError\n")
    done = inprocess(folder, pytester, "--rtrl-spec=mine:good", "-k", "own or test_other", "test_other.py")
    assert "SystemError" in done.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--rtrl-spec=mine:nothing"], 4, "nothing to check"),
        (["--rtrl-spec=mine:unknown"], 4, "which is not a check"),
        (["--rtrl-spec=mine:good", "-k", "elephant"], 5, "deselected"),
        (["--rtrl-spec=mine:good", "-k", "dormant"], 5, "skipped"),
        (["--rtrl-spec=mine:stale", "-k", "own"], 1, "once wrong"),
        (["--rtrl-spec=mine:known", "-k", "own"], 0, "1 xfailed"),
        (["--rtrl-spec=mine:unjudged", "-k", "dormant"], 1, "but it is not judged"),
        (["--rtrl-spec=mine:strange", "--rtrl-spec=mine:functions", "-k", "own"], 0, "1 passed"),
    ],
)
def test_the_plugin_errs_where_nothing_is_proved(
    folder: Path, pytester: pytest.Pytester, arguments: list[str], code: int, words: str
) -> None:
    done = inprocess(folder, pytester, *arguments)
    output = done.stdout.str() + done.stderr.str()
    assert done.ret == code, output
    assert words in output


def test_the_plugin_leaves_other_runs_alone(folder: Path) -> None:
    (folder / "test_other.py").write_text(
        "import sys\n\ndef test_other():\n    assert 'torch' not in sys.modules and 'rtrl' not in sys.modules\n"
    )
    done = pytest_run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
