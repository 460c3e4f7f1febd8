"""Checks of a learner's gradients and influences, along streams on which implementations have failed."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import pytrees
from rtrl.testing import streams
from rtrl.testing.laws import Unbiased
from rtrl.testing.learner_checks.driver import StreamDriver, drive
from rtrl.testing.learner_checks.influence_verdict import influence_failures
from rtrl.testing.learner_checks.registry import Check, NotJudged, Subject, check
from rtrl.testing.learner_checks.verdict import compare, gradient_failures
from rtrl.testing.report import Found
from rtrl.testing.streams import Loss, Stream, moved_parameters

_SHORT = 40  # the number of steps that the other checks cover
_Modified = Iterator[tuple[Stream, str]]  # streams, and what was done to them
_Modify = Callable[[Subject, Stream], _Modified]


def _only_at(loss: Loss, has_loss: Callable[[int], bool]) -> Loss:
    """The loss at the chosen steps alone."""
    return lambda t, y: loss(t, y) if has_loss(t) else None


def _on_stream(make: Callable[[int], Stream], sparse: bool) -> Check:
    """A check on one of the standard streams."""

    def run(subject: Subject) -> Iterator[Found]:
        for found in subject.gradient_failures(subject.standard(make(subject.seed), sparse=sparse)):
            hint = " (if the learner is only for cells that return (y, h_next), declare sparse=False)"
            yield found._replace(message=found.message + hint) if sparse and " raised " in found.message else found

    return run


@check("dense cell")
def _dense(subject: Subject) -> Iterator[Found]:
    """Five samples; one sample; x that is zero at some steps."""
    stream = subject.standard(streams.dense_stream(subject.seed))
    failures = list(subject.gradient_failures(stream))
    yield from failures
    if failures or isinstance(subject.spec.law, Unbiased):
        return
    if subject.spec.batch is None:
        lone = replace(streams.dense_stream(subject.seed, batch=1), name="dense, a batch of one")
        yield from subject.gradient_failures(subject.standard(lone))
    silent = stream.xs.clone()
    silent[1 : stream.steps // 2] = 0.0
    treatment = f"x zero at steps 1 to {stream.steps // 2 - 1}"
    yield from subject.gradient_failures(replace(stream, xs=silent), treatment, stream)


for _name, _make, _sparse in (
    ("unusual parameters", streams.unusual_stream, False),
    ("shared parameters", streams.shared_stream, False),
    ("partly trained", streams.frozen_stream, False),
    ("layers", streams.layered_stream, False),
    ("sparse rows", streams.scheduled_stream, True),
    ("all rows declared at some steps", functools.partial(streams.scheduled_stream, largest=9.0), True),
    ("dormant slices", streams.dormant_stream, True),
    ("near ties", streams.near_tie_stream, True),
):
    check(_name)(_on_stream(_make, _sparse))


@check("long stream")
def _long(subject: Subject) -> Iterator[Found]:
    """Hundreds of steps with a loss at the end, or as many as the law covers; for an unbiased learner, whether the
    past beyond its horizon counts."""
    law = subject.spec.law
    if isinstance(law, Unbiased):
        slow, steps = streams.slow_stream(subject.seed), 3 * law.horizon
        at_the_end = _only_at(streams.squares, (steps - 1).__eq__)
        longer = replace(slow, xs=slow.xs[:steps, :1], loss=at_the_end, syncs=frozenset(), name="three horizons")
        subject.standard(longer)
        far = replace(law, horizon=steps, reach=law.reach or law.horizon)
        yield from gradient_failures(replace(subject.spec, law=far), longer, subject.seed)
        return
    if law.steps is not None and law.steps <= _SHORT:
        raise NotJudged("because the law covers short streams only")
    stream = subject.standard(streams.slow_stream(subject.seed))
    every = stream.loss
    yield from subject.gradient_failures(
        replace(stream, loss=lambda t, y: every(9, y) if t == stream.steps - 1 else every(t, y))
    )


@check("long dormancy")
def _long_dormancy(subject: Subject) -> Iterator[Found]:
    """A hundred and fifty dormant steps."""
    if subject.spec.law.steps is not None and subject.spec.law.steps <= _SHORT:
        raise NotJudged("because the law covers short streams only")
    yield from subject.gradient_failures(subject.standard(streams.long_dormancy_stream(subject.seed), sparse=True))


@check("own streams")
def _own(subject: Subject) -> Iterator[Found]:
    if not subject.spec.streams:
        raise NotJudged("because the spec has no streams of its own")
    for stream in subject.own_streams():
        yield from subject.gradient_failures(stream)


def _modified(
    name: str, *methods: str, losses: bool = False, learner: bool = False, steps: bool = False
) -> Callable[[_Modify], _Modify]:
    """Register a check of the gradient on modified streams.

    Args:
        methods: what the learner must have; the check does not apply without them.
        losses: the check does not apply to learners that take the streams' own losses only.
        learner: the check does not apply to functions of the whole stream.
        steps: the check does not apply to very short streams.
    """

    def register(modify: _Modify) -> _Modify:
        def run(subject: Subject) -> Iterator[Found]:
            if learner or methods:
                subject.needs_learner(*methods)
            if losses:
                subject.needs_any_loss()
            if steps:
                subject.needs_steps()
            for stream in subject.streams():
                for modified, treatment in modify(subject, stream):
                    yield from subject.gradient_failures(modified, treatment, stream)

        check(name)(run)
        return modify

    return register


@_modified("losses at some steps", losses=True, steps=True)
def _some_steps(subject: Subject, stream: Stream) -> _Modified:
    yield replace(stream, loss=_only_at(stream.loss, lambda t: t % 3 == 2)), "a loss at every third step"


@_modified("one loss at the last step", losses=True)
def _at_the_end(subject: Subject, stream: Stream) -> _Modified:
    last = _only_at(stream.loss, (stream.steps - 1).__eq__)
    yield replace(stream, loss=last), "a loss at the last step only"


@_modified("losses of single samples", losses=True, steps=True)
def _one_sample(subject: Subject, stream: Stream) -> _Modified:
    """Samples have their losses at different steps; each loss reaches its own sample only."""

    def of_one(t: int, y: Any) -> Tensor | None:
        batch = pytrees.tensors(y)[0].shape[0]
        return stream.loss(t, pytrees.map_tensors(lambda leaf: leaf[t % batch : t % batch + 1], y))

    yield replace(stream, loss=of_one), "a loss of one sample per step"


@_modified("losses of all scales", losses=True)
def _scales(subject: Subject, stream: Stream) -> _Modified:
    """Losses a million times as large and as small: gradients are not clipped and not rounded to zero. Losses of value
    zero, whose gradient is not."""

    def vanishing(t: int, y: Any) -> Tensor | None:
        value = stream.loss(t, y)
        return None if value is None else value - value.detach()

    yield replace(stream, loss=vanishing), "losses of value zero"
    for factor in (1e6, 1e-6):

        def scaled(t: int, y: Any, factor: float = factor) -> Tensor | None:
            value = stream.loss(t, y)
            return None if value is None else factor * value

        yield replace(stream, loss=scaled), f"losses {factor:g} times as large"


@_modified("views as inputs", learner=True)
def _views(subject: Subject, stream: Stream) -> _Modified:
    """x is a view that is not contiguous; if the spec allows it, x is overwritten after the losses of the step."""
    overwritten = subject.spec.copies_inputs
    treatment = "x not contiguous" + (", and overwritten after the step" if overwritten else "")
    resets = stream.resets
    if overwritten and stream.steps > 2 and subject.has("reset"):
        resets, treatment = _one_by_one(stream)[0], f"{treatment}, like the masks of resets"
    yield replace(stream, scattered=True, overwritten=overwritten, resets=resets), treatment


@_modified("plain backward", learner=True)
def _plain(subject: Subject, stream: Stream) -> _Modified:
    """Losses reach the learner by their own ``backward()``."""
    if not subject.spec.plain_backward:
        raise NotJudged("because the spec does not promise it (plain_backward=True)")
    yield replace(stream, plain=True), "losses by their own backward()"


@_modified("several losses per step", losses=True, learner=True)
def _several(subject: Subject, stream: Stream) -> _Modified:
    yield replace(stream, pieces=2), "each loss in two parts"


@check("no loss")
def _no_loss(subject: Subject) -> Iterator[Found]:
    subject.needs_any_loss()
    for stream in subject.streams():
        outcome = drive(subject.spec, replace(stream, loss=lambda t, y: None))
        for name, gradient in outcome.gradients.items():
            if bool((gradient != 0).any()):
                worst = f"{float(gradient.abs().max()):.6g}"
                yield Found(f"{stream.name}: a gradient without a loss", None, None, f"parameter {name}", worst, "0")


@check("early syncs")
def _early_syncs(subject: Subject) -> Iterator[Found]:
    """sync() at any step; the gradients add up, each loss counts once."""
    subject.needs_learner()
    subject.needs_steps()
    for stream in subject.streams():
        often = replace(stream, syncs=frozenset({0, 1, 4, 5, 11, 12}) & frozenset(range(stream.steps - 1)))
        failures = list(subject.gradient_failures(often, "syncs at irregular steps", stream))
        yield from failures
        if not failures and not isinstance(subject.spec.law, Unbiased):
            yield from _accumulated(subject, often)


def _accumulated(subject: Subject, stream: Stream) -> Iterator[Found]:
    """``sync`` adds to what ``.grad`` holds; a second sync adds nothing."""
    driver = StreamDriver(subject.spec, stream)
    gradients = driver.finish()
    difference = compare(driver.sync_and_read(), gradients, subject.spec.tolerance)
    if difference is not None:
        message = f"{stream.name}: a second sync() without a step in between changes the gradient"
        yield difference.as_found(message, stream.steps - 1)
        return
    driver = StreamDriver(subject.spec, stream)
    for p in driver.cell.parameters():
        p.grad = torch.ones_like(p)
    total: dict[str, Tensor] = {}
    for t, _ in driver.steps():
        if t in stream.syncs or t == stream.steps - 1:
            total = {name: total.get(name, 0.0) + value for name, value in driver.sync_and_read().items()}
            driver.take_gradients()
    difference = compare(total, {name: value + 1 for name, value in gradients.items()}, subject.spec.tolerance)
    if difference is not None:
        message = f"{stream.name}: sync() does not add to .grad, or what it adds depends on what .grad holds"
        yield difference.as_found(message, stream.steps - 1)


@_modified("changed parameters", learner=True, steps=True)
def _changed(subject: Subject, stream: Stream) -> _Modified:
    """Parameters change after a sync, as by an optimizer, four times; each step uses the parameters at which it was
    taken. One sample is reset right after a change, if the learner has resets."""
    at = sorted({max(1, k * stream.steps // 5) for k in (1, 2, 3, 4)})
    moved = moved_parameters(stream, 4, subject.seed)
    offsets = [moved[sum(t >= change for change in at)] for t in range(stream.steps)]
    treatment = f"changes of parameters before steps {', '.join(map(str, at))}"
    flags = None
    if subject.has("reset"):
        flags = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool, device=stream.xs.device)
        flags[at[-2], 0] = True
        treatment += f", a reset right after the change before step {at[-2]}"
    yield replace(stream, offsets=offsets, resets=flags), treatment


@_modified("resets", "reset", steps=True)
def _resets(subject: Subject, stream: Stream) -> _Modified:
    """Samples are reset in mid-stream, one by one; gradients of earlier losses are kept."""
    flags, at = _one_by_one(stream)
    yield replace(stream, resets=flags), f"resets of one sample before step {at[0]}, of another before step {at[1]}"


def _one_by_one(stream: Stream) -> tuple[Tensor, list[int]]:
    flags = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool, device=stream.xs.device)
    at = [max(1, stream.steps // 3), max(2, 2 * stream.steps // 3)]
    flags[at[0], 0] = flags[at[1], -1] = True
    return flags, at


@_modified("resets at block borders", "reset", steps=True)
def _border_resets(subject: Subject, stream: Stream) -> _Modified:
    """One sample is reset at each border of blocks of many lengths: at the multiples of 8 and some others."""
    if not subject.spec.streams and stream.name == "dense":
        stream = subject.standard(streams.dense_stream(subject.seed, steps=66, batch=2))
    flags = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool, device=stream.xs.device)
    at = [t for t in (2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64) if t < stream.steps]
    for number, t in enumerate(at):
        flags[t, number % stream.batch_size] = True
    yield replace(stream, resets=flags), f"one sample reset before each of the steps {', '.join(map(str, at))}"


@_modified("resets of several samples", "reset", steps=True)
def _many_resets(subject: Subject, stream: Stream) -> _Modified:
    """Resets before the first step, of some, of all, of no sample, by one call or several, twice in a row, right after
    a sync, and late; steps without a loss in between."""
    flags = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool, device=stream.xs.device)
    flags[0, -1] = flags[stream.steps // 2] = flags[stream.steps - 2, 0] = True
    flags[2:4, 1:] = True
    syncs, loss = frozenset({1, stream.steps // 2 - 1}), _only_at(stream.loss, lambda t: t % 4 != 1)
    loss = stream.loss if subject.spec.losses == "own" else loss
    treatment = "resets of some, of all and of no sample, by one call and by one each, twice in a row, after syncs"
    yield replace(stream, resets=flags, split_resets=frozenset({2}), syncs=syncs, loss=loss), treatment


@_modified("sequences", "unroll", losses=True, steps=True)
def _sequences(subject: Subject, stream: Stream) -> _Modified:
    """Several steps at once, with one loss for all of them; samples are reset between them, inside blocks too."""
    flags = _one_by_one(stream)[0] if subject.has("reset") else None
    yield replace(stream, unrolled=True, resets=flags), "several steps at once, by unroll"


@check("influence")
def _influence(subject: Subject) -> Iterator[Found]:
    """influence() returns the influence of the law, column by column, and does not change the gradient."""
    if not subject.spec.law.covers_influence:
        raise NotJudged("because the law says nothing about the influence")
    subject.needs_learner("influence")
    for stream in subject.streams():
        yield from influence_failures(subject.spec, stream)
    stream = subject.streams()[0]
    if stream.steps < 6:
        return
    moved = moved_parameters(stream, 1, subject.seed)
    yield from influence_failures(
        subject.spec,
        replace(
            stream,
            name=f"{stream.name}, with resets, a sync, a load and a change of parameters",
            resets=_one_by_one(stream)[0] if subject.has("reset") else None,
            saves=frozenset({stream.steps // 2 - 2} if subject.has("state_dict", "load_state_dict") else ()),
            offsets=[moved[3 * t >= 2 * stream.steps] for t in range(stream.steps)],
            syncs=frozenset({1}),
        ),
    )
