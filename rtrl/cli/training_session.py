"""One session of ``rtrl train``, from the start of a run or from a checkpoint on."""

import os
import secrets
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from rtrl._utils import validation
from rtrl._utils.formatting import show_bytes
from rtrl._utils.whole_files import LockedFile
from rtrl.cli.console import progress
from rtrl.errors import ConfigError, FileError, NonFiniteError, RTRLError

if TYPE_CHECKING:
    from rich.progress import Progress

    from rtrl.training import Row, Trainer
    from rtrl.training.logs import TensorBoard
    from rtrl.training.run import Settings

_REFRESH_S = 0.1  # between two updates of the progress bar
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True, slots=True)
class Notes:
    """What a run remembers beside its settings.

    Attributes:
        steps: how many there are in all.
        save_every: steps between two saves.
        evaluate: steps of the held-out stream at the end.
        log: the file of rows; in a checkpoint, seen from its folder.
        tensorboard: the folder of TensorBoard, as ``log``.
        name: the name of the run, which its log begins with.
    """

    steps: int
    save_every: int
    evaluate: int
    log: str
    tensorboard: str | None = None
    name: str = ""

    @classmethod
    def from_plain(cls, saved: Any) -> "Notes":
        """Return the notes of a checkpoint.

        Raises:
            FileError: they are damaged.
        """
        names = {each.name for each in fields(cls)}
        if not isinstance(saved, Mapping) or saved.keys() != names:
            raise FileError(
                "the checkpoint is damaged, or was not saved by rtrl train: its notes are not those of a run"
            )
        notes = cls(**saved)
        try:
            for name, least in (("steps", 1), ("save_every", 1), ("evaluate", 0)):
                validation.integer(name, getattr(notes, name), least, most=2**62)
        except ConfigError as error:
            raise FileError(f"the checkpoint is damaged: {error}") from error
        if not all(type(text) is str and "\0" not in text for text in (notes.log, notes.name, notes.tensorboard or "")):
            raise FileError("the checkpoint is damaged: a name in it is not a text")
        return notes

    def seen_from(self, folder: Path) -> "Notes":
        """Return the notes with paths as they are seen from a folder, those in it without its name."""

        def seen(path: str) -> str:
            whole = Path(os.path.abspath(path))
            return str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)

        return replace(
            self, log=seen(self.log), tensorboard=None if self.tensorboard is None else seen(self.tensorboard)
        )


def started(settings: "Settings", checkpoint: Path, notes: Notes, overwrite: bool) -> "Session":
    """Begin a run.

    Raises:
        RTRLError: it cannot be built, or a file is there already or cannot be written.
    """
    log = Path(notes.log)
    if log.resolve() == checkpoint.resolve():
        raise ConfigError(f"{log} cannot be both the checkpoint and the log")
    with _closed_on_error(LockedFile(checkpoint)) as file:
        if checkpoint.exists() and not overwrite:
            raise ConfigError(
                f"{checkpoint} exists already: continue it by --resume {shlex.quote(str(checkpoint))}, replace it "
                "by --overwrite, or choose another by --checkpoint"
            )
        if log.exists() and not overwrite:
            raise ConfigError(f"{log} exists already: replace it by --overwrite, or choose another by --log")
        if not os.access(log.parent, os.W_OK) or log.is_dir():
            raise FileError(f"the log {log} cannot be written")
        there = file.target.exists()
        try:
            return Session(file, settings, settings.build(), replace(notes, name=secrets.token_hex(16)), None)
        except BaseException:
            if not there:
                file.target.unlink(missing_ok=True)
            raise


def resumed(checkpoint: Path, changes: Mapping[str, Any]) -> "Session":
    """Continue a run.

    Args:
        checkpoint: of the run.
        changes: what the command line says in place of its notes, and the cell if it names one.

    Raises:
        RTRLError: the checkpoint cannot be used, the run has ended, or a file that it names is not to be touched.
    """
    from rtrl.training import run

    with _closed_on_error(LockedFile(checkpoint)) as file:
        settings, trainer, plain = run.load(checkpoint, changes.get("cell"))
        notes = Notes.from_plain(plain)
        own: dict[str, Any] = {name: value for name, value in changes.items() if name != "cell"}
        for option in ("log", "tensorboard"):
            if option in own:
                own[option] = str(own[option])
            elif (named := getattr(notes, option)) is not None:
                folder = (file.target if checkpoint.is_symlink() else checkpoint).parent
                own[option] = str(_noted(named, folder, option))
        notes = replace(notes, **own)
        if trainer.steps_taken >= notes.steps:
            raise ConfigError(f"{checkpoint} has taken {trainer.steps_taken} steps already; choose more by --steps")
        return Session(file, settings, trainer, notes, trainer.steps_taken)


@contextmanager
def _closed_on_error(file: LockedFile) -> Iterator[LockedFile]:
    try:
        yield file
    except BaseException:
        file.close()
        raise


def _noted(name: str, folder: Path, option: str) -> Path:
    """The path that a checkpoint in a folder names, if it may be written: inside the folder, or a log that is there.

    Whether such a log is that of the run is seen by its first line.

    Raises:
        FileError: it may not be written because a file says so.
    """
    path = folder / name
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    if inside or (option == "log" and path.is_file()):
        return path
    raise FileError(
        f"the checkpoint names {printable(name)} for --{option}, which is not in its folder. A file does not decide "
        f"what is written elsewhere: name it again, by --{option} {shlex.quote(printable(name))}, or choose another"
    )


class Session:
    """One session of a run.

    Args:
        file: the checkpoint, locked; it is closed when the session ends.
        settings: of the run.
        trainer: of the run.
        notes: of the run.
        after: the step from which the run continues; None begins it.

    Raises:
        RTRLError: a file cannot be written.
    """

    def __init__(
        self, file: LockedFile, settings: "Settings", trainer: "Trainer", notes: Notes, after: int | None
    ) -> None:
        from rtrl.training import logs

        self._file, self._settings, self._trainer, self._notes = file, settings, trainer, notes
        self._seen = notes.seen_from(file.target.parent)
        self._saved = 0 if after is None else after
        folder = None if notes.tensorboard is None else Path(notes.tensorboard)
        self._board: TensorBoard | None = None if folder is None else logs.TensorBoard(folder, after)
        if after is None:
            self._write()  # so that there always is a checkpoint, and a path that cannot be written is refused now
        levels = {name: getattr(trainer.task, name) for name in ("measure", "chance", "solved")}
        start = {"event": "start", "run": notes.name, **asdict(settings), **levels}
        self._log = logs.JsonLines(Path(notes.log), start, after)
        rows = trainer.curve.rows
        if after is not None and rows and self._log.last_step != rows[-1].step:
            _say(f"{notes.log} lacks rows: its last one is of step {self._log.last_step}, not {rows[-1].step}")

    def run(self) -> int:
        """Take the steps, and return the exit code."""
        trainer, task = self._trainer, self._trainer.task
        columns = ("{task.fields[loss]}", "{task.fields[score]}", "{task.fields[speed]}", "{task.fields[held]}")
        blank: dict[str, Any] = dict.fromkeys(("loss", "score", "speed", "held"), "")
        signals: list[int] = []
        try:
            with _stop_between_steps(signals), _unless_hung_up(signals), progress(*columns) as bar:
                name = bar.add_task(task.name, total=self._notes.steps, completed=trainer.steps_taken, **blank)
                self._take_steps(signals, bar, name)
                if signals:
                    self._save()
        except KeyboardInterrupt:  # within a step, so that the run in memory is not consistent
            _say(f"Stopped at once. The last checkpoint is of step {self._saved}.", self._how_to_continue())
            return 130
        except NonFiniteError as error:
            _say(f"{error}", f"The last checkpoint is of step {self._saved}: {self._file.path}")
            return 1
        except RTRLError as error:
            _say(f"step {trainer.steps_taken}: {error}", f"The last checkpoint is of step {self._saved}.")
            return 2
        finally:
            self._close()
        if signals and trainer.steps_taken < self._notes.steps:
            _say(f"Stopped after step {trainer.steps_taken}, and saved.", self._how_to_continue())
            return 128 + signals[0]
        self._finish()
        return 0

    def _take_steps(self, signals: list[int], bar: "Progress", name: Any) -> None:
        trainer, shown = self._trainer, 0.0
        for row, speed in trainer.run(self._notes.steps):
            if row is not None:
                self._log.write({**asdict(row), "steps_per_s": round(speed, 3)})
                if self._board is not None:
                    self._board.write(row, speed)
            if signals:
                break
            if row is not None or time.perf_counter() - shown > _REFRESH_S:
                bar.update(name, completed=trainer.steps_taken, **self._fields(row, speed))
                shown = time.perf_counter()
            if trainer.steps_taken % self._notes.save_every == 0:
                self._save()
        if trainer.steps_taken == self._notes.steps:
            self._save()

    def _fields(self, row: "Row | None", speed: float) -> dict[str, Any]:
        rows = self._trainer.curve.rows
        shown = row or (rows[-1] if rows else self._trainer.unfinished())
        fields = {"speed": f"{speed:.0f}/s", "held": show_bytes(shown.bytes_held)}
        fields["loss"] = "" if shown.loss is None else f"loss {shown.loss:.4g}"
        fields["score"] = "" if shown.score is None else f"{self._trainer.task.measure} {shown.score:.4g}"
        return fields

    def _save(self) -> None:
        self._log.flush()  # the checkpoint counts on the rows before it
        self._write()

    def _write(self) -> None:
        from rtrl.training import run

        run.write(self._file, self._settings, self._trainer, asdict(self._seen))
        self._saved = self._trainer.steps_taken

    def _close(self) -> None:
        self._log.close()
        if self._board is not None:
            self._board.close()
        self._file.close()

    def _finish(self) -> None:
        from rtrl.training import evaluate

        trainer, task = self._trainer, self._trainer.task
        rows = [row for row in [*trainer.curve.rows[-1:], trainer.unfinished()] if row.score is not None]
        levels = f"chance {task.chance:.4g}, solved from {task.solved:.4g}"
        if rows:
            typer.echo(f"{task.name}: {task.measure} {rows[0].score:.4g} in the newest row ({levels})")
        if self._notes.evaluate:
            try:
                with progress() as bar:
                    bar.add_task("held out", total=None)
                    score = evaluate(
                        trainer.cell,
                        task,
                        batch_size=trainer.batch_size,
                        steps=self._notes.evaluate,
                        seed=self._settings.seed,
                        held_out=True,
                    )
                typer.echo(f"held out: {task.measure} {score:.4g}")
            except RTRLError as error:
                typer.echo(f"held out: not measured, {error}", err=True)
        audits = getattr(trainer.learner, "audits", None)
        if audits is not None:
            typer.echo(f"audits: {audits}")
        typer.echo(f"saved: {self._file.path}; rows: {printable(self._notes.log)}")

    def _how_to_continue(self) -> str:
        command = ["rtrl", "train", "--resume", str(self._file.path)]
        if ":" in self._settings.cell:
            command += ["--cell", self._settings.cell]
        for option, path in (("--log", self._seen.log), ("--tensorboard", self._seen.tensorboard)):
            if path is not None and Path(path).is_absolute():
                command += [option, path]
        return "Continue with: " + printable(shlex.join(command))


def printable(text: str) -> str:
    """A text without the characters that a terminal acts on: what files say is shown, not carried out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _say(*lines: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        for line in lines:
            typer.echo(printable(line), err=True)


@contextmanager
def _unless_hung_up(signals: list[int]) -> Iterator[None]:
    """Pass over that a terminal which hung up takes no more output; the run has been saved by then."""
    try:
        yield
    except OSError:
        if not signals:
            raise


@contextmanager
def _stop_between_steps(signals: list[int]) -> Iterator[None]:
    """Add the numbers of signals that ask for an end to a list; a second one ends the process at once."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        restore()

    numbers = [getattr(signal, name) for name in _STOPPING if hasattr(signal, name)]
    try:
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
                before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, which handles signals
        before.clear()
    try:
        yield
    finally:
        restore()
