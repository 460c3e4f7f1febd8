"""The register of the checks of a learner, and the subject that each of them checks."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rtrl.testing import streams
from rtrl.testing.laws import Unbiased, shortened
from rtrl.testing.learner_checks.driver import StreamDriver
from rtrl.testing.learner_checks.verdict import Mismatch, compare, gradient_failures
from rtrl.testing.report import Found
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_SHORT = 40  # the number of steps of the longest stream that is modified, if there are shorter ones


class NotJudged(Exception):
    """A check does not apply; the message is the reason, in words that follow "not judged, "."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The spec under test, and the seed of all random numbers."""

    spec: LearnerSpec
    seed: int

    def streams(self) -> list[Stream]:
        """The streams that most checks modify: the spec's own, or a dense one and one with dormant slices."""
        if self.spec.streams:
            usable = self.own_streams()
            return [stream for stream in usable if stream.steps <= _SHORT] or usable
        return [self._fitted(stream) for stream in _standard(self.seed)[: 2 if self.spec.sparse else 1]]

    def own_streams(self) -> list[Stream]:
        """The spec's streams that the learner can take, each as long as the law covers.

        Raises:
            NotJudged: all of them have resets, and the learner has none.
        """
        may_reset = self.spec.gradients is None and any(stream.resets is not None for stream in self.spec.streams)
        if may_reset:
            learner = StreamDriver(self.spec, self.spec.streams[0]).learner
            may_reset = callable(getattr(learner, "reset", None))
        usable = [stream for stream in self.spec.streams if may_reset or stream.resets is None]
        if not usable:
            raise NotJudged("because all streams of the spec have resets, and the learner has no reset")
        return [shortened(self.spec.law, stream) for stream in usable]

    def standard(self, stream: Stream, *, sparse: bool = False) -> Stream:
        """Shorten a standard stream to what the law covers, with as many samples as the learner is for.

        Raises:
            NotJudged: the spec has streams of its own, or excludes sparse cells.
        """
        if self.spec.streams:
            raise NotJudged("because the spec has streams of its own")
        if sparse and not self.spec.sparse:
            raise NotJudged("because the learner is not for cells that declare a Sparsity (sparse=False)")
        return self._fitted(stream)

    def _fitted(self, stream: Stream) -> Stream:
        batch = self.spec.batch
        resized = stream if batch is None or batch == stream.batch_size else stream.resized(batch)
        return shortened(self.spec.law, resized)

    def needs_any_loss(self) -> None:
        """Raise ``NotJudged`` if the learner takes no losses but those of the streams."""
        if self.spec.losses == "own":
            raise NotJudged('because the learner takes the losses of the streams only (losses="own")')

    def needs_one_run(self) -> None:
        """Raise ``NotJudged`` if the law says nothing about the gradient of a single run."""
        if isinstance(self.spec.law, Unbiased):
            raise NotJudged("because the law is about the mean over many runs")

    def has(self, *methods: str) -> bool:
        """Whether the learner has these methods."""
        if self.spec.gradients is not None:
            return False
        learner = StreamDriver(self.spec, self.streams()[0]).learner
        return all(callable(getattr(learner, method, None)) for method in methods)

    def needs_steps(self, least: int = 3) -> None:
        """Raise ``NotJudged`` if the law or a stream of the spec covers fewer steps."""
        if self.spec.law.steps is not None and self.spec.law.steps < least:
            raise NotJudged(f"because the law covers fewer than {least} steps")
        if any(stream.steps < least for stream in self.spec.streams):
            raise NotJudged(f"because a stream of the spec has fewer than {least} steps")

    def needs_learner(self, *methods: str) -> None:
        """Raise ``NotJudged`` if the spec has a function, or a learner without these methods."""
        if self.spec.gradients is not None:
            raise NotJudged("because the spec has a function of the whole stream, not a learner")
        stream = self.streams()[0]
        learner = StreamDriver(self.spec, stream).learner
        missing = [method for method in methods if not callable(getattr(learner, method, None))]
        if missing:
            raise NotJudged(f"because the learner has no {' and no '.join(missing)}")

    def mismatch(self, stream: Stream, driver: StreamDriver) -> Mismatch | None:
        """What is wrong with the gradient that the driver's learner delivers now, if it has taken this stream."""
        gradients = driver.sync_and_read()
        return compare(gradients, self.spec.law.reference(stream, driver.learner), self.spec.tolerance)

    def gradient_failures(self, stream: Stream, treatment: str = "", plain: Stream | None = None) -> Iterator[Found]:
        """What is wrong with the gradient on a stream."""
        return gradient_failures(self.spec, stream, self.seed, treatment, plain)


@functools.lru_cache(maxsize=4)
def _standard(seed: int) -> tuple[Stream, Stream]:
    """The two streams that most checks modify; all learners that are checked with one seed share them."""
    sparse = streams.scheduled_stream(seed, steps=20, period=5)
    return streams.dense_stream(seed), replace(sparse, name="sparse rows and dormant slices")


Check = Callable[[Subject], Iterator[Found]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check by its name."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register
