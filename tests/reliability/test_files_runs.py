"""Files of ``rtrl train``: none decides which code is run or which file is touched, and none is left half done."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from rtrl._utils import whole_files
from rtrl._utils.plain_content import read_content, write_content
from rtrl._utils.whole_files import LockedFile
from rtrl.cli.app import app
from rtrl.errors import ConfigError, FileError
from rtrl.training import Trainer, load_parameters, make_cell, run, save_parameters, trainer
from rtrl.training.logs import JsonLines

SMALL = ["anbn", "--cell", "gru", "-C", "hidden=2", "--batch-size", "1", "--log-every", "2", "--evaluate", "0"]
OWN = """
import rtrl, torch
with open("ran", "a") as file:
    file.write("once ")
def make(d_in, d_out, hidden=2):
    return rtrl.cells.from_torch(torch.nn.GRUCell(d_in, hidden), torch.nn.Linear(hidden, d_out))
def larger(d_in, d_out, hidden=2):
    return make(d_in, d_out, hidden + 1)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def train(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def said(result: Result) -> str:
    return " ".join(result.output.translate({ord(c): " " for c in "│╭╮╰╯─"}).split())


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run of four steps."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(*SMALL, "--steps", 4).exit_code == 0
    return {each.name: each.read_bytes() for each in folder.iterdir()}


@pytest.fixture
def path(folder: Path, _made: dict[str, bytes]) -> Path:
    """The checkpoint of a run of four steps."""
    for name, data in _made.items():
        Path(name).write_bytes(data)
    return Path("rtrl-anbn.pt")


def begun(steps: int, *more: Any) -> Path:
    assert train(*SMALL, "--steps", steps, *more).exit_code == 0
    return Path("rtrl-anbn.pt")


def refused(words: str, *arguments: Any) -> str:
    result = train(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert words in said(result), said(result)
    return said(result)


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint as somebody who can write digests, too, would."""
    changed = content(path)
    edit(changed)
    with path.open("wb") as file:
        write_content(changed, file)


def content(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        found: dict[str, Any] = read_content(file)
    return found


def log_of(path: str = "rtrl-anbn.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def steps_of(path: str = "rtrl-anbn.jsonl") -> list[int]:
    return [record["step"] for record in log_of(path)[1:]]


# ---------------------------------------------------------------------- code


def test_a_checkpoint_does_not_decide_which_code_is_run(folder: Path, path: Path) -> None:
    (folder / "stranger.py").write_text(OWN)
    edited(path, lambda content: content["settings"].update(cell="stranger:make"))
    message = refused("name it again, by --cell stranger:make", "--resume", path, "--steps", 8)
    assert "weights_only" not in message and not Path("ran").exists()
    edited(path, lambda content: content["settings"].update(cell="a b:c\033[31m"))
    assert "--cell package.module:name" in refused("not built in", "--resume", path, "--steps", 8)


def test_a_cell_of_ones_own_is_named_again_and_must_fit(folder: Path) -> None:
    (folder / "ownparts.py").write_text(OWN)
    own = ["--cell", "ownparts:make", "--checkpoint", "own.pt"]
    assert train(*SMALL, *own, "--steps", 6, "--checkpoint", "straight.pt").exit_code == 0
    assert train(*SMALL, *own, "--steps", 3).exit_code == 0
    resume = ["--resume", "own.pt", "--steps", 6]
    refused("by --cell ownparts:make", *resume)
    refused("must be equal", *resume, "--cell", "ownparts:larger")
    refused("leave out --clip", *resume, "--cell", "ownparts:make", "--clip", 1)
    assert train(*resume, "--cell", "ownparts:make").exit_code == 0
    assert steps_of("own.jsonl") == [2, 4, 6] == steps_of("straight.jsonl")
    refused("leave out --cell", "--resume", begun(3), "--steps", 9, "--cell", "ownparts:make")


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("taken",)


@pytest.mark.parametrize("as_torch_does", [True, False])
def test_a_hostile_pickle_runs_nothing_and_no_message_advises_to_load_it(as_torch_does: bool) -> None:
    with Path("evil.pt").open("wb") as file:
        if as_torch_does:
            torch.save({"format": 1, "settings": _Evil()}, file)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("rtrl._utils.plain_content.check_plain", lambda *_: None)
                write_content({"settings": _Evil()}, file)
    message = refused("damaged, or not a checkpoint", "--resume", "evil.pt")
    assert "weights_only" not in message and not Path("taken").exists()
    assert as_torch_does or "could run code" in message


# ---------------------------------------------------------------------- no other file


@pytest.mark.parametrize(
    "name", ["thesis.tex", "{folder}/../elsewhere/thesis.tex", "../elsewhere/thesis.tex", "link.tex"]
)
def test_a_file_that_is_not_this_runs_log_is_left_as_it_is(folder: Path, path: Path, name: str) -> None:
    name = name.format(folder=folder)
    (folder.parent / "elsewhere").mkdir()
    target = folder.parent / "elsewhere" / "thesis.tex"
    target.write_text('{"event": "start", "run": "another"}\nall of it\n')
    shutil.copy(target, "thesis.tex")
    Path("link.tex").symlink_to(target)
    edited(path, lambda content: content["notes"].update(log=name))
    refused("is not the log of this run", "--resume", path, "--steps", 8)
    for each in (target, Path("thesis.tex")):
        assert each.read_text() == '{"event": "start", "run": "another"}\nall of it\n'
    target.unlink()
    if name != "thesis.tex":  # nor is one made there
        refused("name it again, by --log", "--resume", path, "--steps", 8)
        assert not target.exists()


def test_the_log_is_looked_for_beside_the_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "here").mkdir()
    (folder / "there").mkdir()
    monkeypatch.chdir(folder / "here")
    begun(4)
    monkeypatch.chdir(folder / "there")
    begun(2)
    before = Path("rtrl-anbn.jsonl").read_bytes()
    assert train("--resume", "../here/rtrl-anbn.pt", "--steps", 6).exit_code == 0
    assert Path("rtrl-anbn.jsonl").read_bytes() == before
    assert steps_of("../here/rtrl-anbn.jsonl") == [2, 4, 6]
    Path("../here/rtrl-anbn.jsonl").unlink()
    result = train("--resume", "../here/rtrl-anbn.pt", "--steps", 8)
    assert result.exit_code == 0 and "lacks rows: its last one is of step 0, not 6" in said(result)
    assert steps_of("../here/rtrl-anbn.jsonl") == [8]


def test_a_tensorboard_folder_elsewhere_is_named_again(folder: Path, path: Path) -> None:
    edited(path, lambda content: content["notes"].update(tensorboard=str(folder.parent / "board")))
    refused("name it again, by --tensorboard", "--resume", path, "--steps", 8)
    assert not (folder.parent / "board").exists()


def test_what_a_file_says_does_not_act_on_the_terminal(path: Path) -> None:
    edited(path, lambda content: content["notes"].update(log="../\033]0;title\a"))
    assert "\033]" not in refused("name it again", "--resume", path, "--steps", 8)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("cell_options", "hidden", 10**9),
        ("cell_options", "layers", 10**9),
        ("task_options", "slack", 10**9),
        ("learner_options", "window", 10**9),
        ("learner_options", "block", float("inf")),
        ("cell_options", "hidden", [10**12]),
        ("batch_size", None, 10**9),
        ("batch_size", None, "1"),
        ("lr", None, None),
        ("learner", None, "rtrl"),
        ("device", None, "nowhere"),
        ("task_options", "path", "/dev/zero"),
    ],
)
def test_sizes_that_a_file_asks_for_are_refused_before_memory_is_taken(
    path: Path, part: str, name: str | None, value: Any
) -> None:
    if name == "path":
        edited(path, lambda content: content["settings"].update(task="bytes"))
    edited(path, lambda c: c["settings"].update({part: value} if name is None else {part: {name: value}}))
    refused("", "--resume", path, "--steps", 8)


def test_the_saved_state_stops_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "KEPT_ROWS", 5)
    settings = run.Settings("anbn", cell="gru", cell_options={"hidden": 2}, batch_size=1, log_every=1)
    straight, sizes = settings.build(), []
    for _ in range(4):
        for _ in range(16):
            straight.step()
        assert [row.step for row in straight.curve.rows] == [*range(straight.steps_taken - 4, straight.steps_taken + 1)]
        run.save(Path("run.pt"), settings, straight)
        sizes.append(Path("run.pt").stat().st_size)
        assert run.load(Path("run.pt"))[1].curve == straight.curve
    assert len(set(sizes[1:])) == 1


# ---------------------------------------------------------------------- one process, whole files


def test_two_processes_do_not_use_one_checkpoint(folder: Path, path: Path) -> None:
    Path("second.pt").symlink_to(path)
    with LockedFile(path):
        for other in (path, "second.pt"):
            refused("another process is using", "--resume", other, "--steps", 8)
        refused("another process is using", *SMALL, "--overwrite")
    assert train("--resume", path, "--steps", 8).exit_code == 0
    assert sorted(each.name for each in folder.iterdir()) == [
        "rtrl-anbn.jsonl", "rtrl-anbn.pt", "rtrl-anbn.pt.previous", "second.pt",
    ]  # fmt: skip


def test_a_lock_that_a_killed_process_left_locks_nothing(path: Path) -> None:
    Path(".rtrl-anbn.pt.lock").touch()
    for stale in (".rtrl-anbn.pt.4711", ".rtrl-anbn.pt.half", ".rtrl-anbn.pt.half.previous"):
        Path(stale).write_bytes(b"half")
    Path(".rtrl-anbn.pt.notes").write_bytes(b"of the user")
    assert train("--resume", path, "--steps", 8).exit_code == 0
    assert [each.name for each in Path().iterdir() if each.name.startswith(".")] == [".rtrl-anbn.pt.notes"]


def test_a_symbolic_link_is_followed_and_the_file_before_is_kept(folder: Path) -> None:
    (folder / "disk").mkdir()
    Path("link.pt").symlink_to("disk/real.pt")
    assert train(*SMALL, "--steps", 4, "--save-every", 3, "--checkpoint", "link.pt").exit_code == 0
    assert Path("link.pt").is_symlink() and run.load(Path("disk/real.pt"))[1].steps_taken == 4
    assert run.load(Path("disk/real.pt.previous"))[1].steps_taken == 3
    assert train("--resume", "link.pt", "--steps", 6).exit_code == 0 and steps_of("link.jsonl") == [2, 4, 6]
    data = bytearray(Path("link.pt").read_bytes())
    data[len(data) // 2] ^= 1
    Path("link.pt").write_bytes(data)
    message = refused("its digest is not that of its content", "--resume", "link.pt", "--steps", 8)
    assert "The save before it is whole" in message
    Path("link.pt").unlink()
    assert "The save before it is whole" not in refused("there is no file", "--resume", "link.pt", "--steps", 8)


def test_a_file_of_the_version_before_is_named(path: Path) -> None:
    edited(path, lambda content: content.update(format=99, written_by="rtrl 9"))
    refused("was saved by 'rtrl 9' in format 99", "--resume", path)
    torch.save({**content(path), "format": 1}, path)
    refused("was saved by rtrl 0.2.0 or before", "--resume", path)


# ---------------------------------------------------------------------- a disk that fails


def test_every_operation_on_a_file_may_fail(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever fails, there is an error that names the file, and whole files: the former ones or the new ones."""
    settings, made, notes = run.load(path)
    first = log_of()[0]
    kept = {each.name: each.read_bytes() for each in folder.iterdir()}
    calls, fails_at = 0, -1

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    def session() -> None:
        with LockedFile(path) as file:
            log = JsonLines(Path("rtrl-anbn.jsonl"), first, 2)
            try:
                log.write({"step": 4})
                log.flush()
                run.write(file, settings, made, {**notes, "steps": 99})
            finally:
                log.close()

    for name in ("open", "fsync", "close"):
        monkeypatch.setattr(whole_files.os, name, counted(getattr(os, name)))
    for name in ("replace", "open"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    outcomes = set()
    for number in range(1, 100):
        for each in folder.iterdir():
            each.unlink()
        for name, data in kept.items():
            (folder / name).write_bytes(data)
        calls, fails_at, failed = 0, number, ""
        try:
            session()
        except FileError as error:
            failed = str(error)
        reached, fails_at = calls, -1
        if reached < number:
            break
        assert not failed or ("rtrl-anbn" in failed and failed.endswith("No space left on device")), failed
        assert [each.name for each in folder.iterdir() if "half" in each.name] == [], number
        assert steps_of() in ([2, 4], [2])
        outcomes.add((bool(failed), content(path)["notes"]["steps"]))
    assert number > 18 and {(True, 4), (True, 99), (False, 99)} <= outcomes


def test_a_disk_that_is_full_ends_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused("rtrl-anbn.jsonl cannot be used as a log: No space left", "--resume", path, "--steps", 6)
        patch.setattr("rtrl.training.logs.replace_file", lambda *_: None)
        refused("the log rtrl-anbn.jsonl cannot be written: No space left", "--resume", path, "--steps", 6)
    assert train("--resume", path, "--steps", 6).exit_code == 0 and steps_of() == [2, 4, 6]


def test_a_folder_that_vanishes_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def vanish(self: Trainer) -> Any:
        if self.steps_taken == 4:
            shutil.rmtree(folder)
        return step(self)

    monkeypatch.setattr(Trainer, "step", vanish)
    result = train(*SMALL, "--steps", 8, "--save-every", 3)
    assert result.exit_code == 2 and "cannot be written: No such file or directory" in said(result)
    assert "The last checkpoint is of step 3" in said(result)
    folder.mkdir()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let every write beyond a size fail, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_files() -> None:
    path = begun(2)
    before = path.read_bytes()
    with largest_file(5000):
        refused("step 8: rtrl-anbn.pt cannot be written: File too large", "--resume", path, "--steps", 8)
    assert path.read_bytes() == before and steps_of() == [2, 4, 6, 8]
    with largest_file(900):
        refused("the log rtrl-anbn.jsonl cannot be written: File too large", "--resume", path, "--steps", 2000)
    *whole, cut_off = Path("rtrl-anbn.jsonl").read_text().splitlines()
    assert path.read_bytes() == before and len([json.loads(line) for line in whole]) > 2 and cut_off[-1] != "}"
    assert train("--resume", path, "--steps", 6).exit_code == 0 and steps_of() == [2, 4, 6]


# ---------------------------------------------------------------------- preemption


def test_a_resumed_run_keeps_its_settings() -> None:
    begun(3, "--save-every", 2, "--evaluate", 30)
    with pytest.MonkeyPatch.context() as patch:
        saves: list[int] = []
        write = run.write
        patch.setattr(run, "write", lambda *args: (saves.append(args[2].steps_taken), write(*args)))
        assert "held out" in said(train("--resume", "rtrl-anbn.pt", "--steps", 8))
        assert saves == [4, 6, 8, 8]
        saves.clear()
        assert "held out" not in said(train("--resume", "rtrl-anbn.pt", "--steps", 12, "--evaluate", 0))
        assert saves == [10, 12, 12]
    notes = run.load(Path("rtrl-anbn.pt"))[2]
    assert (notes["steps"], notes["save_every"], notes["evaluate"], notes["log"]) == (12, 2, 0, "rtrl-anbn.jsonl")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal here")
def test_a_terminal_that_hangs_up_saves_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def hang_up(self: Trainer) -> Any:
        if self.steps_taken == 3:
            signal.raise_signal(signal.SIGHUP)
        return step(self)

    monkeypatch.setattr(Trainer, "step", hang_up)
    ignored, before = signal.signal(signal.SIGHUP, signal.SIG_DFL), signal.SIG_DFL  # nohup ignores it
    result = train(*SMALL, "--steps", 8)
    assert result.exit_code == 129 and "Stopped after step 4, and saved." in said(result)
    assert run.load(Path("rtrl-anbn.pt"))[1].steps_taken == 4 and signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train("--resume", "rtrl-anbn.pt").exit_code == 0  # as under nohup
    finally:
        signal.signal(signal.SIGHUP, ignored)


def test_a_lock_needs_a_folder_that_can_be_written() -> None:
    with pytest.raises(FileError, match=r"no.where\.pt cannot be written"):
        LockedFile(Path("no/where.pt"))


def test_parameters_go_through_a_file_of_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    cells = [make_cell("gru", 3, 2, seed=seed, hidden=4) for seed in (0, 1)]
    save_parameters(cells[0], Path("cell.safetensors"))
    load_parameters(cells[1], Path("cell.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(*(cell.parameters() for cell in cells), strict=True))
    with pytest.raises(ConfigError, match="other parameters"):
        load_parameters(make_cell("lstm", 3, 2, hidden=4, layers=2), Path("cell.safetensors"))
    with pytest.raises(ConfigError, match=r"must be \(15, 3\)"):
        load_parameters(make_cell("gru", 3, 2, hidden=5), Path("cell.safetensors"))
    Path("cell.safetensors").write_bytes(Path("cell.safetensors").read_bytes()[:-1])
    with pytest.raises(FileError, match="damaged, or not a file of safetensors"):
        load_parameters(cells[1], Path("cell.safetensors"))
    with pytest.raises(FileError, match="cannot be read: No such file"):
        load_parameters(cells[1], Path("nothing"))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"pip install 'rtrl\[safetensors\]'"):
        save_parameters(cells[0], Path("cell.safetensors"))
