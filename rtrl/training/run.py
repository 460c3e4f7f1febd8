"""A training run as plain values, which is saved to a file and continued in another process."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from rtrl import tasks
from rtrl._utils import validation
from rtrl._utils.formatting import first_line
from rtrl.errors import ConfigError, RTRLError
from rtrl.training.cell_factory import make_cell
from rtrl.training.learner_factory import make_learner
from rtrl.training.trainer import Trainer

FORMAT = 1
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

    def build(self) -> Trainer:
        """Make the trainer of these settings.

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

    Args:
        path: the file.
        settings: of the run.
        trainer: of the run.
        notes: more plain values, which ``load`` returns.

    Raises:
        ConfigError: the file cannot be written, or the learner cannot be saved.
    """
    content = {
        "format": FORMAT,
        "settings": asdict(settings),
        "trainer": trainer.state_dict(),
        "random": _random_state(),
        "notes": dict(notes or {}),
    }
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with half.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def load(path: Path) -> tuple[Settings, Trainer, dict[str, Any]]:
    """Load a saved run, and return its settings, its trainer and its notes.

    PyTorch's global random states are restored, for learners that draw from them.

    Raises:
        ConfigError: the file is missing, was not written by ``save``, or the run cannot be built here.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except Exception as error:  # what a damaged archive raises depends on the damage
        raise ConfigError(f"{path} is damaged, or not a checkpoint of a training run: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "settings" not in content:
        raise ConfigError(f"{path} is not a checkpoint of a training run")
    try:
        settings = Settings(**content["settings"])
        trainer = settings.build()
        trainer.load_state_dict(content["trainer"])
        _set_random_state(content["random"])
        return settings, trainer, content["notes"]
    except (TypeError, KeyError, RuntimeError, AttributeError) as error:
        if isinstance(error, RTRLError):
            raise
        raise ConfigError(f"{path} is damaged: {first_line(error)}") from error


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
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
