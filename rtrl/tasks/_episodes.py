"""Streams of episodes: all samples of a batch begin an episode together, and it has the same length for all."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.tasks.protocol import Task, TaskStep, TaskStream, check_same_stream


class Episode(NamedTuple):
    """An episode of T steps for each of B samples.

    Attributes:
        symbols: LongTensor (T, B), the symbol of every step, whose one-hot is x; −1 for none (x is zero). Or numbers
            (T, B, d_in), which are x.
        targets: LongTensor (T, B) of classes, or (T, B, d_out) of numbers.
        has_target: Boolean (T, B).
    """

    symbols: Tensor
    targets: Tensor
    has_target: Tensor


class EpisodeTask(Task, ABC):
    """A task of episodes, by default with classes as targets.

    The generator of each episode is seeded by the SHA-256 of the task, the seed and the number of the episode, so that
    two small numbers are a position in the stream.
    """

    measure: Literal["accuracy", "bits per symbol", "squared error"] = "accuracy"

    @abstractmethod
    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Episode:
        """Draw one episode for each sample, on the CPU.

        Args:
            batch_size: B.
            held_out: draw an episode that is in no training stream.
            generator: the only source of random numbers.
        """

    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        held_out: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "EpisodeStream":
        """Return an endless stream; the same seed gives the same stream on every machine.

        Raises:
            ConfigError: ``batch_size`` is not a positive integer, or ``seed`` not an integer.
        """
        return EpisodeStream(self, batch_size, seed, held_out, dtype, device)

    def loss(self, y: Tensor, step: TaskStep) -> Tensor | None:
        """Return the cross-entropy of the samples with a target in nats, summed and divided by B; None without them."""
        if not bool(step.has_target.any()):
            return None
        return F.cross_entropy(y[step.has_target], step.target[step.has_target], reduction="sum") / len(y)

    def score(self, y: Tensor, step: TaskStep) -> tuple[float, int]:
        """Return the number of right answers, and the number of samples with a target."""
        right = (y.argmax(dim=1) == step.target) & step.has_target
        return float(right.sum()), int(step.has_target.sum())


class EpisodeStream(TaskStream):
    """The episodes of a task, one after the other."""

    def __init__(
        self,
        task: EpisodeTask,
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
        self._number, self._step = 0, 0  # the episode, and the next step in it
        self._episode: Episode | None = None

    def __next__(self) -> TaskStep:
        if self._episode is None:
            self._episode = self._draw(self._number)
        symbols, targets, has_target = (part[self._step] for part in self._episode)
        x = symbols
        if not x.is_floating_point():
            x = F.one_hot(symbols + 1, self._task.d_in + 1)[:, 1:]  # the first column stands for no symbol
        is_first = torch.full((self._batch_size,), self._step == 0, device="cpu")
        self._step += 1
        if self._step == len(self._episode.symbols):
            self._number, self._step, self._episode = self._number + 1, 0, None
        on = self._device
        targets = targets.to(on, self._dtype if targets.is_floating_point() else None)
        return TaskStep(x.to(on, self._dtype), targets, has_target.to(on), is_first.to(on))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream."""
        return {**self._identity(), "round": self._number, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of another stream of the same task.

        Raises:
            ConfigError: it was a stream of another task, seed, batch size or part, or there is no such position; this
                stream is unchanged.
        """
        check_same_stream(self._identity(), state, "round", "step")
        number, step = (validation.integer(name, state[name], least=0) for name in ("round", "step"))
        episode = self._draw(number) if step else None
        if episode is not None and step >= len(episode.symbols):
            raise ConfigError(f"'step' must lie in 0 … {len(episode.symbols) - 1}, got {step}")
        self._number, self._step, self._episode = number, step, episode

    def _identity(self) -> dict[str, Any]:
        return {
            "task": repr(self._task), "batch_size": self._batch_size, "seed": self._seed, "held_out": self._held_out,
        }  # fmt: skip

    def _draw(self, number: int) -> Episode:
        words = f"{self._task!r} {self._seed} {self._held_out} {number}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
        with torch.device("cpu"):
            return self._task.draw(self._batch_size, self._held_out, torch.Generator("cpu").manual_seed(seed))


def draw_integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw integers from low to high, both included, on the CPU."""
    return torch.randint(low, high + 1, shape, generator=generator, device="cpu")
