"""Streams made of rounds: all samples of a batch begin an episode together and get one of the same length."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.tasks.protocol import Stream, Task, TaskStep


class Round(NamedTuple):
    """One episode for each of B samples, T steps long.

    Attributes:
        symbols: LongTensor (T, B), the symbol at every step, given as its one-hot; −1 for none (x is zero). Or numbers
            (T, B, d_in), which are x itself.
        targets: LongTensor (T, B) of classes, or (T, B, d_out) of numbers. asked: Boolean (T, B).
    """

    symbols: Tensor
    targets: Tensor
    asked: Tensor


class RoundTask(Task, ABC):
    """A classification of episodes. Round r of a stream is drawn from its own generator, seeded by
    the SHA-256 of task, seed and r, so that a place in a stream is two small numbers."""

    measure: Literal["accuracy", "bits per symbol", "squared error"] = "accuracy"

    @abstractmethod
    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Round:
        """One round, drawn on the CPU."""

    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        held_out: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "RoundStream":
        """An endless stream; the same seed gives the same one on every machine.

        Raises:
            ConfigError: ``batch_size`` is not a positive integer, or ``seed`` not an integer.
        """
        return RoundStream(self, batch_size, seed, held_out, dtype, device)

    def loss(self, y: Tensor, moment: TaskStep) -> Tensor | None:
        """Cross-entropy in nats: the sum over the samples asked, divided by B; None if no sample is asked."""
        if not bool(moment.asked.any()):
            return None
        return F.cross_entropy(y[moment.asked], moment.target[moment.asked], reduction="sum") / len(y)

    def score(self, y: Tensor, moment: TaskStep) -> tuple[float, int]:
        """How many of the samples asked were answered rightly, and how many were asked."""
        right = (y.argmax(dim=1) == moment.target) & moment.asked
        return float(right.sum()), int(moment.asked.sum())


class RoundStream(Stream):
    """The rounds of a task, one after the other."""

    def __init__(
        self,
        task: RoundTask,
        batch_size: int,
        seed: int,
        held_out: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        validation.integer("batch_size", batch_size)
        validation.integer("seed", seed, least=None)
        self._task, self._batch_size, self._seed, self._held_out = task, batch_size, seed, bool(held_out)
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        self._device = torch.device("cpu" if device is None else device)
        self._number, self._step = 0, 0  # the round, and the next step in it
        self._round: Round | None = None

    def __next__(self) -> TaskStep:
        if self._round is None:
            self._round = self._draw()
        symbols, targets, asked = (part[self._step] for part in self._round)
        x = symbols
        if not x.is_floating_point():
            x = F.one_hot(symbols + 1, self._task.d_in + 1)[:, 1:]  # the first column is that of no symbol
        fresh = torch.full((self._batch_size,), self._step == 0, device="cpu")
        self._step += 1
        if self._step == len(self._round.symbols):
            self._number, self._step, self._round = self._number + 1, 0, None
        on = self._device
        targets = targets.to(on, self._dtype if targets.is_floating_point() else None)
        return TaskStep(x.to(on, self._dtype), targets, asked.to(on), fresh.to(on))

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "round": self._number, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream of the same task stood.

        Raises:
            ConfigError: it was a stream of another task, seed, batch size or part. Nothing has changed then.
        """
        mine = self._identity()
        missing = [name for name in (*mine, "round", "step") if name not in state]
        if missing:
            raise ConfigError(f"this is no state of a {self._task.name} stream: {', '.join(missing)} is missing")
        for name, value in mine.items():
            if state[name] != value:
                raise ConfigError(f"the state is of a stream with {name} {state[name]!r}; this one has {value!r}")
        self._number, self._step, self._round = int(state["round"]), int(state["step"]), None

    def _identity(self) -> dict[str, Any]:
        return {
            "task": repr(self._task), "batch_size": self._batch_size, "seed": self._seed, "held_out": self._held_out,
        }  # fmt: skip

    def _draw(self) -> Round:
        words = f"{self._task!r} {self._seed} {self._held_out} {self._number}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
        with torch.device("cpu"):
            return self._task.draw(self._batch_size, self._held_out, torch.Generator("cpu").manual_seed(seed))


def draw_integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """LongTensor of numbers from low to high, both included, on the CPU."""
    return torch.randint(low, high + 1, shape, generator=generator, device="cpu")
