"""Checks of calls in an unusual order, and of losses of more than the y of one step."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import pytrees
from rtrl.testing.driver import trainable
from rtrl.testing.laws import Gradients
from rtrl.testing.learner_checks.driver import StreamDriver
from rtrl.testing.learner_checks.registry import Subject, check
from rtrl.testing.learner_checks.verdict import Mismatch, compare
from rtrl.testing.report import Found
from rtrl.testing.streams import Stream

_PENALTY = 0.1
_REFUSED_OR_RIGHT = "it must be right or refused without a change"


def _is_accepted(driver: StreamDriver, loss: Tensor) -> bool:
    """Pass a loss that the learner may refuse."""
    try:
        driver.learner.backward(loss)
    except Exception:
        return False
    return True


def _mismatch(subject: Subject, stream: Stream, driver: StreamDriver, extra: Gradients | None = None) -> Mismatch | None:
    """What is wrong with the gradient that the driver's learner delivers; ``extra`` is added to that of the stream."""
    expected = subject.spec.law.reference(stream, driver.learner)
    if extra is not None:
        expected = {name: value + extra[name] for name, value in expected.items()}
    return compare(driver.sync_and_read(), expected)


def _needs(subject: Subject) -> None:
    subject.needs_learner()
    subject.needs_any_loss()
    subject.needs_one_run()
    subject.needs_steps()


@check("losses with a penalty")
def _penalty(subject: Subject) -> Iterator[Found]:
    """Each loss has a term of the parameters themselves, whose gradient counts."""
    _needs(subject)
    for stream in subject.streams():
        stream = replace(stream, syncs=frozenset(), offsets=None)
        driver = StreamDriver(subject.spec, replace(stream, loss=lambda t, y: None))
        parameters = trainable(driver.cell)
        accepted = set()
        for t, y in driver.steps():
            loss = stream.loss(t, y)
            squares = torch.stack([p.square().sum() for p in parameters.values()]).sum()
            if loss is not None and _is_accepted(driver, loss + _PENALTY * squares):
                accepted.add(t)
        counted = replace(stream, loss=lambda t, y: stream.loss(t, y) if t in accepted else None)
        penalties = {name: 2 * _PENALTY * len(accepted) * p.detach() for name, p in parameters.items()}
        wrong = _mismatch(subject, counted, driver, penalties)
        if wrong is not None:
            yield wrong.as_found(
                f"{stream.name}: with a penalty on the parameters in each loss, the gradient is wrong; {_REFUSED_OR_RIGHT}"
            )


@check("losses over two steps")
def _two_steps(subject: Subject) -> Iterator[Found]:
    """One loss is a product of the y of two steps."""
    _needs(subject)
    for stream in subject.streams():
        stream = replace(stream, syncs=frozenset())
        seconds = set(range(2, stream.steps, 3))
        single = replace(stream, loss=lambda t, y: None if t in seconds or t + 1 in seconds else stream.loss(t, y))
        driver = StreamDriver(subject.spec, single)
        weights: dict[int, list[Tensor]] = {}  # the gradient of the losses of two steps at each y
        before: list[Tensor] = []
        for t, y in driver.steps():
            leaves = _floating(y)
            if t in seconds and _is_accepted(driver, _product(before, leaves)):
                weights[t - 1] = [leaf.detach().clone() for leaf in leaves]
                weights[t] = [leaf.detach().clone() for leaf in before]
            before = leaves

        def weighted(t: int, y: Any) -> Tensor | None:
            return _product(_floating(y), weights[t]) if t in weights else single.loss(t, y)

        wrong = _mismatch(subject, replace(stream, loss=weighted), driver)
        if wrong is not None:
            yield wrong.as_found(
                f"{stream.name}: after losses of the y of two steps each, the gradient is wrong; {_REFUSED_OR_RIGHT}"
            )


def _floating(y: Any) -> list[Tensor]:
    return [leaf for leaf in pytrees.tensors(y) if leaf.is_floating_point()]


def _product(first: list[Tensor], second: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


@check("syncs before the loss")
def _sync_first(subject: Subject) -> Iterator[Found]:
    """At some steps, ``sync`` is called between the step and its loss."""
    _needs(subject)
    for stream in subject.streams():
        at = frozenset(range(1, stream.steps, 4))
        others = replace(stream, loss=lambda t, y: None if t in at else stream.loss(t, y), syncs=at)
        driver = StreamDriver(subject.spec, others)
        refused = set()
        for t, y in driver.steps():
            if t in at and (loss := stream.loss(t, y)) is not None and not _is_accepted(driver, loss):
                refused.add(t)
        counted = replace(stream, loss=lambda t, y: None if t in refused else stream.loss(t, y))
        wrong = _mismatch(subject, counted, driver)
        if wrong is not None:
            yield wrong.as_found(
                f"{stream.name}: after a sync() between a step and its loss, the gradient is wrong; {_REFUSED_OR_RIGHT}"
            )


@check("two learners at once")
def _two_learners(subject: Subject) -> Iterator[Found]:
    """Two learners on two copies of the cell take their steps in turn; the second is made in mid-stream."""
    subject.needs_learner()
    subject.needs_one_run()
    subject.needs_steps()
    for stream in subject.streams():
        first = StreamDriver(subject.spec, stream)
        steps = first.steps()
        list(islice(steps, 2))
        other = replace(stream, xs=stream.xs.flip(0))
        second = StreamDriver(subject.spec, other)
        for _ in second.steps():
            next(steps, None)
        for which, driver, own in (("first", first, stream), ("second", second, other)):
            wrong = _mismatch(subject, own, driver)
            if wrong is not None:
                yield wrong.as_found(
                    f"{stream.name}: of two learners that take their steps in turn, the {which} one is wrong; a learner "
                    "must share no state with another"
                )
                break
