"""Laws: how the gradient of a learner is related to the exact one. A biased learner declares the law that it obeys; it
never gets a looser tolerance."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

import oracles
from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.testing.linearized_steps import states_received
from rtrl.testing.streams import Loss, Stream

Gradients = dict[str, Tensor]


class Law(ABC):
    """What the gradient of a learner must be, on any stream."""

    steps: int | None = None
    """The length of the longest stream that it covers; None for any length."""
    covers_influence: bool = False
    """Whether it defines the influence, too."""

    @abstractmethod
    def reference(self, stream: Stream, learner: Any) -> Gradients:
        """Return the gradients that the ``learner`` must have after this ``stream``, by parameter name."""

    def variant(self) -> "Law | None":
        """Return a law that is easily meant in place of this one; None by default."""
        return None

    def reference_influence(self, stream: Stream, learner: Any) -> Gradients:
        """Return the influences ``(B, H, P)`` that the ``learner`` must have after this ``stream``.

        Raises:
            ConfigError: the law does not define them.
        """
        raise ConfigError(f"{self} does not define the influence")


@dataclass(frozen=True)
class Exact(Law):
    """The gradient is that of backpropagation through the whole stream: ``dL/dθ``.

    Args:
        scope: the cells for which it holds, in words, if not for all; the spec then has streams of such cells.
    """

    scope: str = field(default="", kw_only=True)
    covers_influence = True

    def reference(self, stream: Stream, learner: Any) -> Gradients:
        """Return the gradients of unrolled BPTT on the ``stream``, for any ``learner``."""
        return oracles.bptt(stream.cell, stream.xs, stream.loss, resets=stream.resets, offsets=stream.offsets)

    def reference_influence(self, stream: Stream, learner: Any) -> Gradients:
        """Return the influences of full RTRL on the ``stream``, for any ``learner``."""
        return oracles.dense_rtrl(
            stream.cell, stream.xs, stream.loss, resets=stream.resets, offsets=stream.offsets, return_influence=True
        )[1][-1]


@dataclass(frozen=True)
class ExactWithin(Exact):
    """The gradient is exact on every stream of at most ``horizon`` steps; longer streams are not covered.

    This law is weak: many wrong rules obey it, too. Declare ``Truncated`` where it applies.

    Args:
        horizon: the number of steps.
        scope: as in ``Exact``.
    """

    horizon: int

    def __post_init__(self) -> None:
        validation.integer("horizon", self.horizon)
        object.__setattr__(self, "steps", self.horizon)


@dataclass(frozen=True)
class Truncated(Law):
    """Each loss is pulled back through ``horizon`` steps, the last one its own; the state before them is a constant.

    Equation:
        ``Σ_t dℓ_t/dθ`` with ``h_{a(t)}`` a constant, where ``a(t) = t − horizon + 1``; in chunks
        ``a(t) = t − t mod horizon``, counted from the last reset of all samples.

    Args:
        horizon: k.
        sliding: False cuts the stream into chunks of k steps.
    """

    horizon: int
    sliding: bool = True

    def __post_init__(self) -> None:
        validation.integer("horizon", self.horizon)

    def reference(self, stream: Stream, learner: Any) -> Gradients:
        """Return the sum of one BPTT per loss of the ``stream``, each over its last steps, for any ``learner``."""
        total = {name: torch.zeros_like(p) for name, p in stream.cell.named_parameters() if p.requires_grad}
        states = states_received(stream)
        first = 0
        for t in range(stream.steps):
            if self.sliding:
                first = max(0, t - self.horizon + 1)
            elif t - first == self.horizon or (stream.resets is not None and bool(stream.resets[t].all())):
                first = t
            part = oracles.bptt(
                stream.cell,
                stream.xs[first : t + 1],
                _only(stream.loss, t, first),
                h0=states[first] if first else None,  # a learned first state gets its gradient
                resets=None if stream.resets is None else stream.resets[first : t + 1],
                offsets=None if stream.offsets is None else stream.offsets[first : t + 1],
            )
            total = {name: value + part[name] for name, value in total.items()}
        return total


def _only(loss: Loss, t: int, first: int) -> Loss:
    """The loss of step t only, for a stream that begins with step ``first``."""
    return lambda i, y: loss(t, y) if first + i == t else None


@dataclass(frozen=True)
class Unbiased(Exact):
    """The mean of the gradient over independent draws is the exact one.

    The learner draws from PyTorch's global generator, which is seeded before every draw. The mean over the draws of
    every entry, and of the component along the exact gradient, must lie within z standard errors of the exact value;
    z is such that an unbiased learner with normal means is refused with a probability of at most ``false_alarm`` per
    stream (Student's t with ``draws − 1`` degrees of freedom, Bonferroni over entries). With a fixed seed the verdict
    is always the same. While the draws scatter so much that a gradient of zero would pass, up to four times as many are
    taken; a learner for which that is not enough is refused, because the draws do not test it.

    Args:
        draws: the number of draws, at least 30.
        false_alarm: the probability of a wrong refusal, over the choice of the seed.
        horizon: the length of the longest stream to test on; the variance grows with it.
        reach: tests one component more, that of the gradient from further back than this many steps. Without it, a
            learner that forgets the past may pass on long streams, because the near past is most of the gradient. A
            learner whose draws scatter so much that forgetting would pass is refused, too.
        scope: as in ``Exact``.

    Raises:
        ConfigError: a number is not of the right kind.
    """

    draws: int = 200
    false_alarm: float = 1e-6
    horizon: int = 3
    reach: int | None = None
    covers_influence = False  # a single draw is not a mean

    def __post_init__(self) -> None:
        validation.integer("draws", self.draws, 30)
        validation.integer("horizon", self.horizon)
        if self.reach is not None:
            validation.integer("reach", self.reach)
        if not isinstance(self.false_alarm, float) or not 0 < self.false_alarm < 1:
            raise ConfigError(f"false_alarm must be a number between 0 and 1, got {self.false_alarm!r}")
        object.__setattr__(self, "steps", self.horizon)

    def directions(self, stream: Stream) -> dict[str, Gradients]:
        """Return the exact gradient, and with ``reach`` the part of it from further back, by what they are.

        Args:
            stream: on which the learner is tested.
        """
        exact = self.reference(stream, None)
        found = {"the exact gradient": exact}
        if self.reach is not None and self.reach < stream.steps:
            near = Truncated(self.reach).reference(stream, None)
            found[f"its part from more than {self.reach} steps back"] = {n: exact[n] - near[n] for n in exact}
        return found

    def quantile(self, tests: int) -> float:
        """Return the number of standard errors that is allowed if ``tests`` values are tested at once.

        Example:
            >>> round(Unbiased(draws=100_000, false_alarm=0.05).quantile(1), 2)
            1.96
        """
        z = NormalDist().inv_cdf(1 - self.false_alarm / (2 * tests))
        return student(z, self.draws - 1)


def student(z: float, freedom: int) -> float:
    """Convert a quantile z of the normal distribution to that of Student's t.

    Source:
        Abramowitz and Stegun (1964), 26.7.5; off by less than 0.05 % for z ≤ 6.5 and 29 or more degrees of freedom.

    Example:
        >>> round(student(1.959964, 30), 3)  # tables say 2.042
        2.042
    """
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def shortened(law: Law, stream: Stream) -> Stream:
    """Cut the stream to the number of steps that the law covers."""
    return stream if law.steps is None or stream.steps <= law.steps else stream.prefix(law.steps)
