"""Checks of what a learner delivers: gradients and influences along streams that have bitten others."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import pytrees
from rtrl.testing import streams
from rtrl.testing.laws import Unbiased
from rtrl.testing.learner_checks.driver import StreamDriver, drive
from rtrl.testing.learner_checks.registry import Check, NotJudged, Subject, check
from rtrl.testing.learner_checks.verdict import compare, gradient_failures, influence_failures
from rtrl.testing.report import Found
from rtrl.testing.streams import Loss, Stream

_SHORT = 40  # steps that the other checks cover


def _at(loss: Loss, wanted: Callable[[int], bool]) -> Loss:
    """The same loss at some steps alone."""

    def chosen(t: int, y: Any) -> Tensor | None:
        return loss(t, y) if wanted(t) else None

    return chosen


def _walks(make: Callable[[int], Stream], sparse: bool) -> Check:
    """A check that walks one stream of the checks' own."""

    def walked(subject: Subject) -> Iterator[Found]:
        for found in subject.wrong(subject.standard(make(subject.seed), sparse=sparse)):
            hint = " (a learner of cells that return (y, h_next) alone says so: sparse=False)"
            yield found._replace(message=found.message + hint) if sparse and " raised " in found.message else found

    return walked


def _everything_now_and_then(seed: int) -> Stream:
    return streams.scheduled_stream(seed, largest=9.0)


for _name, _make, _sparse in (
    ("dense cell", streams.dense_stream, False),
    ("unusual parameters", streams.unusual_stream, False),
    ("shared parameters", streams.shared_stream, False),
    ("partly trained", streams.frozen_stream, False),
    ("layers", streams.layered_stream, False),
    ("sparse rows", streams.scheduled_stream, True),
    ("everything declared now and then", _everything_now_and_then, True),
    ("sleeping slices", streams.sleeping_stream, True),
    ("near ties", streams.near_tie_stream, True),
):
    check(_name)(_walks(_make, _sparse))


@check("long stream")
def _long(subject: Subject) -> Iterator[Found]:
    """Hundreds of steps; fewer, down to the law's horizon, with a loss at their end."""
    law = subject.spec.law
    if isinstance(law, Unbiased):
        longer = replace(streams.dense_stream(subject.seed, steps=3 * law.horizon, batch=1), name="three horizons")
        subject.standard(longer)
        yield from gradient_failures(
            replace(subject.spec, law=replace(law, horizon=longer.steps)), longer, subject.seed
        )
        return
    if law.steps is not None and law.steps <= _SHORT:
        raise NotJudged("because the law covers short streams alone")
    stream = subject.standard(streams.slow_stream(subject.seed))
    every = stream.loss
    yield from subject.wrong(replace(stream, loss=lambda t, y: every(9, y) if t == stream.steps - 1 else every(t, y)))


@check("long sleep")
def _long_sleep(subject: Subject) -> Iterator[Found]:
    """A hundred and fifty steps of sleep."""
    if subject.spec.law.steps is not None and subject.spec.law.steps <= _SHORT:
        raise NotJudged("because the law covers short streams alone")
    yield from subject.wrong(subject.standard(streams.long_sleep_stream(subject.seed), sparse=True))


@check("own streams")
def _own(subject: Subject) -> Iterator[Found]:
    if not subject.spec.streams:
        raise NotJudged("because the spec brings no streams of its own")
    for stream in subject.streams():
        yield from subject.wrong(stream)


@check("losses now and then")
def _now_and_then(subject: Subject) -> Iterator[Found]:
    subject.needs_steps()
    for stream in subject.streams():
        third = _at(stream.loss, lambda t: t % 3 == 2)
        yield from subject.wrong(replace(stream, loss=third), "a loss at every third step", stream)


@check("one loss at the end")
def _at_the_end(subject: Subject) -> Iterator[Found]:
    for stream in subject.streams():
        last = _at(stream.loss, (stream.steps - 1).__eq__)
        yield from subject.wrong(replace(stream, loss=last), "a loss at the last step alone", stream)


@check("losses of one sample at a time")
def _one_sample(subject: Subject) -> Iterator[Found]:
    """Of samples whose losses fall at other steps, none takes those of another, or waits for it."""
    subject.needs_steps()
    for stream in subject.streams():
        lone = _of_one_sample(stream.loss)
        yield from subject.wrong(replace(stream, loss=lone), "a loss of one sample a step", stream)


def _of_one_sample(loss: Loss) -> Loss:
    def chosen(t: int, y: Any) -> Tensor | None:
        batch = pytrees.tensors(y)[0].shape[0]
        return loss(t, pytrees.map_tensors(lambda leaf: leaf[t % batch : t % batch + 1], y))

    return chosen


@check("losses of all sizes")
def _sizes(subject: Subject) -> Iterator[Found]:
    """Losses a million times larger and smaller: nothing is clipped, nothing counts as zero."""
    for stream in subject.streams():
        for factor in (1e6, 1e-6):
            scaled = _scaled(stream.loss, factor)
            yield from subject.wrong(replace(stream, loss=scaled), f"losses {factor:g} times as large", stream)


def _scaled(loss: Loss, factor: float) -> Loss:
    def chosen(t: int, y: Any) -> Tensor | None:
        value = loss(t, y)
        return None if value is None else factor * value

    return chosen


@check("odd inputs")
def _odd_inputs(subject: Subject) -> Iterator[Found]:
    """x is a view; where the spec allows it, it is overwritten when the step's losses are given, as by a loop with one
    buffer."""
    subject.needs_learner()
    overwritten = subject.spec.copies_inputs
    treatment = "x not contiguous" + (", and overwritten after the step" if overwritten else "")
    for stream in subject.streams():
        yield from subject.wrong(replace(stream, scattered=True, overwritten=overwritten), treatment, stream)


@check("plain backward")
def _plain(subject: Subject) -> Iterator[Found]:
    """A loss is given by its own ``backward()``."""
    if not subject.spec.plain_backward:
        raise NotJudged("because the spec does not promise it (plain_backward=True)")
    subject.needs_learner()
    for stream in subject.streams():
        yield from subject.wrong(replace(stream, plain=True), "losses given by their own backward()", stream)


@check("several losses a step")
def _several(subject: Subject) -> Iterator[Found]:
    subject.needs_learner()
    for stream in subject.streams():
        yield from subject.wrong(replace(stream, pieces=2), "each loss given in two parts", stream)


@check("no loss at all")
def _no_loss(subject: Subject) -> Iterator[Found]:
    for stream in subject.streams():
        outcome = drive(subject.spec, replace(stream, loss=lambda t, y: None))
        for name, gradient in outcome.gradients.items():
            if bool((gradient != 0).any()):
                worst = f"{float(gradient.abs().max()):.6g}"
                yield Found(f"{stream.name}: a gradient without a loss", None, None, f"parameter {name}", worst, "0")


@check("early deliveries")
def _deliveries(subject: Subject) -> Iterator[Found]:
    """sync() at any step; what is delivered adds up, each loss once."""
    subject.needs_learner()
    subject.needs_steps()
    for stream in subject.streams():
        often = replace(stream, syncs=frozenset({0, 1, 4, 5, 11, 12}) & frozenset(range(stream.steps - 1)))
        failures = list(subject.wrong(often, "deliveries at odd steps", stream))
        yield from failures
        if not failures and not isinstance(subject.spec.law, Unbiased):
            yield from _accumulated(subject, often)


def _accumulated(subject: Subject, stream: Stream) -> Iterator[Found]:
    """``.grad`` is added to, and set to zero in between by whom it may; a second sync delivers nothing."""
    driver = StreamDriver(subject.spec, stream)
    gradients = driver.finish()
    difference = compare(driver.sync_and_read(), gradients)
    if difference is not None:
        message = f"{stream.name}: a second sync() with no step in between delivers something again"
        yield Found(message, stream.steps - 1, None, difference.where, difference.found, difference.expected)
        return
    driver = StreamDriver(subject.spec, stream)
    for p in driver.cell.parameters():
        p.grad = torch.ones_like(p)
    total: dict[str, Tensor] = {}
    for t, _ in driver.steps():
        if t in stream.syncs or t == stream.steps - 1:
            total = {name: total.get(name, 0.0) + value for name, value in driver.sync_and_read().items()}
            driver.take_gradients()
    difference = compare(total, {name: value + 1 for name, value in gradients.items()})
    if difference is not None:
        message = f"{stream.name}: .grad is not added to, or what is delivered depends on what was in it"
        yield Found(message, stream.steps - 1, None, difference.where, difference.found, difference.expected)


@check("changed parameters")
def _changed(subject: Subject) -> Iterator[Found]:
    """Parameters change after a sync, as an optimizer changes them: each step counts with those it was taken with."""
    subject.needs_learner()
    subject.needs_steps()
    for stream in subject.streams():
        third = max(1, stream.steps // 3)
        trained = {name: p for name, p in stream.cell.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(subject.seed)
        moved = [
            {
                name: 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
                for name, p in trained.items()
            }
            for _ in range(2)
        ]
        offsets = [[{}, *moved][min(t // third, 2)] for t in range(stream.steps)]
        treatment = f"changes of parameters before steps {third} and {2 * third}"
        yield from subject.wrong(replace(stream, offsets=offsets), treatment, stream)


@check("resets")
def _resets(subject: Subject) -> Iterator[Found]:
    """Samples start anew in mid-stream, one by one; what was earned before is kept."""
    subject.needs_learner("reset")
    subject.needs_steps()
    for stream in subject.streams():
        flags, at = _one_by_one(stream)
        treatment = f"new starts of one sample before step {at[0]}, of another before step {at[1]}"
        yield from subject.wrong(replace(stream, resets=flags), treatment, stream)


def _one_by_one(stream: Stream) -> tuple[Tensor, list[int]]:
    flags = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool, device=stream.xs.device)
    at = [max(1, stream.steps // 3), max(2, 2 * stream.steps // 3)]
    flags[at[0], 0] = True
    flags[at[1], -1] = True
    return flags, at


@check("resets of many")
def _many_resets(subject: Subject) -> Iterator[Found]:
    """Before the first step, of some, of all, of nobody, twice in a row, straight after a delivery, late; with steps
    that have no loss in between."""
    subject.needs_learner("reset")
    subject.needs_steps()
    for stream in subject.streams():
        flags = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool, device=stream.xs.device)
        flags[0, -1] = True
        flags[2:4, 1:] = True
        flags[stream.steps // 2] = True
        flags[stream.steps - 2, 0] = True
        bent = replace(
            stream,
            resets=flags,
            syncs=frozenset({1, stream.steps // 2 - 1}),
            loss=_at(stream.loss, lambda t: t % 4 != 1),
        )
        yield from subject.wrong(
            bent, "new starts of some, of all and of nobody, twice in a row, after deliveries", stream
        )


@check("influence")
def _influence(subject: Subject) -> Iterator[Found]:
    """The influence that is handed out is that of the law, column by column, and asking for it harms nothing."""
    if not subject.spec.law.covers_influence:
        raise NotJudged("because the law says nothing of the influence")
    subject.needs_learner("influence")
    for stream in subject.streams():
        yield from influence_failures(subject.spec, stream)
    stream = subject.streams()[0]
    if callable(getattr(StreamDriver(subject.spec, stream).learner, "reset", None)) and stream.steps > 2:
        flags, _ = _one_by_one(stream)
        yield from influence_failures(subject.spec, replace(stream, resets=flags, syncs=frozenset({1})))
