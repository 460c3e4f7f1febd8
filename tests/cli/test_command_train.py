"""``rtrl train``: what it writes, how it stops, and how it goes on."""

import json
import re
import shlex
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rtrl.cli.app import app
from rtrl.tasks import TASKS
from rtrl.training import LEARNERS, Trainer

SMALL = ["anbn", "--cell", "gru", "-C", "hidden=3", "--batch-size", "2", "--log-every", "5", "--evaluate", "0"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def said(result: Result) -> str:
    """All that was written, without the frame that Typer draws around it."""
    return " ".join(result.output.translate({ord(c): " " for c in "│╭╮╰╯─"}).split())


def rows(path: str) -> list[dict[str, Any]]:
    """The rows of a log without the speeds, which no seed decides."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "steps_per_s"} for record in records[1:]]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Do something within the step after n steps."""
    step = Trainer.step

    def acting(self: Trainer) -> Any:
        row = step(self)
        if self.steps_taken == number:
            monkeypatch.setattr(Trainer, "step", step)
            act()
        return row

    monkeypatch.setattr(Trainer, "step", acting)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_leaves_a_log_and_a_checkpoint() -> None:
    result = train(*SMALL[:-1], 40, "--steps", 12)
    assert result.exit_code == 0, result.output
    start, *records = [json.loads(line) for line in Path("rtrl-anbn.jsonl").read_text().splitlines()]
    assert (start["event"], start["task"], start["cell_options"], start["solved"]) == (
        "start",
        "anbn",
        {"hidden": 3},
        0.99,
    )
    assert [record["step"] for record in records] == [5, 10]
    assert set(records[0]) == {"step", "loss", "score", "bytes_held", "steps_per_s"}
    assert "chance 0.5714, solved from 0.99" in said(result) and "held out: accuracy" in said(result)
    assert Path("rtrl-anbn.pt").exists()


def test_the_same_seed_gives_the_same_rows() -> None:
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        assert train(*SMALL, "--steps", 20, "--seed", seed, "--checkpoint", f"{name}.pt").exit_code == 0
    assert rows("a.jsonl") == rows("b.jsonl") != rows("c.jsonl")


@pytest.mark.parametrize(
    ("learner", "number", "code"),
    [("block", signal.SIGINT, 130), ("uoro", signal.SIGINT, 130), ("bptt", signal.SIGTERM, 143)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch, learner: str, number: signal.Signals, code: int
) -> None:
    rest = ("--learner", learner, "--steps", 20)
    assert train(*SMALL, *rest, "--checkpoint", "straight.pt").exit_code == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell runs this in the background
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    at_step(monkeypatch, 7, lambda: signal.raise_signal(number))
    stopped = train(*SMALL, *rest, "--checkpoint", "stopped.pt")
    assert stopped.exit_code == code and "Stopped after step 7, and saved." in said(stopped)
    assert "rtrl train --resume stopped.pt" in said(stopped)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert len(rows("stopped.jsonl")) == 1
    on = train("--resume", "stopped.pt", "--evaluate", 0)
    assert on.exit_code == 0, on.output
    assert rows("stopped.jsonl") == rows("straight.jsonl")
    more = train("--resume", "stopped.pt", "--evaluate", 0)
    assert more.exit_code == 2 and "has taken 20 steps already" in said(more)


def test_a_run_stopped_within_a_step_goes_on_from_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(*SMALL, "--steps", 20, "--checkpoint", "straight.pt").exit_code == 0
    at_step(monkeypatch, 17, interrupt)
    stopped = train(*SMALL, "--steps", 20, "--save-every", 6)
    assert stopped.exit_code == 130 and "Stopped at once. The last checkpoint is of step 12." in said(stopped)
    with Path("rtrl-anbn.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # a line that was cut off
    assert [row["step"] for row in rows_so_far("rtrl-anbn.jsonl")] == [5, 10, 15]
    assert train("--resume", "rtrl-anbn.pt", "--evaluate", 0).exit_code == 0
    assert rows("rtrl-anbn.jsonl") == rows("straight.jsonl")


def rows_so_far(path: str) -> list[dict[str, Any]]:
    lines = Path(path).read_text().splitlines()
    return [json.loads(line) for line in lines[1:] if line.endswith("}")]


def test_a_run_can_be_made_longer() -> None:
    assert train(*SMALL, "--steps", 20, "--checkpoint", "straight.pt").exit_code == 0
    assert train(*SMALL, "--steps", 8).exit_code == 0
    assert train("--resume", "rtrl-anbn.pt", "--steps", 20, "--evaluate", 0).exit_code == 0
    assert rows("rtrl-anbn.jsonl") == rows("straight.jsonl")


def test_numbers_that_diverge_end_the_run_with_the_step() -> None:
    result = train("adding", "--cell", "rnn", "--optimizer", "sgd", "--lr", 1e30, "--steps", 100, "--evaluate", 0)
    assert result.exit_code == 1
    assert "NaN or infinity" in said(result) or "the loss of step" in said(result)
    assert "The last checkpoint is of step 0: rtrl-adding.pt" in said(result)


def test_a_cell_of_ones_own() -> None:
    Path("ownrecurrent.py").write_text(
        "import rtrl, torch\n"
        "def make(d_in, d_out, hidden=4):\n"
        "    return rtrl.cells.from_torch(torch.nn.RNNCell(d_in, hidden), torch.nn.Linear(hidden, d_out))\n"
    )
    result = train(
        "copy", "--cell", "ownrecurrent:make", "-C", "hidden=5", "-T", "delay=1", "--steps", 3, "--evaluate", 0
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a task"),
        (["nothing"], "no task 'nothing'"),
        (["anbn", "--learner", "nothing"], "no learner 'nothing'"),
        (["anbn", "--cell", "nothing"], "no cell 'nothing'"),
        (["anbn", "--cell", "nowhere:nothing"], "nowhere cannot be imported"),
        (["anbn", "--optimizer", "nothing"], "no optimizer"),
        (["anbn", "--lr", "0"], "lr must be"),
        (["anbn", "--clip", "-1"], "clip must be"),
        (["anbn", "--dtype", "int8"], "dtype must be"),
        (["anbn", "--device", "nowhere"], "device 'nowhere'"),
        (["anbn", "-T", "slack"], "must have the form name=value"),
        (["anbn", "-T", "slack=1", "-T", "slack=2"], "slack is given twice"),
        (["anbn", "-T", "slackness=1"], "no option 'slackness'"),
        (["anbn", "-L", "block=0"], "block must be"),
        (["anbn", "--checkpoint", "no/where.pt"], "cannot be written"),
        (["anbn", "--log", "no/where.jsonl"], "cannot be written"),
        (["anbn", "--checkpoint", "one", "--log", "one"], "both the checkpoint and the log"),
        (["--resume", "nothing.pt"], "there is no file"),
    ],
)
def test_commands_that_cannot_be_carried_out(arguments: list[str], words: str) -> None:
    result = train(*arguments)
    assert result.exit_code == 2 and words in said(result), result.output
    assert not list(Path().glob("*.pt"))


def test_a_checkpoint_is_neither_overwritten_nor_changed_by_accident() -> None:
    assert train(*SMALL, "--steps", 3).exit_code == 0
    before = Path("rtrl-anbn.pt").read_bytes()
    again = train(*SMALL, "--steps", 3)
    assert again.exit_code == 2 and "exists already" in said(again) and "--overwrite" in said(again)
    Path("rtrl-anbn.pt").rename("moved.pt")
    again = train(*SMALL, "--steps", 3)
    assert again.exit_code == 2 and "rtrl-anbn.jsonl exists already" in said(again)
    Path("moved.pt").rename("rtrl-anbn.pt")
    other = train("--resume", "rtrl-anbn.pt", "--lr", 0.1, "--steps", 9)
    assert other.exit_code == 2 and "leave out --lr" in said(other)
    assert Path("rtrl-anbn.pt").read_bytes() == before
    assert train(*SMALL, "--steps", 3, "--overwrite").exit_code == 0


def test_rows_go_to_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append(("made", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, step))

        def close(self) -> None:
            calls.append(("closed",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert train(*SMALL, "--log-every", 20, "--steps", 20, "--tensorboard", "board").exit_code == 0
    names = ("loss", "score", "bytes_held", "steps_per_s")
    assert calls == [("made", "board", None), *((name, 20) for name in names), ("closed",)]
    assert train("--resume", "rtrl-anbn.pt", "--steps", 21, "--evaluate", 0).exit_code == 0
    assert calls[6] == ("made", "board", 21)


def test_without_tensorboard_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = train(*SMALL, "--steps", 5, "--tensorboard", "board")
    assert result.exit_code == 2 and "pip install 'rtrl[tensorboard]'" in said(result)
    assert not Path("rtrl-anbn.pt").exists()


def test_the_commands_of_the_guide_work() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide" / "training.md"
    commands = re.findall(r"^```sh\nrtrl train (.*)\n```", guide.read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        result = train(*shlex.split(command), "--steps", 2, "--evaluate", 0)
        assert result.exit_code == 0, result.output


def test_the_guide_lists_every_task_and_learner() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "training.md").read_text()
    for head, names in (("task", TASKS), ("learner", LEARNERS)):
        (table,) = re.findall(rf"^\| {head} \|.*?(?=\n\n)", guide, re.MULTILINE | re.DOTALL)
        first = [row.split("|")[1] for row in table.splitlines()[2:]]
        assert sorted(re.findall(r"`([\w-]+)`", " ".join(first))) == sorted(names)
