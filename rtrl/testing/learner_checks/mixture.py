"""Drawn schedules of steps, losses, resets, syncs, changes of parameters and saves, shrunk when one fails."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rtrl.testing.learner_checks.driver import LearnerFailed, StreamDriver
from rtrl.testing.learner_checks.registry import Subject, check
from rtrl.testing.learner_checks.verdict import Mismatch
from rtrl.testing.report import Found
from rtrl.testing.streams import Stream, moved_parameters

_OFFSETS = 4
_MOST_RUNS = 400  # of a failing schedule's parts, before the shortest one found so far is reported


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a schedule.

    Attributes:
        kind: "step", "reset", "sync", "change" or "save".
        number: the step of the stream whose x it takes, or the number of the new parameters.
        losses: the number of losses of a step.
        samples: those that are reset.
    """

    kind: str
    number: int = 0
    losses: int = 1
    samples: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return the event in words."""
        words = {
            "step": f"step({self.number})" + ("", ", loss", ", two losses")[self.losses],
            "reset": f"reset of sample{'s' * (len(self.samples) > 1)} {', '.join(map(str, self.samples))}",
            "sync": "sync",
            "change": "sync, change of parameters",
            "save": "save, load into a new learner",
        }
        return words[self.kind]


Schedule = Sequence[Event]


def drawn(stream: Stream, kinds: Sequence[str], seed: int, *, length: int, gap: int) -> list[Event]:
    """Draw a schedule in which every sequence of ``length`` events of these kinds occurs.

    Args:
        stream: whose steps are taken.
        kinds: of the events besides steps.
        seed: of the order, the losses and the samples.
        length: of the sequences.
        gap: the number of new events between two steps; those of the sequence that the gap would cut are repeated.
    """
    generator = random.Random(f"{seed} {length} {stream.name}")
    everyone = tuple(range(stream.batch_size))
    spared = generator.choice(everyone)  # reset only with all others, so that several resets never add up to one of all
    others = tuple(b for b in everyone if b != spared)
    order = _every_sequence(kinds, length, generator)
    events = []
    for number, start in enumerate(range(0, len(order), gap)):
        events.append(Event("step", number % stream.steps, losses=generator.choice((0, 1, 1, 2))))
        some = tuple(sorted(generator.sample(others, min(len(others), generator.choice((1, 1, 2))))))
        for kind in order[start if gap == 1 else max(0, start - length + 1) : start + gap]:
            samples = (
                everyone if not some or (gap == 1 and generator.random() < 0.1) else some[: generator.choice((1, 2))]
            )
            events.append(Event(kind, generator.randrange(1, _OFFSETS + 1), samples=samples))
    return [*events, Event("step", 0), Event("step", 1)]


def _every_sequence(kinds: Sequence[str], length: int, generator: random.Random) -> list[str]:
    """A shortest order of kinds that contains every sequence of this length: a De Bruijn sequence."""
    unused = {node: generator.sample(kinds, len(kinds)) for node in product(kinds, repeat=length - 1)}
    path, stack = [], [next(iter(unused))]
    while stack:
        if unused[stack[-1]]:
            stack.append((*stack[-1][1:], unused[stack[-1]].pop()))
        else:
            path.append(stack.pop())
    path.reverse()
    return [*path[0], *(node[-1] for node in path[1:])]


def _is_step(event: Event) -> bool:
    return event.kind == "step"


def equivalent(stream: Stream, schedule: Schedule, offsets: Sequence[dict[str, Tensor]]) -> Stream:
    """The stream of which a schedule is one form: with the same steps, losses, resets and parameters."""
    steps = [event for event in schedule if _is_step(event)]
    flags = torch.zeros(len(steps), stream.batch_size, dtype=torch.bool, device=stream.xs.device)
    parameters: list[dict[str, Tensor]] = []
    offset = offsets[0]
    for event in schedule:
        if event.kind == "change":
            offset = offsets[event.number]
        elif event.kind == "reset" and len(parameters) < len(steps):
            flags[len(parameters), list(event.samples)] = True
        elif _is_step(event):
            parameters.append(offset)

    def loss(t: int, y: Any) -> Tensor | None:
        value = stream.loss(steps[t].number, y)
        return None if value is None or not steps[t].losses else steps[t].losses * value

    xs = stream.xs[[event.number for event in steps]]
    return replace(stream, xs=xs, loss=loss, syncs=frozenset(), resets=flags, offsets=parameters)


def _run(subject: Subject, stream: Stream, schedule: Schedule, offsets: Sequence[dict[str, Tensor]]) -> Mismatch | None:
    """What is wrong with the gradient after a schedule, or None."""
    steps = [event for event in schedule if _is_step(event)]
    if not steps:
        return None
    plain = equivalent(stream, schedule, offsets)
    try:
        driver = StreamDriver(subject.spec, replace(stream, syncs=frozenset()))
        taken = 0
        for event in schedule:
            driver.step_index = taken
            if event.kind == "step":
                y = driver.step(stream.xs[event.number], lambda y: None)
                for _ in range(event.losses):
                    driver.add_loss(lambda y, event=event: stream.loss(event.number, y), y)  # type: ignore[misc]
                taken += 1
            elif event.kind == "reset":
                flags = torch.zeros(stream.batch_size, dtype=torch.bool, device=stream.xs.device)
                flags[list(event.samples)] = True
                driver.reset(flags)
            elif event.kind == "sync":
                driver.sync()
            elif event.kind == "change":
                driver.change_parameters(offsets[event.number])
            else:
                driver.save_and_load()
        return subject.mismatch(plain, driver)
    except LearnerFailed as failed:
        return Mismatch("", "", "", failed.step, str(failed), failed.traceback)


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> list[Event]:
    """Cut a failing schedule off where it fails, and remove events, many at once and then one by one, as long as what
    is left fails."""
    right, wrong, runs = 0, len(schedule), 0
    while wrong - right > 1:
        middle = (right + wrong) // 2
        runs += 1
        right, wrong = (right, middle) if fails(schedule[:middle]) else (middle, wrong)
    kept = list(schedule[:wrong])
    size = len(kept) // 2
    while size and runs < _MOST_RUNS:
        start, removed = 0, False
        while start < len(kept) and runs < _MOST_RUNS:
            candidate = kept[:start] + kept[start + size :]
            runs += 1
            if candidate and fails(candidate):
                kept, removed = candidate, True
            else:
                start += size
        size = size if removed and size == 1 else size // 2
    return kept


@check("drawn mixtures")
def _mixtures(subject: Subject) -> Iterator[Found]:
    """Two schedules of all events that the learner takes: every three in a row, and every two with a step in between. A
    schedule that fails is made as short as possible."""
    subject.needs_learner()
    subject.needs_one_run()
    subject.needs_steps(6)
    methods = {"reset": ("reset",), "save": ("state_dict", "load_state_dict")}
    kinds = [kind for kind in ("reset", "sync", "change", "save") if subject.has(*methods.get(kind, ()))]
    for stream in subject.streams():
        for length, gap in ((3, 4), (2, 1)):
            schedule = drawn(stream, kinds, subject.seed, length=length, gap=gap)
            if subject.spec.losses == "own":
                schedule = [replace(event, losses=1) for event in schedule]
            found = _shortest_failure(subject, stream, schedule)
            if found is not None:
                yield found
                break


def _shortest_failure(subject: Subject, stream: Stream, schedule: Schedule) -> Found | None:
    offsets = moved_parameters(stream, _OFFSETS, subject.seed)

    def mismatch_after(part: Schedule) -> Mismatch | None:
        return _run(subject, stream, part, offsets)

    if mismatch_after(schedule) is None:
        return None
    shortest = shrunk(schedule, lambda part: mismatch_after(part) is not None)
    mismatch = mismatch_after(shortest)
    if mismatch is None:
        raise LearnerFailed("the learner does not give the same gradient twice for the same calls")
    what = mismatch.message or "the gradient is wrong"
    words = "; ".join(map(str, shortest))
    message = f"{stream.name}: {what} after a drawn schedule; the shortest one found is: {words}; sync"
    return mismatch.as_found(message, mismatch.step)
