"""Checks of calls in an unusual order, and of losses of more than the y of one step."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import pytrees
from rtrl._utils.real_pairs import is_continuous
from rtrl.testing.driver import trainable
from rtrl.testing.learner_checks.driver import StreamDriver
from rtrl.testing.learner_checks.registry import Subject, check
from rtrl.testing.learner_checks.verdict import Mismatch, compare, evaluate
from rtrl.testing.report import Found
from rtrl.testing.streams import Stream

_PENALTY = 0.1
_REFUSED_OR_RIGHT = "such a loss must count in full, or be refused and change nothing"

_OnStream = Callable[[Subject, Stream], Mismatch | None]


def _on_each_stream(name: str, message: str, *, losses: bool = True) -> Callable[[_OnStream], _OnStream]:
    """Register a check of a learner of single runs, which compares the gradient after one run on each stream.

    Args:
        name: of the check.
        message: what is wrong if the gradient is.
        losses: whether the check needs a learner that takes any loss.
    """

    def register(mismatch_on: _OnStream) -> _OnStream:
        def run(subject: Subject) -> Iterator[Found]:
            subject.needs_learner()
            subject.needs_one_run()
            subject.needs_steps()
            if losses:
                subject.needs_any_loss()
            for stream in subject.streams():
                wrong = mismatch_on(subject, stream)
                if wrong is not None:
                    already = evaluate(subject.spec.law, subject.spec, stream, subject.seed) is not None
                    yield wrong.as_found(f"{stream.name}{' (as without all this)' if already else ''}: {message}")

        check(name)(run)
        return mismatch_on

    return register


def _is_accepted(driver: StreamDriver, loss: Tensor) -> bool:
    """Pass a loss that the learner may refuse."""
    try:
        driver.learner.backward(loss)
    except Exception:
        return False
    return True


@_on_each_stream(
    "losses with a penalty",
    f"with a penalty on the parameters in each loss, the gradient is wrong; {_REFUSED_OR_RIGHT}",
)
def _penalty(subject: Subject, stream: Stream) -> Mismatch | None:
    """Each loss has a term of the parameters themselves, whose gradient counts."""
    plain = replace(stream, syncs=frozenset(), offsets=None)
    driver = StreamDriver(subject.spec, replace(plain, loss=lambda t, y: None))
    parameters = trainable(driver.cell)
    accepted = set()
    for t, y in driver.steps():
        loss = plain.loss(t, y)
        penalty = _PENALTY * torch.stack([p.square().sum() for p in parameters.values()]).sum()
        if loss is not None and _is_accepted(driver, loss + penalty):
            accepted.add(t)
    penalties = {name: 2 * _PENALTY * len(accepted) * p.detach() for name, p in parameters.items()}
    counted = replace(plain, loss=lambda t, y: plain.loss(t, y) if t in accepted else None)
    of_the_losses = subject.spec.law.reference(counted, driver.learner)
    expected = {name: value + penalties[name] for name, value in of_the_losses.items()}
    return compare(driver.sync_and_read(), expected, subject.spec.tolerance)


@_on_each_stream(
    "losses over two steps",
    f"after losses of the y of two steps each, the gradient is wrong; {_REFUSED_OR_RIGHT}",
)
def _two_steps(subject: Subject, stream: Stream) -> Mismatch | None:
    """Some losses are products of the y of two steps."""
    plain = replace(stream, syncs=frozenset())
    seconds = set(range(2, plain.steps, 3))
    single = replace(plain, loss=lambda t, y: None if seconds & {t, t + 1} else plain.loss(t, y))
    driver = StreamDriver(subject.spec, single)
    weights: dict[int, list[Tensor]] = {}  # the gradients of the losses of two steps at each y
    before: list[Tensor] = []
    for t, y in driver.steps():
        leaves = _floating(y)
        if t in seconds and _is_accepted(driver, _product(before, leaves)):
            weights[t - 1] = [leaf.detach().clone() for leaf in leaves]
            weights[t] = [leaf.detach().clone() for leaf in before]
        before = leaves

    def weighted(t: int, y: Any) -> Tensor | None:
        return _product(_floating(y), weights[t]) if t in weights else single.loss(t, y)

    return subject.mismatch(replace(plain, loss=weighted), driver)


def _floating(y: Any) -> list[Tensor]:
    return [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]


def _product(first: list[Tensor], second: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


@_on_each_stream(
    "syncs before the loss",
    f"after a sync() between a step and its loss, the gradient is wrong; {_REFUSED_OR_RIGHT}",
)
def _sync_first(subject: Subject, stream: Stream) -> Mismatch | None:
    """At some steps, ``sync`` is called between the step and its loss."""
    late = frozenset(range(1, stream.steps, 4))
    driver = StreamDriver(
        subject.spec, replace(stream, loss=lambda t, y: None if t in late else stream.loss(t, y), syncs=late)
    )
    refused = set()
    for t, y in driver.steps():
        loss = stream.loss(t, y) if t in late else None
        if loss is not None and not _is_accepted(driver, loss):
            refused.add(t)
    counted = replace(stream, loss=lambda t, y: None if t in refused else stream.loss(t, y))
    return subject.mismatch(counted, driver)


@_on_each_stream(
    "two learners at once",
    "of two learners that take their steps in turn, one is wrong; a learner must share no state with another",
    losses=False,
)
def _two_learners(subject: Subject, stream: Stream) -> Mismatch | None:
    """Two learners on two copies of the cell take their steps in turn; the second one is made in mid-stream."""
    first = StreamDriver(subject.spec, stream)
    steps = first.steps()
    deque(islice(steps, 2), maxlen=0)
    other = replace(stream, xs=stream.xs.flip(0))
    second = StreamDriver(subject.spec, other)
    for _ in second.steps():
        next(steps, None)
    return subject.mismatch(stream, first) or subject.mismatch(other, second)
