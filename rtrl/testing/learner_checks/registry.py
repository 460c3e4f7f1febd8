"""What a check of a learner gets to see, and the list that checks enter their names in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rtrl.testing import streams
from rtrl.testing.laws import shortened
from rtrl.testing.learner_checks.driver import StreamDriver
from rtrl.testing.learner_checks.verdict import gradient_failures
from rtrl.testing.report import Found
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream


class NotJudged(Exception):
    """A check does not apply; the reason in words, after "not judged, "."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is checked, and the seed of all that is drawn."""

    spec: LearnerSpec
    seed: int

    def streams(self) -> list[Stream]:
        """Where one stream after another is bent by a check: the spec's own, or a dense and a sleeping one."""
        if self.spec.streams:
            return [shortened(self.spec.law, stream) for stream in self.spec.streams]
        chosen = [streams.dense_stream(self.seed)]
        if self.spec.sparse:
            chosen.append(streams.sleeping_stream(self.seed))
        return [shortened(self.spec.law, stream) for stream in chosen]

    def standard(self, stream: Stream, *, sparse: bool = False) -> Stream:
        """A stream of the checks' own, if it may be used."""
        if self.spec.streams:
            raise NotJudged("because the spec brings streams of its own")
        if sparse and not self.spec.sparse:
            raise NotJudged("because the learner is not for cells that declare a Sparsity (sparse=False)")
        return shortened(self.spec.law, stream)

    def needs_steps(self, least: int = 3) -> None:
        """Refuse to judge what happens in mid-stream where there is no middle."""
        if self.spec.law.steps is not None and self.spec.law.steps < least:
            raise NotJudged(f"because the law covers less than {least} steps")
        if any(stream.steps < least for stream in self.spec.streams):
            raise NotJudged(f"because a stream of the spec has less than {least} steps")

    def needs_learner(self, *methods: str) -> None:
        """Refuse to judge what a function, or a learner without these methods, cannot do."""
        if self.spec.gradients is not None:
            raise NotJudged("because the spec has a function of the whole stream, not a learner")
        stream = self.streams()[0]
        learner = StreamDriver(self.spec, stream).learner
        missing = [method for method in methods if not callable(getattr(learner, method, None))]
        if missing:
            raise NotJudged(f"because the learner has no {' and no '.join(missing)}")

    def wrong(self, stream: Stream, treatment: str = "", plain: Stream | None = None) -> Iterator[Found]:
        """What is wrong with its gradient on a stream."""
        return gradient_failures(self.spec, stream, self.seed, treatment, plain)


Check = Callable[[Subject], Iterator[Found]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register
