"""``rtrl train``: any task, learner and cell; a run can be stopped and continued at any step."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rtrl.cli.training_session import Notes, printable, resumed, started
from rtrl.errors import ConfigError, RTRLError

# In a run that continues.
_CHANGEABLE = {"resume", "steps", "log", "tensorboard", "save_every", "evaluate", "cell"}


def train(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Argument(
            help="anbn, haystack, copy, adding, bytes, digits, tmaze; not with --resume.", show_default=False
        ),
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

    Ctrl-C, SIGTERM and SIGHUP save the run and print how to continue it; the curve is then the same as without the
    stop. A second one stops at once. Exit code 0: all steps were taken; 1: training diverged; 2: the command cannot be
    carried out, or a file cannot be written; 129, 130, 143: stopped by SIGHUP, Ctrl-C, SIGTERM.
    """
    from rtrl.training import run  # only this command needs PyTorch's optimizers and the tasks

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    try:
        if resume is not None:
            if fixed := sorted(given - _CHANGEABLE):
                names = ", ".join("TASK" if name == "task" else "--" + name.replace("_", "-") for name in fixed)
                raise ConfigError(f"a run continues with its own settings; leave out {names}")
            changes: dict[str, Any] = {"steps": steps, "save_every": save_every, "evaluate": evaluate}
            changes |= {"log": log, "tensorboard": tensorboard, "cell": cell}
            session = resumed(resume, {name: value for name, value in changes.items() if name in given})
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
            notes = Notes(steps, save_every, evaluate, str(log), None if tensorboard is None else str(tensorboard))
            session = started(settings, checkpoint, notes, overwrite)
        code = session.run()
    except RTRLError as error:
        raise typer.BadParameter(printable(str(error))) from error
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


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
