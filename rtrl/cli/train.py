"""``rtrl train``: any task, learner and cell; a run can be stopped and continued at any step."""

import json
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtrl._utils.formatting import show_bytes
from rtrl.cli.console import progress, writable
from rtrl.errors import ConfigError, NonFiniteError, RTRLError

if TYPE_CHECKING:
    from rich.progress import Progress

    from rtrl.training import Row, Trainer
    from rtrl.training.logs import JsonLines, TensorBoard
    from rtrl.training.run import Settings

_CHANGEABLE = {
    "resume",
    "steps",
    "log",
    "tensorboard",
    "save_every",
    "evaluate",
}  # in a run that continues
_REFRESH_S = 0.1  # between two updates of the progress bar


def train(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Argument(help="anbn, haystack, copy, adding, bytes or digits; not with --resume.", show_default=False),
    ] = None,
    learner: Annotated[
        str, typer.Option(help="block (BlockRTRL), bptt, tbptt, rtrl, snap, uoro, rflo, diagonal or layer-local.")
    ] = "block",
    cell: Annotated[
        str,
        typer.Option(
            help="moe (RecurrentMoE), rnn, gru, lstm, mingru, elstm, lru, rtu, or package.module:name of your own."
        ),
    ] = "moe",
    task_option: Annotated[
        list[str] | None,
        typer.Option("-T", "--task-option", metavar="NAME=VALUE", help="delay=10, say; may be repeated."),
    ] = None,
    learner_option: Annotated[
        list[str] | None,
        typer.Option("-L", "--learner-option", metavar="NAME=VALUE", help="block=32, or k=20; may be repeated."),
    ] = None,
    cell_option: Annotated[
        list[str] | None,
        typer.Option("-C", "--cell-option", metavar="NAME=VALUE", help="hidden=64, say; may be repeated."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adam, adamw, rmsprop or sgd.")] = "adam",
    lr: Annotated[float, typer.Option(help="The learning rate.")] = 2e-3,
    clip: Annotated[
        float | None, typer.Option(help="Scale gradients down to at most this norm.", show_default=False)
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Steps between two updates.  [default: a block; a step, without blocks]", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps in all, those before a --resume included.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Of weights, stream and draws; it determines the curve.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="The torch device.")] = "cpu",
    log_every: Annotated[int, typer.Option(help="Steps per row of the log.", min=1)] = 100,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Where the run is saved.  [default: rtrl-TASK.pt]", show_default=False, dir_okay=False),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between two saves.", min=1)] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint and log.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Continue from this checkpoint, with its settings.", show_default=False)
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, one per row.  [default: as the checkpoint, .jsonl]",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="A folder for TensorBoard (extra 'tensorboard').", show_default=False)
    ] = None,
    evaluate: Annotated[int, typer.Option(help="Steps of the held-out stream at the end; 0 for none.", min=0)] = 500,
) -> None:
    """Train a cell on a task with a learner, online.

    Ctrl-C saves the run and prints how to continue it; the curve is then the same as without the stop. Exit code 0: all
    steps were taken; 1: training diverged; 2: the command cannot be carried out; 130: stopped.
    """
    from rtrl.training import run  # only this command needs PyTorch's optimizers and the tasks

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    try:
        if resume is not None:
            if fixed := sorted(given - _CHANGEABLE):
                names = ", ".join("TASK" if name == "task" else "--" + name.replace("_", "-") for name in fixed)
                raise ConfigError(f"a run continues with its own settings; leave out {names}")
            settings, trainer, notes = run.load(resume)
            checkpoint = resume
            steps = steps if "steps" in given else notes["steps"]
            log = log or Path(notes["log"])
            tensorboard = tensorboard or (None if notes["tensorboard"] is None else Path(notes["tensorboard"]))
            if trainer.steps_taken >= steps:
                raise ConfigError(f"{resume} has taken {trainer.steps_taken} steps already; choose more by --steps")
        else:
            if task is None:
                raise ConfigError("name a task, or a checkpoint by --resume; rtrl train --help lists the tasks")
            settings = run.Settings(
                task,
                _options("-T", task_option),
                learner,
                _options("-L", learner_option),
                cell,
                _options("-C", cell_option),
                optimizer,
                lr,
                batch_size,
                every,
                clip,
                seed,
                log_every,
                dtype,
                device,
            )
            checkpoint = checkpoint or Path(f"rtrl-{task}.pt")
            log = log or checkpoint.with_suffix(".jsonl")
            if checkpoint.exists() and not overwrite:
                raise ConfigError(
                    f"{checkpoint} exists already: continue it by --resume {shlex.quote(str(checkpoint))}, replace it "
                    "by --overwrite, or choose another by --checkpoint"
                )
            if log.exists() and not overwrite:
                raise ConfigError(f"{log} exists already: replace it by --overwrite, or choose another by --log")
            trainer = settings.build()
        session = _Session(settings, trainer, steps, checkpoint, save_every, log, tensorboard, resume is not None)
    except RTRLError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(session.run(evaluate))


class _Session:
    """One session of a run, from its start or from a checkpoint on."""

    def __init__(
        self,
        settings: "Settings",
        trainer: "Trainer",
        steps: int,
        checkpoint: Path,
        save_every: int,
        log: Path,
        tensorboard: Path | None,
        resumed: bool,
    ) -> None:
        from rtrl.training import logs

        self._settings, self._trainer, self._steps = settings, trainer, steps
        self._checkpoint, self._save_every = checkpoint, save_every
        self._notes = {
            "steps": steps,
            "log": str(log),
            "tensorboard": None if tensorboard is None else str(tensorboard),
        }
        after = trainer.steps_taken if resumed else None
        if log.resolve() == checkpoint.resolve():
            raise ConfigError(f"{log} cannot be both the checkpoint and the log")
        self._board: TensorBoard | None = None if tensorboard is None else logs.TensorBoard(tensorboard, after)
        writable(log)
        if not resumed:
            self._save()  # so that there always is a checkpoint, and a path that cannot be written is refused now
        self._saved = trainer.steps_taken
        self._log: JsonLines = logs.JsonLines(log, after)
        if self._log.empty:
            levels = {name: getattr(trainer.task, name) for name in ("measure", "chance", "solved")}
            self._log.write({"event": "start", **asdict(settings), **levels})

    def run(self, evaluation: int) -> int:
        """Take the steps, and return the exit code."""
        trainer, task = self._trainer, self._trainer.task
        columns = ("{task.fields[loss]}", "{task.fields[score]}", "{task.fields[speed]}", "{task.fields[held]}")
        blank: dict[str, Any] = dict.fromkeys(("loss", "score", "speed", "held"), "")
        try:
            with _stop_between_steps() as signals, progress(*columns) as bar:
                name = bar.add_task(task.name, total=self._steps, completed=trainer.steps_taken, **blank)
                self._take_steps(signals, bar, name)
                if signals:
                    self._save()
        except KeyboardInterrupt:  # within a step, so that the run in memory is not consistent
            _say(f"Stopped within a step. The last checkpoint is of step {self._saved}.", self._how_to_continue())
            return 130
        except NonFiniteError as error:
            _say(f"{error}", f"The last checkpoint is of step {self._saved}: {self._checkpoint}")
            return 1
        except RTRLError as error:
            _say(f"step {trainer.steps_taken}: {error}")
            return 2
        finally:
            self._log.close()
            if self._board is not None:
                self._board.close()
        if signals and trainer.steps_taken < self._steps:
            _say(f"Stopped after step {trainer.steps_taken}, and saved.", self._how_to_continue())
            return 128 + signals[0]
        self._finish(evaluation)
        return 0

    def _take_steps(self, signals: list[int], bar: "Progress", name: Any) -> None:
        trainer, shown = self._trainer, 0.0
        for row, speed in trainer.run(self._steps):
            if row is not None:
                self._log.write({**asdict(row), "steps_per_s": round(speed, 3)})
                if self._board is not None:
                    self._board.write(row, speed)
            if not bar.disable and (row is not None or time.perf_counter() - shown > _REFRESH_S):
                bar.update(name, completed=trainer.steps_taken, **self._fields(row, speed))
                shown = time.perf_counter()
            if signals:
                break
            if trainer.steps_taken % self._save_every == 0:
                self._save()
        if trainer.steps_taken == self._steps:
            self._save()

    def _fields(self, row: "Row | None", speed: float) -> dict[str, Any]:
        rows = self._trainer.curve.rows
        shown = row or (rows[-1] if rows else self._trainer.unfinished())
        fields = {"speed": f"{speed:.0f}/s", "held": show_bytes(shown.bytes_held)}
        fields["loss"] = "" if shown.loss is None else f"loss {shown.loss:.4g}"
        fields["score"] = "" if shown.score is None else f"{self._trainer.task.measure} {shown.score:.4g}"
        return fields

    def _save(self) -> None:
        from rtrl.training import run

        run.save(self._checkpoint, self._settings, self._trainer, self._notes)
        self._saved = self._trainer.steps_taken

    def _finish(self, evaluation: int) -> None:
        from rtrl.training import evaluate

        trainer, task = self._trainer, self._trainer.task
        rows = [row for row in [*trainer.curve.rows[-1:], trainer.unfinished()] if row.score is not None]
        levels = f"chance {task.chance:.4g}, solved from {task.solved:.4g}"
        if rows:
            typer.echo(f"{task.name}: {task.measure} {rows[0].score:.4g} in the newest row ({levels})")
        if evaluation:
            try:
                score = evaluate(
                    trainer.cell,
                    task,
                    batch_size=trainer.batch_size,
                    steps=evaluation,
                    seed=self._settings.seed,
                    held_out=True,
                )
                typer.echo(f"held out: {task.measure} {score:.4g}")
            except RTRLError as error:
                typer.echo(f"held out: not measured, {error}", err=True)
        audits = getattr(trainer.learner, "audits", None)
        if audits is not None:
            typer.echo(f"audits: {audits}")
        typer.echo(f"saved: {self._checkpoint}; rows: {self._notes['log']}")

    def _how_to_continue(self) -> str:
        return f"Continue with: rtrl train --resume {shlex.quote(str(self._checkpoint))}"


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo(line, err=True)


@contextmanager
def _stop_between_steps() -> Iterator[list[int]]:
    """A list that receives the number of an interrupt or termination signal; a second signal stops at once."""
    signals: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        restore()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, which handles signals
        before.clear()
    try:
        yield signals
    finally:
        restore()


def _options(flag: str, given: list[str] | None) -> dict[str, Any]:
    """Parse ``name=value`` pairs; a value is JSON if possible, else a word.

    Raises:
        ConfigError: a pair has no "=", or a name is given twice.
    """
    options: dict[str, Any] = {}
    for pair in given or []:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{flag} {pair!r} must have the form name=value")
        if name in options:
            raise ConfigError(f"{flag} {name} is given twice")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
