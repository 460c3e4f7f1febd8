"""A training run as plain values, which is saved to a file and continued in another process."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import rtrl
from rtrl import tasks
from rtrl._utils import pytrees, validation
from rtrl._utils.formatting import first_line
from rtrl._utils.plain_content import digest, read_content, write_content
from rtrl._utils.whole_files import LockedFile, reason
from rtrl.errors import ConfigError, FileError, RTRLError
from rtrl.training.cell_factory import make_cell
from rtrl.training.learner_factory import make_learner
from rtrl.training.saved_sizes import LARGEST_OPTION, check_built, check_options, check_state
from rtrl.training.trainer import Trainer

FORMAT = 2
_KINDS: Mapping[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    float: (int, float),
    int | None: (int, type(None)),
    float | None: (int, float, type(None)),
}
OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW, "rmsprop": RMSprop, "sgd": SGD}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run, as plain values; the same settings give the same curve.

    The task, the learner and the cell are given by name and options, as for ``rtrl.tasks.make``, ``make_learner`` and
    ``make_cell``. The seed is that of the weights, of the stream, and of the draws of a learner without a seed among
    its options. The other values are those of ``Trainer``.
    """

    task: str
    task_options: dict[str, Any] = field(default_factory=dict)
    learner: str = "block"
    learner_options: dict[str, Any] = field(default_factory=dict)
    cell: str = "moe"
    cell_options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    lr: float = 2e-3
    batch_size: int = 8
    every: int | None = None
    clip: float | None = None
    seed: int = 0
    log_every: int = 100
    dtype: str = "float32"
    device: str = "cpu"

    def build(self, saved: Mapping[str, Any] | None = None) -> Trainer:
        """Make the trainer of these settings.

        Args:
            saved: a saved trainer, whose sizes must be those of a built-in cell before memory is taken for it.

        Raises:
            RTRLError: a name, an option or a size is wrong, or the parts do not fit together.
        """
        validation.known("optimizer", self.optimizer, OPTIMIZERS)
        validation.choice("dtype", self.dtype, DTYPES)
        lr, dtype, device = validation.positive("lr", self.lr), DTYPES[self.dtype], _device(self.device)
        validation.integer("seed", self.seed, least=0)
        learner_options = dict(self.learner_options)
        if self.learner == "uoro":
            learner_options.setdefault("seed", self.seed)
        learner = make_learner(self.learner, **learner_options)
        task = tasks.make(self.task, **self.task_options)
        if saved is not None and ":" not in self.cell:
            shapes = make_cell(self.cell, task.d_in, task.d_out, device="meta", **self.cell_options)
            check_built(shapes, saved, self.learner)
        cell = make_cell(
            self.cell, task.d_in, task.d_out, seed=self.seed, dtype=dtype, device=device, **self.cell_options
        )

        def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
            return OPTIMIZERS[self.optimizer](parameters, lr=lr)

        return Trainer(
            cell,
            task,
            learner=learner,
            optimizer=optimizer,
            batch_size=self.batch_size,
            every=self.every,
            clip=self.clip,
            seed=self.seed,
            log_every=self.log_every,
        )


def save(path: Path, settings: Settings, trainer: Trainer, notes: Mapping[str, Any] | None = None) -> None:
    """Save a run to a file, which is replaced atomically: after a crash it is the old file or the new one.

    The old one is kept as ``NAME.previous``.

    Args:
        path: the file; a symbolic link is followed.
        settings: of the run.
        trainer: of the run.
        notes: more plain values, which ``load`` returns.

    Raises:
        FileError: the file cannot be written, or another process uses it. It is as it was.
        ConfigError: the learner cannot be saved.
    """
    with LockedFile(path) as file:
        write(file, settings, trainer, notes)


def write(file: LockedFile, settings: Settings, trainer: Trainer, notes: Mapping[str, Any] | None = None) -> None:
    """Save a run to a file that is locked already, as ``save`` does."""
    content = {
        "format": FORMAT,
        "written_by": f"rtrl {rtrl.__version__}",
        "settings": asdict(settings),
        "parameters": parameters_digest(trainer.cell),
        "trainer": trainer.state_dict(),
        "random": _random_state(),
        "notes": dict(notes or {}),
    }
    file.write(lambda opened: write_content(content, opened))


def load(path: Path, cell: str | None = None) -> tuple[Settings, Trainer, dict[str, Any]]:
    """Load a saved run, and return its settings, its trainer and its notes.

    Nothing is imported because the file says so: a cell that is not built in must be named by the caller. PyTorch's
    global random states are restored, for learners that draw from them.

    Args:
        path: the file.
        cell: ``package.module:name`` of the cell, if it is not built in. Its parameters must have the names, shapes and
            dtypes of the saved ones.

    Raises:
        FileError: the file is missing or damaged, or was not written by ``save``.
        ConfigError: the run cannot be built here, or needs a cell that was not named.
    """
    content = _content(path)
    try:
        settings = _settings(content, path, cell)
        trainer = settings.build(content["trainer"])
        if parameters_digest(trainer.cell) != content["parameters"]:
            raise ConfigError(
                f"{settings.cell} gives a cell with other parameters than the one that was saved in {path}; their "
                "names, shapes and dtypes must be equal"
            )
        groups = trainer.state_dict()["optimizer"]["param_groups"]
        if digest(groups) != digest(content["trainer"]["optimizer"]["param_groups"]):
            raise ConfigError(f"the optimizer saved in {path} has other settings than the run")
        trainer.load_state_dict(content["trainer"])
        if digest(trainer.state_dict()) != digest(content["trainer"]):
            raise ConfigError(f"{path} is damaged: it holds something that is not part of such a run")
        _set_random_state(content["random"])
        return settings, trainer, dict(content["notes"])
    except (TypeError, KeyError, RuntimeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, RTRLError):
            raise
        raise FileError(f"{path} is damaged: {first_line(error)}") from error


def parameters_digest(cell: nn.Module) -> str:
    """Return a digest of the names, shapes and dtypes of a cell's parameters and buffers."""
    return digest([[name, list(value.shape), str(value.dtype)] for name, value in cell.state_dict().items()])


def _content(path: Path) -> dict[str, Any]:
    """Read a file, and check that it is a run of this format."""
    try:
        with path.open("rb") as file:
            content = read_content(file)
    except FileNotFoundError:
        raise FileError(f"there is no file {path}{_instead_of(path)}") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {reason(error)}") from error
    except FileError as error:
        older = _written_by_an_older_version(path)
        if older:
            raise FileError(
                f"{path} was saved by {older}, whose files have no digest; this version does not read them. Finish the "
                "run with that version"
            ) from None
        raise FileError(
            f"{path} is damaged, or not a checkpoint of a training run: {error}{_instead_of(path)}"
        ) from None
    if not isinstance(content, dict) or "settings" not in content or type(content.get("format")) is not int:
        raise FileError(f"{path} is not a checkpoint of a training run")
    if content["format"] != FORMAT:
        raise FileError(
            f"{path} was saved by {content.get('written_by')!r} in format {content['format']}; this version reads "
            f"format {FORMAT}. Load it with the version that saved it"
        )
    return content


def _instead_of(path: Path) -> str:
    """What to do without a file: take the one before it, if that is whole."""
    previous = Path(os.path.realpath(path))
    previous = previous.with_name(previous.name + ".previous")
    try:
        with previous.open("rb") as file:
            read_content(file)
    except (OSError, FileError):
        return ""
    return f". The save before it is whole: copy {previous} to {path}, and go on from there"


def _written_by_an_older_version(path: Path) -> str | None:
    """The version that wrote a file without a digest; None if it is not a run of such a version."""
    try:
        with path.open("rb") as file:
            content = read_content(file, with_digest=False)
    except (OSError, FileError):
        return None
    known = isinstance(content, dict) and content.get("format") == 1 and "settings" in content
    return "rtrl 0.2.0 or before" if known else None


def _settings(content: Mapping[str, Any], path: Path, cell: str | None) -> Settings:
    """The settings of a saved run, checked against the numbers that the file has; with the cell that was named."""
    saved, trainer = content["settings"], content["trainer"]
    settings = Settings(**saved)
    for each in fields(Settings):
        value, kinds = saved.get(each.name), _KINDS.get(each.type, (dict,))
        if type(value) not in kinds:
            raise ConfigError(f"{each.name}={value!r} of the run saved in {path} has the wrong type")
    numbers = pytrees.n_bytes(content)
    check_options("task", settings.task_options, LARGEST_OPTION)
    check_options("learner", settings.learner_options, LARGEST_OPTION)
    check_options("cell", settings.cell_options, numbers)
    check_state(trainer, settings.batch_size)
    built_in = ":" not in settings.cell
    if built_in and cell not in (None, settings.cell):
        raise ConfigError(f"{path} is a run of the cell {settings.cell!r}; leave out --cell {cell}")
    if not built_in and (cell is None or ":" not in cell):
        name = settings.cell if _is_target(settings.cell) else "package.module:name"
        raise ConfigError(
            f"{path} is a run of the cell {settings.cell!r}, which is not built in. A file does not decide which code "
            f"is run: if you trust it, name it again, by --cell {name}"
        )
    if built_in:
        return settings
    return replace(settings, cell=str(cell))


def _is_target(name: str) -> bool:
    """Whether a name may be printed as a word of a command."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name, re.ASCII) is not None


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
    cuda = state["cuda"]
    if state.keys() != {"cpu", "cuda"} or type(cuda) is not list or any(each.dtype != torch.uint8 for each in cuda):
        raise ConfigError("the random states of the saved run are damaged")
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device
