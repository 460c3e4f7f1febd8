"""Checks of how a learner behaves, whatever its gradients: its interface, what it keeps, what it refuses."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rtrl import _guard, _tree
from rtrl.cells.protocol import call_cell
from rtrl.testing import streams
from rtrl.testing._judge import compare
from rtrl.testing._registry import NotJudged, Subject, check
from rtrl.testing._walk import Stopped, deliver, said, start, take_step, walk
from rtrl.testing.laws import Unbiased
from rtrl.testing.report import Found
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_SINGLE = 1e-3  # float32 against float64, relative: that it is the same gradient, not how well it is rounded
_MEMORY_STEPS = 200


@check("interface")
def _interface(subject: Subject) -> Iterator[Found]:
    """y is the cell's own, and takes losses; every parameter that is trained and earns something gets a gradient."""
    stream = subject.streams()[0]
    if subject.spec.gradients is not None:
        found = subject.spec.gradients(copy.deepcopy(stream.cell), stream.xs, stream.loss)
        if not hasattr(found, "keys"):
            yield Found(f"gradients(cell, xs, loss_fn) must return a mapping by name, got {type(found).__name__}")
            return
        names = {name for name, p in stream.cell.named_parameters() if p.requires_grad}
        if names - found.keys():
            yield Found(f"the gradients of {', '.join(sorted(names - found.keys()))} are missing")
        return
    learner, _ = start(subject.spec, stream)
    missing = [name for name in ("step", "backward", "sync") if not callable(getattr(learner, name, None))]
    if missing:
        yield Found(f"a learner must have step(x), backward(loss) and sync(); {', '.join(missing)} is missing")
        return
    outcome = walk(subject.spec, stream)
    h = stream.cell.init_state(stream.batch_size)  # type: ignore[operator]
    for t, y in enumerate(outcome.outputs):
        with torch.no_grad():
            wanted, h, _ = call_cell(stream.cell, stream.xs[t], h, None)
        pairs = list(zip(_tree.tensors(y), _tree.tensors(wanted), strict=False))
        if len(_tree.tensors(y)) != len(_tree.tensors(wanted)):
            yield Found("step(x) does not return the y of the cell", t)
            return
        for number, (found_leaf, leaf) in enumerate(pairs):
            same_form = found_leaf.shape == leaf.shape and found_leaf.dtype == leaf.dtype
            if not same_form or not _guard.nearly_equal(found_leaf, leaf):
                values = [f"{v.flatten()[:3].tolist()} … {tuple(v.shape)} {v.dtype}" for v in (found_leaf, leaf)]
                yield Found("step(x) does not return the y of the cell", t, None, f"tensor {number} of y", *values)
                return


@check("saved and loaded")
def _saved(subject: Subject) -> Iterator[Found]:
    """A learner that loads ``state_dict()`` goes on bit for bit."""
    subject.needs_learner("state_dict", "load_state_dict")
    subject.needs_steps()
    for stream in subject.streams():
        middle = stream.steps // 2
        results = []
        for resumed in (False, True):
            torch.manual_seed(subject.seed)
            learner, cell = start(subject.spec, stream)
            for t in range(stream.steps):
                if t == middle:
                    if resumed:
                        learner, cell = _loaded(subject.spec, stream, learner, cell)
                    torch.manual_seed(subject.seed + 1)
                take_step(learner, cell, stream, t)
            results.append(deliver(learner, cell, stream.steps - 1))
        for name, value in results[0].items():
            if not torch.equal(value, results[1][name]):
                bad = (value != results[1][name]).nonzero()[0].tolist()
                values = [f"{float(r[name][tuple(bad)]):.17g}" for r in reversed(results)]
                message = f"{stream.name}: saved after {middle} steps and loaded, it does not go on bit for bit"
                yield Found(message, None, None, f"parameter {name}{bad}", *values)
                break


def _loaded(spec: LearnerSpec, stream: Stream, learner: Any, cell: nn.Module) -> tuple[Any, nn.Module]:
    """A new learner with a new copy of the cell, gone on from where the old one is."""
    try:
        saved = copy.deepcopy(learner.state_dict())
        new, other = start(spec, stream)
        with torch.no_grad():
            for p, q in zip(cell.parameters(), other.parameters(), strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
        new.load_state_dict(saved)
    except Stopped:
        raise
    except Exception as error:
        raise Stopped(f"state_dict() and load_state_dict() raised {said(error)}") from error
    return new, other


@check("float32")
def _single(subject: Subject) -> Iterator[Found]:
    """A cell in float32 gets y and gradients in float32."""
    stream = subject.streams()[0]
    single = copy.copy(stream)
    object.__setattr__(single, "cell", copy.deepcopy(stream.cell).float())
    object.__setattr__(single, "xs", stream.xs.float())
    outcome = walk(subject.spec, single)
    for t, y in enumerate(outcome.outputs):
        for leaf in _tree.tensors(y):
            if leaf.is_floating_point() and leaf.dtype != torch.float32:
                yield Found("the y of a float32 cell has another dtype", t, None, "y", str(leaf.dtype), "torch.float32")
                return
    if isinstance(subject.spec.law, Unbiased):
        return
    wanted = subject.spec.law.reference(stream, outcome.learner)
    for name, value in wanted.items():
        gap = (outcome.gradients[name].double() - value).abs()
        if not bool((gap <= _SINGLE * value.abs().max()).all()):
            worst = int(gap.nan_to_num(nan=torch.inf).argmax())
            values = [f"{float(v.flatten()[worst]):.9g}" for v in (outcome.gradients[name], value)]
            yield Found("in float32 it is another gradient", None, None, f"parameter {name}, entry {worst}", *values)
            return


@check("the cell is left alone")
def _left_alone(subject: Subject) -> Iterator[Found]:
    """No parameter, buffer, flag, mode, hook or attribute of the cell is changed but ``.grad``; nor the input."""
    for stream in subject.streams():
        cell = copy.deepcopy(stream.cell)
        before = _picture(cell)
        kept = copy.deepcopy({name: value.detach() for name, value in _values(cell).items()})
        if subject.spec.gradients is not None:
            xs = stream.xs.clone()
            subject.spec.gradients(cell, xs, stream.loss)
            if not torch.equal(xs, stream.xs):
                yield Found(f"{stream.name}: xs is changed in place")
        else:
            assert subject.spec.make_learner is not None
            learner = subject.spec.make_learner(cell, stream.batch_size)
            for t in range(stream.steps):
                x = stream.xs[t].clone()
                y = learner.step(x)
                loss = stream.loss(t, y)
                if loss is not None:
                    learner.backward(loss)
                if not torch.equal(x, stream.xs[t]):
                    yield Found(f"{stream.name}: x is changed in place", t)
                    return
            learner.sync()
        for name, value in _values(cell).items():
            if name not in kept or not torch.equal(value, kept[name]):
                yield Found(f"{stream.name}: the learner changes {name!r} of the cell")
        if _picture(cell) != before:
            yield Found(f"{stream.name}: the learner leaves hooks, flags or attributes of the cell changed")


def _values(cell: nn.Module) -> dict[str, Tensor]:
    return {**dict(cell.named_parameters()), **dict(cell.named_buffers())}


def _picture(cell: nn.Module) -> list[Any]:
    """What a learner may not change, besides values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in cell.named_modules()
    ] + [(name, p.requires_grad, p.dtype, p.device) for name, p in cell.named_parameters()]


@check("memory does not grow")
def _memory(subject: Subject) -> Iterator[Found]:
    """The bytes of all tensors alive, after a warm-up and after as many steps again."""
    if not subject.spec.constant_memory:
        raise NotJudged("because the spec does not promise it (constant_memory=True)")
    subject.needs_learner()
    stream = subject.streams()[0]
    if subject.spec.sparse and not subject.spec.streams:
        stream = streams.scheduled_stream(subject.seed)
    learner, cell = start(subject.spec, stream)
    turns = -(-_MEMORY_STEPS // stream.steps)  # whole turns of the stream, so that both looks find the same input
    seen = []
    for turn in range(2 * turns):
        for t in range(stream.steps):
            take_step(learner, cell, stream, t)
        deliver(learner, cell, stream.steps - 1)
        cell.zero_grad()
        if (turn + 1) % turns == 0:
            seen.append(_alive())
    if seen[1] > seen[0]:
        steps = turns * stream.steps
        message = f"{stream.name}: it holds more after {2 * steps} steps than after {steps}"
        yield Found(message, None, None, "bytes of all tensors", str(seen[1]), str(seen[0]))


def _alive() -> int:
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(storages.values())


@check("error inputs")
def _errors(subject: Subject) -> Iterator[Found]:
    """Bad input in mid-stream is refused as declared, and nothing is lost by it."""
    if not subject.spec.errors:
        raise NotJudged("because the spec declares none")
    subject.needs_learner()
    subject.needs_steps()
    stream = subject.streams()[0]
    for bad in subject.spec.errors:
        learner, cell = start(subject.spec, stream)
        middle = stream.steps // 2
        for t in range(stream.steps):
            take_step(learner, cell, stream, t)
            if t == middle:
                yield from _refused(learner, bad.name, bad.call, bad.raises, bad.match, t)
        if isinstance(subject.spec.law, Unbiased):
            continue
        wanted = subject.spec.law.reference(stream, learner)
        wrong = compare(deliver(learner, cell, stream.steps - 1), wanted)
        if wrong is not None:
            message = f"{bad.name}: after it was refused, the gradient is wrong"
            yield Found(message, middle, None, wrong.where, wrong.found, wrong.expected)


def _refused(
    learner: Any, name: str, call: Callable[[Any], object], raises: type[Exception], match: str, t: int
) -> Iterator[Found]:
    try:
        call(learner)
    except Exception as error:
        if not isinstance(error, raises) or match not in str(error):
            wanted = f"{raises.__name__}{f' with {match!r}' if match else ''}"
            yield Found(f"{name}: another error than declared", t, None, "", said(error), wanted)
    else:
        yield Found(f"{name}: it is not refused", t, None, "", "no error", raises.__name__)
